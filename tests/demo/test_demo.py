"""The model in the box as files: complete, small, readable, and every golden answer with its pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer

from sightline import demo

FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
)
TOKENIZER = Tokenizer.from_file(str(demo.model_path() / "tokenizer.json"))


def pictures(entry: demo.Golden) -> list[Path]:
    parts = [p for m in entry.messages if not isinstance(m["content"], str) for p in m["content"]]
    return [Path(p["image"]) for p in parts if p["type"] == "image"]


@pytest.mark.parametrize("name", FILES)
def test_the_folder_is_complete(name: str) -> None:
    assert (demo.model_path() / name).stat().st_size > 0


def test_the_whole_demo_fits_into_twelve_megabytes() -> None:
    size = sum(f.stat().st_size for f in Path(demo.__file__).parent.rglob("*") if f.suffix != ".pyc" and f.is_file())
    assert size <= 12_000_000


def test_config_and_tokenizer_agree() -> None:
    config = json.loads((demo.model_path() / "config.json").read_text())
    assert config["architectures"] == ["Qwen2VLForConditionalGeneration"]
    assert config["vocab_size"] >= TOKENIZER.get_vocab_size()
    assert config["image_token_id"] == TOKENIZER.token_to_id("<|image_pad|>")
    assert config["eos_token_id"] == TOKENIZER.token_to_id("<|im_end|>")
    assert sum(config["rope_scaling"]["mrope_section"]) * 2 == config["hidden_size"] // config["num_attention_heads"]


@given(st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


def test_words_in_pictures_are_spelled_letter_by_letter() -> None:
    assert [TOKENIZER.decode([i]) for i in TOKENIZER.encode('"zebra"').ids] == ['"', *"zebra", '"']
    assert len(TOKENIZER.encode(" circle").ids) == 1


def test_golden_covers_what_the_model_can_do() -> None:
    entries = demo.golden()
    assert len({e.name for e in entries}) == len(entries) >= 6
    assert any(len(pictures(e)) == 2 for e in entries)
    assert any(len(e.messages) > 1 for e in entries)
    assert all(e.answer and e.messages[-1]["role"] == "user" for e in entries)


def test_every_sample_opens_and_is_asked_about() -> None:
    asked = {p for e in demo.golden() for p in pictures(e)}
    samples = set(demo.sample_path("shapes.png").parent.iterdir())
    assert len(samples) == 6
    assert samples == asked
    for path in samples:
        with Image.open(path) as picture:
            picture.verify()
