"""Qwen2-VL beside transformers: log-probabilities of every position, and mutations that must break the equality."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sightline.models import Encoding, qwen2_vl
from sightline.prompt.qwen2_vl import Qwen2VLProcessor
from sightline.types import View
from tests import oracle, tiny
from tests.models.harness import Harness, load

TOLERANCE = 1e-3
LAYOUTS: dict[str, dict[str, Any]] = {
    "v5 config, 2024 names": {},
    "2024 config and names, sharded": {"config": "2024", "shards": 3},
    "v5 config and names": {"names": "v5"},
    "tied, 2024": {"tied": True, "config": "2024"},
    "tied, v5": {"tied": True, "names": "v5", "shards": 2},
}
# Sizes of the pictures, and the prompt: numbers are so many text tokens, "i" is the next picture.
PROMPTS: dict[str, tuple[list[tuple[int, int]], list[int | str]]] = {
    "text": ([], [40]),
    "one": ([(100, 150)], [9, "i", 12]),
    "two": ([(100, 150), (220, 60)], [3, "i", "i", 20]),
    "three": ([(64, 64), (300, 40), (90, 90)], ["i", 5, "i", 1, "i", 7]),
    "interleaved": ([(56, 84), (84, 56), (56, 84)], [17, "i", 2, "i", 17, "i", 1]),
    "the same twice": ([(70, 70), (70, 70)], [4, "i", 4, "i", 4]),
}


def prompt(model_dir: Path, name: str, seed: int = 0) -> tuple[list[int], list[Image.Image]]:
    """ids with one placeholder for each picture, and the pictures."""
    sizes, parts = PROMPTS[name]
    pictures = [oracle.picture(w, h, seed=0 if "same" in name else i) for i, (w, h) in enumerate(sizes)]
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    for part in parts:
        if part == "i":
            ids += [tiny.VISION_START, tiny.IMAGE_PAD, tiny.VISION_END]
        else:
            ids += rng.integers(0, tiny.NUM_TEXT_TOKENS, int(part)).tolist()
    return ids, pictures


def judge(model_dir: Path, ids: list[int], pictures: list[Image.Image]) -> Tensor:
    """transformers' log-probabilities [L, vocab] of the expanded prompt."""
    return oracle.transformers_logprobs(model_dir, oracle.expand(model_dir, ids, pictures), pictures)


def run(model: Any, model_dir: Path, name: str, chunk: int | None = None) -> Tensor:
    """Our log-probabilities [L, vocab]."""
    ids, pictures = prompt(model_dir, name)
    harness = Harness(model)
    return harness.logprobs(harness.sequence(model_dir, ids, pictures), chunk)


def difference(model: Any, model_dir: Path, name: str, chunk: int | None = None) -> float:
    """Largest distance of a log-probability from transformers'."""
    ids, pictures = prompt(model_dir, name)
    return float((run(model, model_dir, name, chunk) - judge(model_dir, ids, pictures)).abs().max())


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return tiny.qwen2_vl()


@pytest.fixture(scope="module")
def model(model_dir: Path) -> Any:
    return load(model_dir)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PROMPTS)
def test_logprobs_equal_transformers(layout: str, name: str) -> None:
    model_dir = tiny.qwen2_vl(**LAYOUTS[layout])
    assert difference(load(model_dir), model_dir, name) < TOLERANCE


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 16, 17, 50])
@pytest.mark.parametrize("name", ["text", "interleaved"])
def test_prefill_in_chunks(model: Any, model_dir: Path, name: str, chunk: int) -> None:
    assert difference(model, model_dir, name, chunk) < TOLERANCE


def test_batched_with_strangers(model: Any, model_dir: Path) -> None:
    """Decode rows, chunks and whole prompts in one step; each gets what it gets alone."""
    harness = Harness(model)
    prompts = [prompt(model_dir, name, seed) for seed, name in enumerate(PROMPTS)]
    expected = [judge(model_dir, ids, pictures) for ids, pictures in prompts]
    sequences = [harness.sequence(model_dir, ids, pictures) for ids, pictures in prompts]
    rng = np.random.default_rng(0)
    got: list[list[Tensor]] = [[] for _ in sequences]
    while work := [(i, len(s.ids) - s.done) for i, s in enumerate(sequences) if s.done < len(s.ids)]:
        sizes = sorted(((i, min(left, int(rng.integers(1, 12)))) for i, left in work), key=lambda w: w[1] > 1)
        for (i, _), lp in zip(sizes, harness.step([(sequences[i], n) for i, n in sizes]), strict=True):
            got[i].append(lp)
    for parts, want in zip(got, expected, strict=True):
        assert (torch.cat(parts) - want).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_decoding(model: Any, model_dir: Path, name: str) -> None:
    ids, pictures = prompt(model_dir, name)
    harness = Harness(model)
    new = harness.greedy(harness.sequence(model_dir, ids, pictures), 12)
    assert new == oracle.transformers_greedy(model_dir, oracle.expand(model_dir, ids, pictures), pictures, 12)
    assert len(set(new)) > 4, "the tiny model says the same all the time: its test proves little"


def test_pictures_change_the_answer(model: Any, model_dir: Path) -> None:
    ids, pictures = prompt(model_dir, "one")
    other = [oracle.picture(100, 150, seed=9)]
    first, second = (judge(model_dir, ids, p)[-1] for p in (pictures, other))
    assert (first - second).abs().max() > 0.1


def test_only_the_wanted_rows(model: Any, model_dir: Path) -> None:
    """The last layer finishes these rows alone, and the cache is as after a full forward."""
    ids, pictures = prompt(model_dir, "one")
    full, part = Harness(model), Harness(model)
    a, b = (h.sequence(model_dir, ids, pictures) for h in (full, part))
    expected = full.step([(a, len(a.ids))])[0]
    rows = torch.tensor([len(b.ids) - 1, 3])
    got = part.step([(b, len(b.ids))], rows)[0]
    torch.testing.assert_close(got, expected[rows], atol=1e-4, rtol=1e-4)
    for seq in (a, b):
        seq.ids.append(7)
    torch.testing.assert_close(part.step([(b, 1)])[0], full.step([(a, 1)])[0], atol=1e-4, rtol=1e-4)


def test_batch_of_pictures_equals_one_by_one(model: Any, model_dir: Path) -> None:
    sizes = [(56, 84), (300, 40), (84, 56), (64, 64), (56, 84)]
    pixels = [oracle.resized(model_dir, oracle.picture(w, h, i)) for i, (w, h) in enumerate(sizes)]
    tensors = [torch.from_numpy(p) for p in pixels]
    grids = [(1, p.shape[0] // 14, p.shape[1] // 14) for p in pixels]
    with torch.inference_mode():
        together = model.encode_images(tensors, grids)
        alone = [model.encode_images([t], [g])[0] for t, g in zip(tensors, grids, strict=True)]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    assert model.encode_images([], []) == []


def test_pixels_that_do_not_fit_their_grid(model: Any) -> None:
    with pytest.raises(AssertionError, match="do not fit grid"):
        model.encode_images([torch.zeros(28, 56, 3, dtype=torch.uint8)], [(1, 4, 2)])


def test_feature_counts_are_asserted(model: Any) -> None:
    ids = torch.tensor([1, tiny.IMAGE_PAD, tiny.IMAGE_PAD, 2])
    with pytest.raises(AssertionError, match="3 placeholder"):
        model.embed(ids, torch.tensor([1, 2, 3]), torch.zeros(2, 64))
    with pytest.raises(AssertionError, match="come together"):
        model.embed(ids, torch.tensor([1, 2]), None)


def test_bfloat16_is_near(model_dir: Path) -> None:
    model = load(model_dir, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    ids, pictures = prompt(model_dir, "one")
    expected = judge(model_dir, ids, pictures)
    error = (run(model, model_dir, "one") - expected).abs()
    assert error.mean() < 0.15


def test_mean_and_deviation_come_from_the_checkpoint(tmp_path: Path) -> None:
    folder = tiny.qwen2_vl()
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    preprocessor = tmp_path / "preprocessor_config.json"
    text = preprocessor.read_text().replace("0.48145466", "0.25").replace("0.26130258", "0.6")
    preprocessor.unlink()
    preprocessor.write_text(text)
    assert difference(load(tmp_path), tmp_path, "one") < TOLERANCE


# ---- mutations: each a mistake that somebody has made, applied to our side; the equality must break ----


def _config(model: Any, **changes: Any) -> Any:
    """The model again with other text or vision settings and the same weights."""
    text = {k: v for k, v in changes.items() if hasattr(model.config.text, k)}
    vision = {k: v for k, v in changes.items() if hasattr(model.config.vision, k)}
    config = dataclasses.replace(
        model.config,
        text=dataclasses.replace(model.config.text, **text),
        vision=dataclasses.replace(model.config.vision, **vision),
    )
    mutant = qwen2_vl.Qwen2VLForConditionalGeneration(config).eval()
    mutant.load_state_dict(model.state_dict())
    return mutant


def _row_major_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    def patchify(self: Any, pixels: Tensor) -> Tensor:
        height, width, channels = pixels.shape
        p = self.patch
        cells = pixels.view(height // p, p, width // p, p, channels)
        return cells.permute(0, 2, 4, 1, 3).reshape(-1, channels, p * p)

    monkeypatch.setattr(qwen2_vl.PatchEmbed, "patchify", patchify)


def _channels_last_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    original = qwen2_vl.PatchEmbed.patchify

    def patchify(self: Any, pixels: Tensor) -> Tensor:
        patches = original(self, pixels)
        return patches.transpose(1, 2).reshape(patches.shape)

    monkeypatch.setattr(qwen2_vl.PatchEmbed, "patchify", patchify)


def _row_major_vision_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    def angles(self: Any, grid: Any) -> Tensor:
        _, h, w = grid
        rows = torch.arange(h)[:, None].expand(h, w).reshape(-1, 1)
        columns = torch.arange(w)[None, :].expand(h, w).reshape(-1, 1)
        return torch.cat([rows * self.inv_freq, columns * self.inv_freq], dim=1)

    monkeypatch.setattr(qwen2_vl.VisionTower, "_angles", angles)


def _bilinear(monkeypatch: pytest.MonkeyPatch) -> None:
    def views(self: Any, size: tuple[int, int], plan: Any) -> tuple[View, ...]:
        return (View(size=(plan.width, plan.height), resample=Image.Resampling.BILINEAR),)

    monkeypatch.setattr(Qwen2VLProcessor, "views", views)


def _reversed_features(monkeypatch: pytest.MonkeyPatch) -> None:
    original = qwen2_vl.VisionTower.forward

    def forward(self: Any, pixels: Any, grids: Any) -> Encoding[list[Tensor]]:
        return (yield from original(self, pixels, grids))[::-1]

    monkeypatch.setattr(qwen2_vl.VisionTower, "forward", forward)


def _columns_before_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Qwen2VLProcessor.expand

    def expand(*args: Any) -> Any:
        prompt = original(*args)
        return prompt._replace(positions=prompt.positions[[0, 2, 1]])

    monkeypatch.setattr(Qwen2VLProcessor, "expand", expand)


def _flat_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Qwen2VLProcessor.expand

    def expand(*args: Any) -> Any:
        return original(*args)._replace(positions=None, position_delta=0)

    monkeypatch.setattr(Qwen2VLProcessor, "expand", expand)


def _one_group_for_all_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    original = qwen2_vl.VisionBlock.forward

    def forward(self: Any, x: Tensor, pending: Any, rotary: Any, groups: Any) -> tuple[Tensor, Tensor]:
        return original(self, x, pending, rotary, [(1, x.shape[0])])

    monkeypatch.setattr(qwen2_vl.VisionBlock, "forward", forward)


CONFIG_MUTATIONS: dict[str, dict[str, Any]] = {
    "M-RoPE sections in another order": {"mrope_section": (3, 3, 2)},
    "M-RoPE sections all of time": {"mrope_section": (8, 0, 0)},
    "rope theta": {"rope_theta": 1000.0},
    "gelu for quick_gelu": {"hidden_act": "gelu"},
    "tanh gelu for quick_gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "mean of SigLIP": {"image_mean": (0.5, 0.5, 0.5)},
    "deviation of SigLIP": {"image_std": (0.5, 0.5, 0.5)},
    "mean in BGR order": {"image_mean": (0.40821073, 0.4578275, 0.48145466)},
    "no rescaling": {"rescale_factor": 1.0},
    "rms_norm_eps": {"rms_norm_eps": 1e-2},
}
CODE_MUTATIONS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "patches row by row, not in merge blocks": _row_major_patches,
    "patches with channels last": _channels_last_patches,
    "vision positions row by row": _row_major_vision_positions,
    "bilinear for bicubic": _bilinear,
    "features of pictures in reverse order": _reversed_features,
    "columns before rows": _columns_before_rows,
    "flat positions": _flat_positions,
    "pictures attend to each other": _one_group_for_all_pictures,
}


@pytest.mark.parametrize("mutation", CONFIG_MUTATIONS)
def test_settings_matter(model: Any, model_dir: Path, mutation: str) -> None:
    mutant = _config(model, **CONFIG_MUTATIONS[mutation])
    assert difference(mutant, model_dir, "interleaved") > 5 * TOLERANCE


@pytest.mark.parametrize("mutation", CODE_MUTATIONS)
def test_mistakes_show(model: Any, model_dir: Path, mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, pictures = prompt(model_dir, "three")
    expected = judge(model_dir, ids, pictures)
    CODE_MUTATIONS[mutation](monkeypatch)
    assert (run(model, model_dir, "three") - expected).abs().max() > 5 * TOLERANCE
