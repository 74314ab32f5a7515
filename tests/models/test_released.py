"""The releases' own sizes: every tensor has its slot and every picture its place, without a byte of weights."""

from __future__ import annotations

import asyncio
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sightline.layers.parameter import collect_slots
from sightline.models.loader import architecture, read_config
from sightline.prompt.pipeline import PromptPipeline
from sightline.prompt.processor import load_processor
from sightline.registry import FAMILIES
from tests import oracle, released
from tests.gpu import dummy_models

TRANSFORMERS_LAYOUT = [kind for kind in released.RELEASES if "authors" not in kind]
# Parameters in millions, as the model cards have them, and tokens of a picture of 1024 x 1024.
SIZES = {
    "qwen2-vl-2b": (2209, 1369),
    "qwen2-vl-7b": (8291, 1369),
    "qwen2.5-vl-7b": (8292, 1369),
    "llama-3.2-11b-vision": (10670, 1),
    "llava-1.5-7b": (7063, 576),
    "llava-next-vicuna-7b": (7063, 2928),
    "llava-next-mistral-7b": (7567, 2928),
    "llava-next-llama3-8b": (8355, 2928),
    "llava-onevision-7b": (8030, 7371),
    "llava-1.5-7b, authors'": (7063, 576),
    "llava-onevision-7b, authors'": (8030, 7371),
}


def meta_model(folder: Path) -> Any:
    config = read_config(folder)
    module, _, name = FAMILIES[architecture(config)].model.partition(":")
    model_class = getattr(importlib.import_module(module), name)
    with torch.device("meta"):
        return model_class(model_class.config_class.from_hf(config, {}))


@pytest.mark.parametrize("kind", TRANSFORMERS_LAYOUT)
def test_every_tensor_has_its_slot(kind: str, tmp_path: Path) -> None:
    import transformers

    (tmp_path / "config.json").write_text(json.dumps(released.RELEASES[kind].config))
    model = meta_model(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        theirs = getattr(transformers, config.architectures[0])(config)
    slots = {name: slot.shape for name, slot in collect_slots(model).items()}
    found = {model.map_name(name): tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    found.pop(None, None)
    assert found == slots
    if "llava" in kind:
        # the last layer of CLIP is not used
        assert model.config.vision.num_layers == (26 if "onevision" in kind else 23)


@pytest.mark.parametrize("kind", released.RELEASES)
def test_size_and_prompt(kind: str, tmp_path: Path) -> None:
    released.write(kind, tmp_path)
    millions, tokens = SIZES[kind]
    assert sum(p.numel() for p in meta_model(tmp_path).parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    mine = PromptPipeline(tmp_path, allow_local=True)
    content = [{"type": "image", "image": oracle.picture(1024, 1024)}, {"type": "text", "text": "What?"}]
    prompt = asyncio.run(mine.chat([{"role": "user", "content": content}]))
    assert prompt.num_image_tokens == tokens
    bos = released.RELEASES[kind].bos
    if bos is not None:
        assert prompt.input_ids[0] == mine.tokenizer.token_to_id(bos) not in prompt.input_ids[1:]


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        ("qwen2-vl-7b", 324),
        ("qwen2.5-vl-7b", 324),
        ("llava-1.5-7b", 576),
        ("llava-next-mistral-7b", 576),
        ("llava-onevision-7b", 730),
        ("llama-3.2-11b-vision", 1),
    ],
)
def test_what_detail_means(kind: str, tokens: int, tmp_path: Path) -> None:
    """The table of docs/pictures-and-tokens.md."""
    released.write(kind, tmp_path)
    processor = load_processor(FAMILIES[architecture(read_config(tmp_path))].processor, tmp_path)
    assert processor is not None
    own, low = processor.plan(1600, 1600), processor.plan(1600, 1600, processor.limits_for("low"))
    assert low.num_tokens == tokens
    if kind != "llava-1.5-7b":
        assert low.grid[1] * low.grid[2] < own.grid[1] * own.grid[2]
    for detail in ("auto", "high", "original"):
        assert processor.plan(1600, 1600, processor.limits_for(detail)) == own


def test_the_script_for_full_sizes_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tests/gpu/dummy_models.py`, on a release made small."""
    text = {"hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "vocab_size": 151936, "tie_word_embeddings": True}  # fmt: skip
    small = released._qwen2_vl(text)
    small.config["vision_config"] |= {"depth": 1, "embed_dim": 64, "num_heads": 2}
    monkeypatch.setitem(released.RELEASES, "small", small)
    line = dummy_models.measure("small", "cpu", {"max_total_tokens": 2048, "context_length": 2048})
    assert line["answer_tokens"] == 64
    assert line["image_tokens"] == 391
    assert line["cached_tokens"] > 391
    assert line["weights_gib"] == 0.07
    assert line["kv_bytes_per_token"] == 512
