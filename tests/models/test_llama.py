"""Plain decoders beside transformers: log-probabilities of every position, and mutations that must break the equality."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from sightline.config import EngineConfig
from sightline.engine.factory import build_core
from sightline.errors import CheckpointError, RequestError
from sightline.layers import normed, rotary
from sightline.models.config import Fields
from sightline.models.decoder import TEXT_DEFAULTS, RopeScaling, text_config
from sightline.prompt.pipeline import PromptPipeline
from sightline.types import EngineRequest, SamplingParams, TokenEvent, ids_to_bytes
from tests import llava_oracle, tiny, tiny_llava
from tests.models.harness import Harness, load

TOLERANCE = 1e-4
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES: dict[str, dict[str, Any]] = {
    "Llama": {"kind": "llama"},
    "Llama, tied": {"kind": "llama", "tied": True},
    "Llama 3.1": {"kind": "llama", "overrides": {"rope_parameters": LLAMA3}},
    "Llama, linear scaling": {
        "kind": "llama",
        "overrides": {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}},
    },
    "Llama with biases": {"kind": "llama", "overrides": {"attention_bias": True}},
    "Llama, a key head for each query head": {"kind": "llama", "overrides": {"num_key_value_heads": 4}},
    "Mistral": {"kind": "mistral"},
    "Mistral, wide heads": {"kind": "mistral", "overrides": {"head_dim": 24}},
    "Mistral, a window wider than the prompt": {"kind": "mistral", "overrides": {"sliding_window": 64}},
    "Qwen2": {"kind": "qwen2"},
    "Qwen2, tied": {"kind": "qwen2", "tied": True},
}


def ids(length: int = 60, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, tiny.NUM_TEXT_TOKENS, length)]


def run(model: Any, model_dir: Path, chunk: int | None = None) -> Tensor:
    harness = Harness(model)
    return harness.logprobs(harness.sequence(model_dir, ids()), chunk)


def difference(model: Any, model_dir: Path, chunk: int | None = None) -> float:
    return float((run(model, model_dir, chunk) - llava_oracle.logprobs(model_dir, ids())).abs().max())


@pytest.mark.parametrize("case", CASES)
def test_logprobs_equal_transformers(case: str) -> None:
    model_dir = tiny_llava.text(**CASES[case])
    assert difference(load(model_dir), model_dir) < TOLERANCE


@pytest.mark.parametrize("chunk", [1, 7, 16, 17])
@pytest.mark.parametrize("case", ["Llama 3.1", "Mistral", "Qwen2"])
def test_prefill_in_chunks(case: str, chunk: int) -> None:
    model_dir = tiny_llava.text(**CASES[case])
    assert difference(load(model_dir), model_dir, chunk) < TOLERANCE


@pytest.mark.parametrize("case", ["Llama 3.1", "Mistral", "Qwen2, tied"])
def test_the_engine_answers_like_generate(case: str) -> None:
    model_dir = tiny_llava.text(**CASES[case])
    core, _ = build_core(EngineConfig(model=str(model_dir), device="cpu"), model_dir, lambda progress: None)
    for n in range(2):
        sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        core.add(EngineRequest(request_id=str(n), input_ids=ids_to_bytes(ids(40 + 9 * n, n)), sampling=sampling))
    answers: dict[str, list[int]] = {"0": [], "1": []}
    left = 2
    while left:
        for event in core.step():
            if isinstance(event, TokenEvent):
                answers[event.request_id] += event.token_ids
                left -= event.finish_reason is not None
    for n in range(2):
        assert answers[str(n)] == llava_oracle.greedy(model_dir, ids(40 + 9 * n, n), [], 12)


def test_a_picture_is_refused_in_openais_words() -> None:
    pipeline = PromptPipeline(tiny_llava.text("llama"))
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(RequestError, match="image_url is only supported by certain models") as caught:
        asyncio.run(pipeline.chat([{"role": "user", "content": [part]}]))
    assert caught.value.status == 400
    answer = asyncio.run(pipeline.chat([{"role": "user", "content": [{"type": "text", "text": "hi"}]}]))
    assert answer.images == ()


# ---- configuration ----


def change(tmp_path: Path, source: Path, **changes: Any) -> Path:
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
    return folder


def test_files_of_2024(tmp_path: Path) -> None:
    source = tiny_llava.text(**CASES["Llama 3.1"])
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    folder = change(tmp_path, source, rope_parameters="absent", rope_theta=100.0, rope_scaling=scaling)
    assert (run(load(folder), folder) - llava_oracle.logprobs(source, ids())).abs().max() < TOLERANCE


@pytest.mark.parametrize("kind", tiny_llava.TEXT_CLASSES)
def test_defaults_are_those_of_transformers(kind: str) -> None:
    import transformers

    theirs = getattr(transformers, f"{tiny_llava.TEXT_CLASSES[kind]}Config")()
    mine = text_config(Fields({}), kind)
    for key in TEXT_DEFAULTS["llama"]:
        window = min(theirs.max_position_embeddings, getattr(theirs, "sliding_window", None) or 1 << 40)
        expected = window if key == "max_position_embeddings" else getattr(theirs, key)
        assert getattr(mine, key) == expected, key
    assert mine.num_key_value_heads == theirs.num_key_value_heads
    assert mine.rope_theta == 10000.0


def test_a_window_ends_the_context(tmp_path: Path) -> None:
    """Positions beyond it would attend differently: they are never computed."""
    source = tiny_llava.text("mistral", overrides={"sliding_window": 64})
    assert load(source).config.max_position_embeddings == 64
    assert load(tiny_llava.text("mistral")).config.max_position_embeddings == 4096
    folder = change(tmp_path, tiny_llava.text("qwen2"), sliding_window=64, use_sliding_window=False)
    assert load(folder).config.max_position_embeddings == 4096


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0, "factor": 2.0}}, "rope_type"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0, "factor": 2.0}}, "low_freq_factor"),
        ({"num_hidden_layers": "absent"}, "num_hidden_layers"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        load(change(tmp_path, tiny_llava.text("llama"), **changes))


# ---- mutations: each must break the equality ----

MUTATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "no scaling": ("Llama 3.1", {"rope_scaling": None}),
    "wrong factor": ("Llama 3.1", {"rope_scaling": RopeScaling(4.0, 1.0, 4.0, 64)}),
    "wrong ramp": ("Llama 3.1", {"rope_scaling": RopeScaling(8.0, 1.0, 2.0, 64)}),
    "linear for llama3": ("Llama 3.1", {"rope_scaling": RopeScaling(8.0)}),
    **{f"{kind}: rope theta": (kind, {"rope_theta": 1000.0}) for kind in ("Llama", "Mistral", "Qwen2")},
    **{f"{kind}: rms_norm_eps": (kind, {"rms_norm_eps": 1e-2}) for kind in ("Llama", "Mistral", "Qwen2")},
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_settings_matter(mutation: str) -> None:
    case, changes = MUTATIONS[mutation]
    model_dir = tiny_llava.text(**CASES[case])
    model = load(model_dir)
    config = dataclasses.replace(model.config, text=dataclasses.replace(model.config.text, **changes))
    mutant = type(model)(config).eval()
    mutant.load_state_dict(model.state_dict())
    assert difference(mutant, model_dir) > 20 * TOLERANCE


@pytest.mark.parametrize(("case", "part"), [("Qwen2", "qkv_proj"), ("Llama with biases", "o_proj")])
def test_biases_matter(case: str, part: str) -> None:
    model_dir = tiny_llava.text(**CASES[case])
    model = load(model_dir)
    for layer in model.model.layers:
        getattr(layer.self_attn, part).bias.zero_()
    assert difference(model, model_dir) > 20 * TOLERANCE


def _silu_on_the_wrong_half(monkeypatch: pytest.MonkeyPatch) -> None:
    original = normed.silu_and_mul
    monkeypatch.setattr(normed, "silu_and_mul", lambda x: original(x.roll(x.shape[-1] // 2, -1)))


def _turned_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    original = rotary.tables
    monkeypatch.setattr(rotary, "tables", lambda angles: original(-angles))


@pytest.mark.parametrize("mistake", [_silu_on_the_wrong_half, _turned_the_other_way])
@pytest.mark.parametrize("case", ["Llama", "Mistral", "Qwen2"])
def test_mistakes_show(case: str, mistake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model_dir = tiny_llava.text(**CASES[case])
    model = load(model_dir)
    mistake(monkeypatch)
    assert difference(model, model_dir) > 20 * TOLERANCE
