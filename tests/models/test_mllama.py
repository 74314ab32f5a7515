"""Llama 3.2 Vision beside transformers with Meta's semantics (see `tests.mllama_oracle`), and mutations that must fail."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sightline.attention.backend import ForwardContext
from sightline.attention.cross import CrossAttentionBatch, PictureGroup
from sightline.errors import CheckpointError
from sightline.models import Encoding, drain, mllama, mllama_vision
from sightline.models.decoder import RopeScaling
from tests import mllama_oracle, oracle, tiny_mllama
from tests.models.harness import PAGE_SIZE, Harness, load, make_batch

TOLERANCE = 1e-4
LAYOUTS: dict[str, dict[str, Any]] = {
    "v5 config, 2024 names": {},
    "2024 config and names, sharded": {"config": "2024", "shards": 3},
    "v5 config and names": {"names": "v5"},
    "embeddings for empty tiles": {"empty_tiles": "random"},
}
# Sizes of pictures by their number of tiles of 56 pixels.
ONE, TWO, THREE, FOUR = (50, 40), (110, 40), (40, 160), (112, 100)
# Sizes of the pictures, and the prompt: numbers are so many text tokens, "i" is the next picture.
PROMPTS: dict[str, tuple[list[tuple[int, int]], list[int | str]]] = {
    "text": ([], [40]),
    "one tile": ([ONE], [9, "i", 12]),
    "two tiles": ([TWO], ["i", 12]),
    "three tiles": ([THREE], [1, "i", 12]),
    "four tiles": ([FOUR], [9, "i", 12]),
    "two adjacent": ([TWO, ONE], [3, "i", "i", 20]),
    "two apart": ([FOUR, TWO], [3, "i", 5, "i", 20]),
    "three, two of them adjacent": ([ONE, THREE, TWO], ["i", 5, "i", "i", 7]),
    "turns": ([ONE, (45, 160), ONE], [17, "i", 9, 17, "i", 1, 30, "i", 2]),
    "picture at the end": ([TWO, ONE], [5, "i", 4, "i"]),
    "the same twice": ([FOUR, FOUR], [4, "i", 4, "i", 4]),
}


def prompt(name: str, seed: int = 0) -> tuple[list[int], list[Image.Image]]:
    sizes, parts = PROMPTS[name]
    pictures = [oracle.picture(w, h, seed=0 if "same" in name else i) for i, (w, h) in enumerate(sizes)]
    rng = np.random.default_rng(seed)
    ids = [tiny_mllama.BOS]
    for part in parts:
        if part == "i":
            ids.append(tiny_mllama.IMAGE)
        else:
            ids += rng.integers(0, tiny_mllama.NUM_TEXT_TOKENS, int(part)).tolist()
    return ids, pictures


@dataclass
class Sequence_:
    """One prompt, its pictures' keys and values, and how far it is."""

    ids: list[int]
    features: list[Tensor]
    pages: list[int] = field(default_factory=list)
    done: int = 0

    def seen(self, at: int) -> tuple[int, ...]:
        """Pictures that token `at` sees: from the last placeholder up to it, back over those that adjoin."""
        where = [i for i, token in enumerate(self.ids[: at + 1]) if token == tiny_mllama.IMAGE]
        if not where:
            return ()
        first = len(where) - 1
        while first and where[first - 1] == where[first] - 1:
            first -= 1
        return tuple(range(first, len(where)))


class MllamaHarness(Harness):
    """`Harness` with pictures beside the text, told row by row what they see. split: rows of each sequence's output."""

    split: Callable[[list[int]], list[int]] = staticmethod(lambda lengths: lengths)

    @torch.inference_mode()
    def sequence(self, model_dir: Path, ids: Sequence[int], pictures: Sequence[Image.Image] = ()) -> Any:
        inputs = [mllama_oracle.tiles(model_dir, picture) for picture in pictures]
        features = self.model.encode_images([torch.from_numpy(x) for x, _ in inputs], [grid for _, grid in inputs])
        return Sequence_(list(ids), features)

    @torch.inference_mode()
    def step(self, work: Sequence[tuple[Any, int]]) -> list[Tensor]:
        ids: list[int] = []
        positions: list[int] = []
        groups: list[PictureGroup] = []
        rows: list[int] = []
        for seq, q_len in work:
            end = seq.done + q_len
            while len(seq.pages) * PAGE_SIZE < end:
                seq.pages.append(int(self.free.pop()))
            for at in range(seq.done, end):
                if seen := seq.seen(at):
                    rows.append(len(ids) + at - seq.done)
                    groups.append(PictureGroup(1, tuple(seq.features[i] for i in seen)))
            ids += seq.ids[seq.done : end]
            positions += range(seq.done, end)
            seq.done = end
        q_lens = [q_len for _, q_len in work]
        batch = make_batch(q_lens, [seq.done for seq, _ in work], [seq.pages for seq, _ in work])
        self.backend.prepare(batch)
        cross = CrossAttentionBatch(torch.tensor(rows), groups) if rows else None
        hidden = self.model.embed(torch.tensor(ids))
        hidden = self.model(hidden, torch.tensor(positions), ForwardContext(self.backend, self.cache, batch, cross))
        return list(torch.log_softmax(self.model.logits(hidden), dim=-1).split(self.split(q_lens)))


def run(model: Any, model_dir: Path, name: str, chunk: int | None = None) -> Tensor:
    ids, pictures = prompt(name)
    harness = MllamaHarness(model)
    return harness.logprobs(harness.sequence(model_dir, ids, pictures), chunk)


def difference(model: Any, model_dir: Path, name: str, chunk: int | None = None) -> float:
    """Largest distance of a log-probability from the judge's."""
    expected = mllama_oracle.logprobs(model_dir, *prompt(name))
    return float((run(model, model_dir, name, chunk) - expected).abs().max())


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return tiny_mllama.mllama()


@pytest.fixture(scope="module")
def model(model_dir: Path) -> Any:
    return load(model_dir)


# ---- equality ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PROMPTS)
def test_logprobs_equal_the_judge(layout: str, name: str) -> None:
    model_dir = tiny_mllama.mllama(**LAYOUTS[layout])
    assert difference(load(model_dir), model_dir, name) < TOLERANCE


@pytest.mark.parametrize("chunk", [1, 2, 5, 16, 17])
@pytest.mark.parametrize("name", ["three, two of them adjacent", "turns"])
def test_prefill_in_chunks(model: Any, model_dir: Path, name: str, chunk: int) -> None:
    assert difference(model, model_dir, name, chunk) < TOLERANCE


def test_batched_with_strangers(model: Any, model_dir: Path) -> None:
    """Decode rows, chunks and whole prompts, with and without pictures, in one step; each gets what it gets alone."""
    harness = MllamaHarness(model)
    prompts = [prompt(name, seed) for seed, name in enumerate(PROMPTS)]
    sequences = [harness.sequence(model_dir, ids, pictures) for ids, pictures in prompts]
    rng = np.random.default_rng(0)
    got: list[list[Tensor]] = [[] for _ in sequences]
    while work := [(i, len(s.ids) - s.done) for i, s in enumerate(sequences) if s.done < len(s.ids)]:
        sizes = sorted(((i, min(left, int(rng.integers(1, 12)))) for i, left in work), key=lambda w: w[1] > 1)
        for (i, _), lp in zip(sizes, harness.step([(sequences[i], n) for i, n in sizes]), strict=True):
            got[i].append(lp)
    for parts, (ids, pictures) in zip(got, prompts, strict=True):
        assert (torch.cat(parts) - mllama_oracle.logprobs(model_dir, ids, pictures)).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["text", "one tile", "two adjacent", "turns"])
def test_greedy_decoding(model: Any, model_dir: Path, name: str) -> None:
    ids, pictures = prompt(name)
    harness = MllamaHarness(model)
    new = harness.greedy(harness.sequence(model_dir, ids, pictures), 12)
    assert new == mllama_oracle.greedy(model_dir, ids, pictures, 12)
    assert len(set(new)) > 4, "the tiny model says the same all the time: its test proves little"


@pytest.mark.parametrize("empty_tiles", ["zero", "random"])
def test_vision_states_equal_the_judge(empty_tiles: str) -> None:
    """Every aspect ratio, alone and in one batch: with tables that allow the short form, and with such that do not."""
    model_dir = tiny_mllama.mllama(empty_tiles=empty_tiles)
    tower = load(model_dir).vision_model
    sizes = [ONE, TWO, (165, 40), (230, 40), (40, 110), FOUR, THREE, (40, 230), (1, 1), (56, 56), (1, 300)]
    pictures = [oracle.picture(w, h, i) for i, (w, h) in enumerate(sizes)]
    inputs = [mllama_oracle.tiles(model_dir, picture) for picture in pictures]
    assert {grid[0] for _, grid in inputs} == set(range(1, 9))
    with torch.inference_mode():
        states = drain(tower([torch.from_numpy(x) for x, _ in inputs], [grid for _, grid in inputs]))
    for got, picture in zip(states, pictures, strict=True):
        torch.testing.assert_close(got, mllama_oracle.vision_states(model_dir, picture), atol=5e-5, rtol=1e-5)
    short = {grid[1] * grid[2] for _, grid in inputs if tower._shortened(grid[0], grid[1] * grid[2])}
    assert short == ({1, 2} if empty_tiles == "zero" else set())


@pytest.mark.parametrize("last", [[1, 4], [1, 3]], ids=["cross-attention last", "self-attention last"])
def test_only_wanted_rows_come_back(last: list[int]) -> None:
    model_dir = tiny_mllama.mllama(text={"cross_attention_layers": last})
    model = load(model_dir)
    ids, pictures = prompt("two apart")
    wanted = [0, 3, 9, len(ids) - 1]
    forward = model.forward
    model.forward = lambda *args: forward(*args, torch.tensor(wanted))
    harness = MllamaHarness(model)
    seq = harness.sequence(model_dir, ids, pictures)
    harness.split = lambda lengths: [len(wanted)]
    got = torch.cat(harness.step([(seq, len(ids))]))
    assert (got - mllama_oracle.logprobs(model_dir, ids, pictures)[wanted]).abs().max() < TOLERANCE


def test_pictures_change_the_answer_and_only_what_follows(model_dir: Path) -> None:
    ids, pictures = prompt("one tile")
    others = [oracle.picture(*ONE, seed=9)]
    first, second = (mllama_oracle.logprobs(model_dir, ids, p) for p in (pictures, others))
    assert (first[:10] - second[:10]).abs().max() == 0.0
    assert (first[10:] - second[10:]).abs().amax(dim=-1).min() > 0.05


def test_keys_and_values_are_what_is_kept(model: Any, model_dir: Path) -> None:
    """Cross layers and real tiles only: the numbers that the vision cache is told, and no more."""
    for size, tiles in ((ONE, 1), (TWO, 2), (THREE, 3), (FOUR, 4)):
        pixels, grid = mllama_oracle.tiles(model_dir, oracle.picture(*size))
        (kept,) = model.encode_images([torch.from_numpy(pixels)], [grid])
        assert tuple(kept.shape) == (2, 2, tiles * tiny_mllama.TOKENS_PER_TILE, 2, 16)
        assert model.num_features(grid) * model.feature_width == kept.numel()
    assert model.encode_images([], []) == []
    assert model.kv_spec.num_layers == 3


def test_bytes_of_a_picture_in_the_release() -> None:
    """11B in bfloat16: 52 MB for each tile."""
    text = {"vocab_size": 128256, "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38]}
    vision = {"image_size": 560}
    config = mllama.MllamaConfig.from_hf({"text_config": text, "vision_config": vision}, {})
    with torch.device("meta"):
        model = mllama.MllamaForConditionalGeneration(config)
    assert model.kv_spec == (32, 8, 128)
    sizes = [model.num_features(grid) * model.feature_width * 2 for grid in ((1, 1, 1), (2, 1, 2), (6, 2, 2))]
    assert sizes == [52_461_568, 104_923_136, 209_846_272]


def test_bfloat16_is_near(model_dir: Path) -> None:
    model = load(model_dir, dtype=torch.bfloat16)
    expected = mllama_oracle.logprobs(model_dir, *prompt("two apart"))
    assert (run(model, model_dir, "two apart") - expected).abs().mean() < 0.15


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("text_config", "cross_attention_layers", [1, 9], "cross_attention_layers is"),
        ("text_config", "hidden_act", "gelu", "hidden_act is 'gelu'"),
        ("text_config", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1.0}, "rope_type is 'yarn'"),
        ("vision_config", "vision_output_dim", 48, "vision_output_dim is 48"),
        ("vision_config", "supported_aspect_ratios", [[1, 1], [2, 1]], "supported_aspect_ratios is"),
        ("vision_config", "image_size", 70, "image_size is 70"),
        ("vision_config", "intermediate_layers_indices", [1, 2, 4], "intermediate_layers_indices is"),
    ],
)
def test_settings_that_matter_are_read_strictly(
    model_dir: Path, section: str, key: str, value: Any, message: str
) -> None:
    config, preprocessor = (
        json.loads((model_dir / f"{name}.json").read_text()) for name in ("config", "preprocessor_config")
    )
    config[section][key] = value
    with pytest.raises(CheckpointError, match=message):
        mllama.MllamaConfig.from_hf(config, preprocessor)


# ---- mutations: each a mistake that somebody has made, applied to our side; the equality must break ----


def _config(model: Any, **changes: Any) -> Any:
    """The model again with other settings and the same weights."""
    parts = {}
    for part in ("text", "vision"):
        old = getattr(model.config, part)
        parts[part] = dataclasses.replace(old, **{k: v for k, v in changes.items() if hasattr(old, k)})
    mutant = mllama.MllamaForConditionalGeneration(dataclasses.replace(model.config, **parts)).eval()
    mutant.load_state_dict(model.state_dict())
    return mutant


def _states_after_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers since 4.56."""

    class Last(torch.nn.Module):
        def forward(self, x: Tensor, *rest: Any) -> Tensor:
            return x

    original = mllama_vision.VisionEncoder.forward

    def forward(self: Any, x: Tensor, num_own: int, key_bias: Any, keep: Sequence[int] = ()) -> Any:
        shifted = torch.nn.Module()
        shifted.layers = [*self.layers, Last()]
        return original(shifted, x, num_own, key_bias, [i + 1 for i in keep])

    monkeypatch.setattr(mllama_vision.VisionEncoder, "forward", forward)


def _states_not_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    original = mllama_vision.VisionTower._encode

    def encode(self: Any, *args: Any) -> Encoding[Tensor]:
        x = yield from original(self, *args)
        width = self.config.hidden_size
        kept = x[..., width:].unflatten(-1, (width, -1)).transpose(-1, -2).flatten(-2)
        return torch.cat((x[..., :width], kept), dim=-1)

    monkeypatch.setattr(mllama_vision.VisionTower, "_encode", encode)


def _padding_invisible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty tiles and padding rows masked from everybody, as anyone would expect."""
    original = mllama_vision.VisionAttention.forward

    def forward(self: Any, x: Tensor, num_own: int, key_bias: Any) -> Tensor:
        own = original(self, x[:, :num_own], num_own, None)
        return torch.cat((own, torch.zeros_like(x[:, num_own:])), dim=1)

    monkeypatch.setattr(mllama_vision.VisionAttention, "forward", forward)


def _padding_unmasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No mask at all."""
    original = mllama_vision.VisionAttention.forward

    def forward(self: Any, x: Tensor, num_own: int, key_bias: Any) -> Tensor:
        return original(self, x, x.shape[1], key_bias)

    monkeypatch.setattr(mllama_vision.VisionAttention, "forward", forward)


def _one_for_all_padding_unweighted(monkeypatch: pytest.MonkeyPatch) -> None:
    original = mllama_vision.VisionAttention.forward

    def forward(self: Any, x: Tensor, num_own: int, key_bias: Any) -> Tensor:
        return original(self, x, num_own, None)

    monkeypatch.setattr(mllama_vision.VisionAttention, "forward", forward)


def _every_picture_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """No end of a picture's reach."""
    original = Sequence_.seen
    monkeypatch.setattr(Sequence_, "seen", lambda self, at: tuple(range(max(original(self, at), default=-1) + 1)))


def _only_the_last_picture_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adjoining pictures treated like separate ones."""
    original = Sequence_.seen
    monkeypatch.setattr(Sequence_, "seen", lambda self, at: original(self, at)[-1:])


def _pictures_seen_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text before the first picture looks at it."""
    original = Sequence_.seen
    monkeypatch.setattr(Sequence_, "seen", lambda self, at: original(self, at) or (0,))


def _placeholder_blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture visible only behind its placeholder."""
    original = Sequence_.seen
    monkeypatch.setattr(Sequence_, "seen", lambda self, at: original(self, at - 1) if at else ())


def _keys_not_normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(self: Any, states: Tensor, out: Tensor) -> None:
        out.copy_(self.kv_proj(states).view(-1, 2, self.num_kv_heads, self.head_dim).transpose(0, 1))

    monkeypatch.setattr(mllama.CrossAttention, "encode", encode)


def _mlp_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The MLP of a cross layer applied to rows that see nothing."""
    original = mllama.CrossAttentionLayer.forward

    def forward(self: Any, hidden: Tensor, rotary: Any, ctx: ForwardContext, rows: Any = None) -> Tensor:
        blind = hidden + self.cross_attn_mlp_gate.tanh() * (
            self.mlp(hidden.clone(), self.post_attention_layernorm) - hidden
        )
        assert ctx.cross is not None
        return ctx.cross.scatter(blind, ctx.cross.gather(original(self, hidden, rotary, ctx)))

    monkeypatch.setattr(mllama.CrossAttentionLayer, "forward", forward)


def _gates_without_tanh(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, hidden: Tensor, rotary: Any, ctx: ForwardContext, rows: Any = None) -> Tensor:
        assert ctx.cross is not None
        x = ctx.cross.gather(hidden)
        x = x + self.cross_attn(self.input_layernorm(x), ctx) * self.cross_attn_attn_gate
        mlp = self.mlp(x.clone(), self.post_attention_layernorm) - x
        x = x + mlp * self.cross_attn_mlp_gate
        return ctx.cross.scatter(hidden, x)

    monkeypatch.setattr(mllama.CrossAttentionLayer, "forward", forward)


CONFIG_MUTATIONS: dict[str, dict[str, Any]] = {
    "intermediate layers off by one": {"intermediate_layers": (0, 1, 2)},
    "rope without scaling": {"rope_scaling": None},
    "rope scaled for another length": {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 128)},
    "tanh gelu for gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "mean of SigLIP": {"image_mean": (0.5, 0.5, 0.5)},
    "deviation of SigLIP": {"image_std": (0.5, 0.5, 0.5)},
    "rms_norm_eps": {"rms_norm_eps": 1e-2},
}
CODE_MUTATIONS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "intermediate states after their layers": _states_after_layers,
    "intermediate states one behind the other": _states_not_interleaved,
    "padding of the tower invisible": _padding_invisible,
    "padding of the tower unmasked": _padding_unmasked,
    "one padding row for all, unweighted": _one_for_all_padding_unweighted,
    "pictures visible for ever": _every_picture_visible,
    "only the last of adjoining pictures visible": _only_the_last_picture_visible,
    "pictures visible to the text before": _pictures_seen_by_all,
    "placeholder sees nothing": _placeholder_blind,
    "keys without norm": _keys_not_normalised,
    "MLP of cross layers for rows that see nothing": _mlp_for_all_rows,
    "gates without tanh": _gates_without_tanh,
}


@pytest.mark.parametrize("mutation", CONFIG_MUTATIONS)
def test_settings_matter(model: Any, model_dir: Path, mutation: str) -> None:
    mutant = _config(model, **CONFIG_MUTATIONS[mutation])
    assert difference(mutant, model_dir, "turns") > 5 * TOLERANCE


@pytest.mark.parametrize("mutation", CODE_MUTATIONS)
def test_mistakes_show(model: Any, model_dir: Path, mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["three, two of them adjacent", "two adjacent"]
    expected = [mllama_oracle.logprobs(model_dir, *prompt(name)) for name in names]
    CODE_MUTATIONS[mutation](monkeypatch)
    errors = [(run(model, model_dir, n) - want).abs().max() for n, want in zip(names, expected, strict=True)]
    assert max(errors) > 5 * TOLERANCE
