"""What the scripts of this folder share. They run in environments of their own, so nothing of sightline is imported here."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

SERVER = os.environ["SERVER"]
BASE = f"{SERVER}/v1"
MODEL = os.environ.get("MODEL", "sightline-tiny")
SHAPES = Path(__file__).resolve().parents[4] / "src" / "sightline" / "demo" / "samples" / "shapes.png"
DATA = base64.b64encode(SHAPES.read_bytes()).decode()
QUESTION = "What's in this image?"
PARTS = [
    {"type": "text", "text": QUESTION},
    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{DATA}"}},
]
MESSAGES = [{"role": "user", "content": PARTS}]

Color = Literal["red", "green", "blue"]


class Paint(BaseModel):
    """A schema that leaves a model of three million parameters no room: its values are checked, not its wisdom."""

    model_config = ConfigDict(extra="forbid")
    color: Color


TOOL = {
    "type": "function",
    "function": {"name": "paint", "description": "Paint a wall.", "parameters": Paint.model_json_schema()},
}


def see(text: str | None) -> str:
    """The answer, which must be the true one about shapes.png."""
    assert text is not None
    assert re.search("red circle.*blue square.*green triangle", text), text
    return text


def streamed(pieces: list[str]) -> str:
    """The whole of a true answer that came in more than one piece."""
    assert sum(bool(piece) for piece in pieces) > 1, pieces
    return see("".join(pieces))


def run(*checks: Callable[[], None]) -> None:
    """Each check in turn; the names of those that passed are the output."""
    for check in checks:
        check()
        print(check.__name__, flush=True)
