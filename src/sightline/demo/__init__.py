"""The model in the box: a real Qwen2-VL of a few million parameters, sample pictures, and answers that it must give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

MODEL_ID = "sightline-tiny"

_HERE = Path(__file__).parent


class Golden(NamedTuple):
    """A conversation and the answer that greedy decoding gives and that is true.

    messages: as `Engine.chat` takes them, pictures as paths.
    """

    name: str
    messages: list[dict[str, Any]]
    answer: str


def model_path() -> Path:
    """The checkpoint folder."""
    return _HERE / MODEL_ID


def sample_path(name: str) -> Path:
    """A sample picture, by its file name."""
    return _HERE / "samples" / name


def golden() -> list[Golden]:
    """Every golden conversation, from golden.json, where a picture part names a sample."""
    entries = json.loads((_HERE / "golden.json").read_text(encoding="utf-8"))
    return [Golden(e["name"], [_resolve(m) for m in e["messages"]], e["answer"]) for e in entries]


def _resolve(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        return message
    parts = [{**p, "image": sample_path(p["image"])} if p["type"] == "image" else p for p in content]
    return {**message, "content": parts}
