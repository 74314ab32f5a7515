"""Qwen2.5-VL beside transformers: log-probabilities of every position, and mutations that must break the equality."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sightline import Engine, SamplingParams
from sightline.errors import CheckpointError
from sightline.models import Encoding, qwen2_5_vl
from sightline.models.qwen2_vl import VisionTower
from tests import oracle, tiny
from tests.models.harness import Harness, load

# Rounding of float32: the towers agree to 2e-6 in float64.
TOLERANCE = 5e-4
LAYOUTS: dict[str, dict[str, Any]] = {
    "v5 config, 2024 names": {},
    "2024 config and names, sharded, tied": {"config": "2024", "shards": 3, "tied": True},
    "v5 config and names": {"names": "v5"},
}
# Sizes of the pictures, and the prompt: numbers are so many text tokens, "i" is the next picture. Windows have 2 x 2 cells
# of 28 pixels: 84 and 140 pixels leave narrow windows at the edges, 56 and 112 leave none.
PROMPTS: dict[str, tuple[list[tuple[int, int]], list[int | str]]] = {
    "text": ([], [40]),
    "one": ([(84, 140)], [9, "i", 12]),
    "whole windows": ([(112, 56)], [2, "i", 12]),
    "two": ([(100, 150), (220, 60)], [3, "i", "i", 20]),
    "three": ([(64, 64), (300, 40), (90, 90)], ["i", 5, "i", 1, "i", 7]),
    "interleaved": ([(56, 84), (84, 56), (56, 84)], [17, "i", 2, "i", 17, "i", 1]),
    "one cell": ([(28, 28), (28, 84)], [4, "i", 4, "i"]),
}


def tiny_model(
    *, names: str = "2024", config: str = "v5", shards: int = 1, tied: bool = False, wide: bool = False
) -> Path:
    """A folder like Qwen2.5-VL-Instruct's, of 0.3 M parameters; options as for `tiny.qwen2_vl`."""
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    options = {"names": names, "config": config, "shards": shards, "tied": tied, "wide": wide, "source": source}
    return tiny._cached("qwen2_5_vl", options, lambda folder: _make(folder, names, config, shards, tied, wide))


def _make(folder: Path, names: str, config: str, shards: int, tied: bool, wide: bool) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": tiny.VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "bos_token_id": tiny.END_OF_TEXT,
        "eos_token_id": tiny.IM_END,
        **(tiny.WIDE_HEADS if wide else {}),
    }
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [16, 24, 24] if wide else [2, 3, 3]}
    vision = {
        "depth": 3,
        "hidden_size": 160 if wide else 48,
        "num_heads": 2 if wide else 3,
        "intermediate_size": 70,
        "out_hidden_size": text["hidden_size"],
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    ids = {
        "image_token_id": tiny.IMAGE_PAD,
        "video_token_id": tiny.IDS["<|video_pad|>"],
        "vision_start_token_id": tiny.VISION_START,
        "vision_end_token_id": tiny.VISION_END,
    }
    hf_config = Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope}, vision_config=vision, tie_word_embeddings=tied, **ids
    )
    hf_config.dtype = "bfloat16" if wide else "float32"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2_5_VLForConditionalGeneration(hf_config).eval()
        tiny._rescale(model)
    model.to(torch.bfloat16 if wide else torch.float32).save_pretrained(folder)
    if config == "2024":
        flat = {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            **text,
            **ids,
            "rope_theta": rope["rope_theta"],
            "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
            "sliding_window": 32768,
            "use_sliding_window": False,
            "tie_word_embeddings": tied,
            "torch_dtype": "float32",
            "vision_config": {**vision, "hidden_act": "silu", "in_chans": 3, "spatial_patch_size": 14},
        }
        tiny._write_json(folder / "config.json", flat)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    if names == "v5":
        tensors = {tiny._v5_name(name): tensor for name, tensor in tensors.items()}
    tiny._save_shards(folder, tensors, shards, save_file)
    tiny._write_json(folder / "preprocessor_config.json", tiny._preprocessor_config(28 * 28 * 64))
    tiny._write_tokenizer(folder)


def prompt(name: str, seed: int = 0) -> tuple[list[int], list[Image.Image]]:
    """Ids with one placeholder for each picture."""
    sizes, parts = PROMPTS[name]
    pictures = [oracle.picture(w, h, seed=i) for i, (w, h) in enumerate(sizes)]
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    for part in parts:
        if part == "i":
            ids += [tiny.VISION_START, tiny.IMAGE_PAD, tiny.VISION_END]
        else:
            ids += rng.integers(0, tiny.NUM_TEXT_TOKENS, int(part)).tolist()
    return ids, pictures


def expected(model_dir: Path, name: str, seed: int = 0) -> Tensor:
    ids, pictures = prompt(name, seed)
    return oracle.transformers_logprobs(model_dir, oracle.expand(model_dir, ids, pictures), pictures)


def run(model: Any, model_dir: Path, name: str, chunk: int | None = None) -> Tensor:
    harness = Harness(model)
    return harness.logprobs(harness.sequence(model_dir, *prompt(name)), chunk)


def difference(model: Any, model_dir: Path, name: str, chunk: int | None = None) -> float:
    return float((run(model, model_dir, name, chunk) - expected(model_dir, name)).abs().max())


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return tiny_model()


@pytest.fixture(scope="module")
def model(model_dir: Path) -> Any:
    return load(model_dir)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PROMPTS)
def test_logprobs_equal_transformers(layout: str, name: str) -> None:
    model_dir = tiny_model(**LAYOUTS[layout])
    assert difference(load(model_dir), model_dir, name) < TOLERANCE


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_prefill_in_chunks(model: Any, model_dir: Path, chunk: int) -> None:
    assert difference(model, model_dir, "three", chunk) < TOLERANCE


def test_batched_with_strangers(model: Any, model_dir: Path) -> None:
    harness = Harness(model)
    sequences = [harness.sequence(model_dir, *prompt(name, seed)) for seed, name in enumerate(PROMPTS)]
    rng = np.random.default_rng(0)
    got: list[list[Tensor]] = [[] for _ in sequences]
    while work := [(i, len(s.ids) - s.done) for i, s in enumerate(sequences) if s.done < len(s.ids)]:
        sizes = sorted(((i, min(left, int(rng.integers(1, 12)))) for i, left in work), key=lambda w: w[1] > 1)
        for (i, _), lp in zip(sizes, harness.step([(sequences[i], n) for i, n in sizes]), strict=True):
            got[i].append(lp)
    for seed, (name, parts) in enumerate(zip(PROMPTS, got, strict=True)):
        assert (torch.cat(parts) - expected(model_dir, name, seed)).abs().max() < TOLERANCE


def test_batch_of_pictures_equals_one_by_one(model: Any, model_dir: Path) -> None:
    sizes = [(56, 84), (300, 40), (84, 56), (64, 64), (56, 84), (28, 28), (140, 140)]
    pixels = [torch.from_numpy(oracle.resized(model_dir, oracle.picture(w, h, i))) for i, (w, h) in enumerate(sizes)]
    grids = [(1, p.shape[0] // 14, p.shape[1] // 14) for p in pixels]
    with torch.inference_mode():
        together = model.encode_images(pixels, grids)
        alone = [model.encode_images([p], [g])[0] for p, g in zip(pixels, grids, strict=True)]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_engine_greedy_equals_transformers(model_dir: Path) -> None:
    content = [
        {"type": "image", "image": oracle.picture(120, 200)},
        {"type": "text", "text": "What is in this picture?"},
    ]
    messages: Any = [{"role": "user", "content": content}]
    with Engine(model_dir, device="cpu", max_total_tokens=4096) as engine:
        answer = engine.chat(messages, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=0))
        ids = engine._run(engine.pipeline.chat(messages)).input_ids.tolist()
    new = oracle.transformers_greedy(model_dir, ids, [oracle.picture(120, 200)], 12)
    assert [token.token_id for token in answer.outputs[0].logprobs] == new
    assert len(set(new)) > 4


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("window_size", 50, "window_size is 50"),
        ("fullatt_block_indexes", [3], r"fullatt_block_indexes is \[3\]"),
        ("hidden_act", "gelu", "hidden_act is 'gelu'"),
        ("out_hidden_size", 32, "hidden_size is 32"),
    ],
)
def test_settings_that_matter_are_read_strictly(model_dir: Path, key: str, value: Any, message: str) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    config["vision_config"][key] = value
    with pytest.raises(CheckpointError, match=message):
        qwen2_5_vl.Qwen2_5_VLConfig.from_hf(config, {})


# ---- mutations: each a mistake that somebody has made, applied to our side; the equality must break ----


def _order_not_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    original = qwen2_5_vl.WindowTower._encode

    def encode(self: Any, x: Tensor, rotary: Any, grids: Any, groups: Any) -> Encoding[Tensor]:
        encoded = yield from original(self, x, rotary, grids, groups)
        return encoded.index_select(0, self._windows(grids)[0])

    monkeypatch.setattr(qwen2_5_vl.WindowTower, "_encode", encode)


def _positions_not_regrouped(monkeypatch: pytest.MonkeyPatch) -> None:
    original = qwen2_5_vl.WindowTower._encode

    def encode(self: Any, x: Tensor, rotary: Any, grids: Any, groups: Any) -> Encoding[Tensor]:
        order = self._windows(grids)[0].argsort()
        rows = (order[:, None] * 4 + torch.arange(4)).flatten()
        return original(self, x, type(rotary)(rotary.cos[rows], rotary.sin[rows]), grids, groups)

    monkeypatch.setattr(qwen2_5_vl.WindowTower, "_encode", encode)


def _no_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qwen2_5_vl.WindowTower, "_encode", VisionTower._encode)


def _silu_on_the_wrong_half(monkeypatch: pytest.MonkeyPatch) -> None:
    original = qwen2_5_vl.silu_and_mul
    monkeypatch.setattr(qwen2_5_vl, "silu_and_mul", lambda x: original(x.roll(x.shape[-1] // 2, -1)))


def _layer_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    original = qwen2_5_vl.RMSNorm.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        return original(self, x - x.mean(dim=-1, keepdim=True) if x.shape[-1] == 48 else x)

    monkeypatch.setattr(qwen2_5_vl.RMSNorm, "forward", forward)


CODE_MUTATIONS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "order of windows not undone": _order_not_undone,
    "rotary tables not in the order of windows": _positions_not_regrouped,
    "no windows": _no_windows,
    "silu on the wrong half": _silu_on_the_wrong_half,
    "layer norm for RMS norm": _layer_norm,
}
TOWER_MUTATIONS: dict[str, dict[str, Any]] = {
    "another window": {"window": 3},
    "another block with full attention": {"full_attention": frozenset({2})},
    "windows in every block": {"full_attention": frozenset()},
}


@pytest.mark.parametrize("mutation", CODE_MUTATIONS)
def test_mistakes_show(model: Any, model_dir: Path, mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    want = expected(model_dir, "two")
    CODE_MUTATIONS[mutation](monkeypatch)
    assert (run(model, model_dir, "two") - want).abs().max() > 5 * TOLERANCE


@pytest.mark.parametrize("mutation", TOWER_MUTATIONS)
def test_settings_matter(model: Any, model_dir: Path, mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in TOWER_MUTATIONS[mutation].items():
        monkeypatch.setattr(model.visual, key, value)
    assert difference(model, model_dir, "two") > 5 * TOLERANCE


def test_mrope_sections_matter(model: Any, model_dir: Path) -> None:
    text = dataclasses.replace(model.config.text, mrope_section=(3, 3, 2))
    mutant = qwen2_5_vl.Qwen2_5_VLForConditionalGeneration(dataclasses.replace(model.config, text=text)).eval()
    mutant.load_state_dict(model.state_dict())
    assert difference(mutant, model_dir, "two") > 5 * TOLERANCE
