"""The LLaVA family beside transformers: log-probabilities of every position in every layout.

Mistakes that must show are in `test_llava_mutations`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sightline import Engine, SamplingParams
from sightline.errors import CheckpointError
from sightline.models import llava
from sightline.prompt.llava import LlavaProcessor
from sightline.prompt.pipeline import PromptPipeline
from sightline.prompt.processor import render
from tests import llava_oracle, oracle, tiny, tiny_llava
from tests.models.harness import Harness, load

# transformers' own float32 differs from itself in float64 by about half of this
TOLERANCE = 2e-4
KINDS: dict[str, dict[str, Any]] = {
    "LLaVA 1.5": {"kind": "llava", "text": "llama"},
    "LLaVA 1.5, padded": {"kind": "llava", "text": "llama", "pad": True},
    "NeXT, Llama": {"kind": "next", "text": "llama"},
    "NeXT, Mistral": {"kind": "next", "text": "mistral"},
    "NeXT, Qwen": {"kind": "next", "text": "qwen2"},
    "OneVision": {"kind": "onevision", "text": "qwen2"},
    "OneVision, tied": {"kind": "onevision", "text": "qwen2", "tied": True},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "v5 config, 2024 names": {},
    "2024 config and names": {"config": "2024"},
    "v5 config and names": {"names": "v5"},
    "authors'": {"layout": "original"},
    "authors', tower beside": {"layout": "original", "tower": "beside"},
}
# Sizes of the pictures, and the prompt: numbers are so many text tokens, "i" is the next picture.
PROMPTS: dict[str, tuple[list[tuple[int, int]], list[int | str]]] = {
    "text": ([], [40]),
    "one": ([(100, 150)], [9, "i", 12]),
    "one large": ([(400, 300)], ["i", 12]),
    "one thin": ([(15, 290)], [2, "i", 12]),
    "two": ([(100, 150), (220, 60)], [3, "i", "i", 20]),
    "three": ([(64, 64), (300, 40), (90, 90)], ["i", 5, "i", 1, "i", 7]),
    "interleaved": ([(56, 84), (84, 56), (56, 84)], [17, "i", 2, "i", 17, "i", 1]),
    "the same twice": ([(70, 70), (70, 70)], [4, "i", 4, "i", 4]),
}


def prompt(name: str, placeholder: int = tiny_llava.IMAGE, seed: int = 0) -> tuple[list[int], list[Image.Image]]:
    """ids with one placeholder for each picture, and the pictures."""
    sizes, parts = PROMPTS[name]
    pictures = [oracle.picture(w, h, seed=0 if "same" in name else i) for i, (w, h) in enumerate(sizes)]
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    for part in parts:
        ids += [placeholder] if part == "i" else rng.integers(0, tiny.NUM_TEXT_TOKENS, int(part)).tolist()
    return ids, pictures


def run(model: Any, model_dir: Path, name: str, chunk: int | None = None) -> tuple[Tensor, list[int]]:
    """Our log-probabilities [L, vocab], and the expanded prompt with transformers' placeholders."""
    placeholder = LlavaProcessor(model_dir).image_token_id
    harness = Harness(model)
    sequence = harness.sequence(model_dir, *prompt(name, placeholder))
    ids = [tiny_llava.IMAGE if i == placeholder else i for i in sequence.ids]
    return harness.logprobs(sequence, chunk), ids


def difference(model: Any, model_dir: Path, name: str, chunk: int | None = None, judge: Path | None = None) -> float:
    """Largest distance of a log-probability from transformers'. judge: the same weights in transformers' layout."""
    got, ids = run(model, model_dir, name, chunk)
    return float((got - llava_oracle.logprobs(judge or model_dir, ids, prompt(name)[1])).abs().max())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_equal_transformers(kind: str, layout: str) -> None:
    model_dir = tiny_llava.llava(**KINDS[kind], **LAYOUTS[layout])
    model = load(model_dir)
    for name in PROMPTS:
        assert difference(model, model_dir, name, judge=tiny_llava.llava(**KINDS[kind])) < TOLERANCE, name


@pytest.mark.parametrize("chunk", [1, 3, 16, 17, 50])
@pytest.mark.parametrize("kind", ["LLaVA 1.5", "NeXT, Mistral", "OneVision"])
def test_prefill_in_chunks(kind: str, chunk: int) -> None:
    model_dir = tiny_llava.llava(**KINDS[kind])
    model = load(model_dir)
    for name in ("one large", "interleaved"):
        assert difference(model, model_dir, name, chunk) < TOLERANCE, name


@pytest.mark.parametrize("kind", ["LLaVA 1.5", "NeXT, Llama", "OneVision"])
def test_batched_with_strangers(kind: str) -> None:
    """Decode rows, chunks and whole prompts in one step; each gets what it gets alone."""
    model_dir = tiny_llava.llava(**KINDS[kind])
    harness = Harness(load(model_dir))
    prompts = [prompt(name, seed=seed) for seed, name in enumerate(PROMPTS)]
    sequences = [harness.sequence(model_dir, ids, pictures) for ids, pictures in prompts]
    expected = [llava_oracle.logprobs(model_dir, s.ids, p) for s, (_, p) in zip(sequences, prompts, strict=True)]
    rng = np.random.default_rng(0)
    got: list[list[Tensor]] = [[] for _ in sequences]
    while work := [(i, len(s.ids) - s.done) for i, s in enumerate(sequences) if s.done < len(s.ids)]:
        sizes = sorted(((i, min(left, int(rng.integers(1, 40)))) for i, left in work), key=lambda w: w[1] > 1)
        for (i, _), lp in zip(sizes, harness.step([(sequences[i], n) for i, n in sizes]), strict=True):
            got[i].append(lp)
    for parts, want in zip(got, expected, strict=True):
        assert (torch.cat(parts) - want).abs().max() < TOLERANCE


@pytest.mark.parametrize("kind", ["LLaVA 1.5", "NeXT, Llama", "OneVision"])
def test_features_equal_transformers(kind: str) -> None:
    """Of a batch of pictures of several sizes, nearer than log-probabilities can tell."""
    model_dir = tiny_llava.llava(**KINDS[kind])
    model, mine = load(model_dir), LlavaProcessor(model_dir)
    pictures = [oracle.picture(w, h, seed=i) for i, (w, h) in enumerate([(100, 150), (400, 300), (15, 290), (60, 60)])]
    plans = [mine.plan(*p.size) for p in pictures]
    pixels = [torch.from_numpy(render(p, mine.views(p.size, plan))) for p, plan in zip(pictures, plans, strict=True)]
    with torch.inference_mode():
        got = model.encode_images(pixels, [plan.grid for plan in plans])
    for features, plan, picture in zip(got, plans, pictures, strict=True):
        assert features.shape == (plan.num_tokens, 64)
        with torch.no_grad():
            out = llava_oracle.load(model_dir).model.get_image_features(**llava_oracle.preprocess(model_dir, [picture]))
        expected = torch.cat([part.reshape(-1, 64) for part in out.pooler_output])
        torch.testing.assert_close(features, expected, atol=3e-5, rtol=1e-5)
        mutant = dataclasses.replace(model.config, projector_act="gelu_pytorch_tanh")
    other = llava.LlavaForConditionalGeneration(mutant).eval()
    other.load_state_dict(model.state_dict())
    with torch.inference_mode():
        changed = other.encode_images(pixels[:1], [plans[0].grid])[0]
    assert (changed - got[0]).abs().max() > 1e-4
    assert model.encode_images([], []) == []


@pytest.mark.parametrize("kind", ["LLaVA 1.5", "NeXT, Mistral", "OneVision"])
def test_bfloat16_is_near(kind: str) -> None:
    model_dir = tiny_llava.llava(**KINDS[kind])
    got, ids = run(load(model_dir, dtype=torch.bfloat16), model_dir, "one")
    assert (got - llava_oracle.logprobs(model_dir, ids, prompt("one")[1])).abs().mean() < 0.2


def test_pictures_change_the_answer() -> None:
    for kind in KINDS.values():
        model_dir = tiny_llava.llava(**kind)
        _, ids = run(load(model_dir), model_dir, "one")
        a, b = (llava_oracle.logprobs(model_dir, ids, [oracle.picture(100, 150, seed=s)])[-1] for s in (0, 9))
        assert (a - b).abs().max() > 0.1


# ---- through the engine ----


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("LLaVA 1.5", {}),
        ("LLaVA 1.5, padded", {"layout": "original", "tower": "beside"}),
        ("NeXT, Mistral", {"names": "v5"}),
        ("NeXT, Llama", {"layout": "original"}),
        ("OneVision", {}),
        ("OneVision", {"layout": "original"}),
    ],
)
def test_the_engine_answers_like_generate(kind: str, layout: dict[str, Any]) -> None:
    """Conversations of all sorts at once, in chunks, and a second time from the caches."""
    model_dir, judge = tiny_llava.llava(**KINDS[kind], **layout), tiny_llava.llava(**KINDS[kind])
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    with Engine(model=str(model_dir), device="cpu", chunked_prefill_size=64) as engine:
        placeholder = LlavaProcessor(model_dir).image_token_id
        expected = []
        for messages in conversations():
            rendered = asyncio.run(PromptPipeline(model_dir, allow_local=True).chat(messages))
            ids = [tiny_llava.IMAGE if i == placeholder else int(i) for i in rendered.input_ids]
            assert ids.count(tiny_llava.IMAGE) == rendered.num_image_tokens
            pictures = [
                part["image"] for m in messages for part in m["content"] if isinstance(part, dict) and "image" in part
            ]
            expected.append(llava_oracle.greedy(judge, ids, pictures, 8))
        for _ in range(2):
            outputs = engine.chat(conversations(), sampling)
            assert [output.outputs[0].token_ids for output in outputs] == expected
        # a penalty looks at the prompt's ids, of which the placeholder's may be beyond the vocabulary
        penalty = msgspec.structs.replace(sampling, repetition_penalty=1.3)
        assert len(engine.chat(conversations()[1], penalty).outputs[0].token_ids) == 8


def conversations() -> list[list[dict[str, Any]]]:
    """Without pictures, with one, with three between words, of several turns."""

    def user(*parts: Any) -> dict[str, Any]:
        content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
        return {"role": "user", "content": content}

    a, b, c = (oracle.picture(w, h, seed=i) for i, (w, h) in enumerate([(100, 150), (300, 60), (400, 300)]))
    reply = {"role": "assistant", "content": "A red square."}
    return [
        [user("How many shapes are there?")],
        [user(a, "What is in this picture?")],
        [user("First", a, "then", b, "and", c, "which is red?")],
        [user(c, "Describe the image."), reply, user("Are you sure?")],
        [user(a, "What is it?"), reply, user(b, "And this?")],
    ]


# ---- loading ----


def change(tmp_path: Path, source: Path, file: str = "config.json", **changes: Any) -> Path:
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    config = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))
    return folder


def test_a_tower_that_is_nowhere(tmp_path: Path) -> None:
    source = tiny_llava.llava("llava", layout="original", tower="beside")
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    shutil.rmtree(folder / "clip-tiny")
    with pytest.raises(CheckpointError, match="somebody/clip-tiny"):
        load(folder)
    # beside the checkpoint it is found, but must be whole
    shutil.copytree(source / "clip-tiny", tmp_path / "clip-tiny")
    judge = tiny_llava.llava("llava")
    assert difference(load(folder), folder, "one", judge=judge) < TOLERANCE
    (tmp_path / "clip-tiny" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        load(folder)


def test_weights_of_a_known_tower_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The released 1.5: its tower is known by name, and still its weights are needed."""
    folder = Path(shutil.copytree(tiny_llava.llava("llava", layout="original", tower="beside"), tmp_path / "model"))
    shutil.rmtree(folder / "clip-tiny")
    monkeypatch.setitem(llava._TOWERS, "clip-tiny", tiny_llava.vision_config("llava"))
    with pytest.raises(
        CheckpointError, match=r"those of somebody/clip-tiny. Put that checkpoint's folder .* hub cache"
    ):
        load(folder)


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("next", {"vision_feature_layer": [-2, -1]}, "vision_feature_layer"),
        ("next", {"vision_feature_layer": -7}, "num_hidden_layers"),
        ("next", {"vision_feature_select_strategy": "full"}, "class token"),
        ("onevision", {"vision_feature_select_strategy": "default"}, "class token"),
        ("onevision", {"vision_aspect_ratio": "anyres_max_x"}, "vision_aspect_ratio"),
        ("next", {"projector_hidden_act": "tanh"}, "projector_hidden_act"),
        ("next", {"vision_config": "absent"}, "vision_config"),
        ("next", {"text_config": {"model_type": "gemma"}}, "model_type"),
        ("next", {"quantization_config": {"quant_method": "awq"}}, "awq"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, kind: str, changes: dict[str, Any], named: str) -> None:
    source = tiny_llava.llava(kind, text="qwen2" if kind == "onevision" else "llama")
    with pytest.raises(CheckpointError, match=named):
        load(change(tmp_path, source, **changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type"),
        ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type"),
        ({"image_aspect_ratio": "highres"}, "mm_patch_merge_type"),
        ({"mm_vision_tower": "absent"}, "mm_vision_tower"),
        ({"mm_vision_select_layer": "absent"}, "mm_vision_select_layer"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
    ],
)
def test_what_is_not_supported_of_the_authors_is_named(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        load(change(tmp_path, tiny_llava.llava("next", layout="original"), **changes))
