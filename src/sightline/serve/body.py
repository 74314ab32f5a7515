"""What a request's body says about caches, read without tokenizer or model: text by its characters, a picture by its address.

Coarser than what the engine knows, and enough to tell which replica has seen a prompt's beginning or its pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from sightline.engine.routing import BLOCK, Footprint, PictureUse

# English text has about four characters a token.
_BLOCK_CHARACTERS = 4 * BLOCK
# Unknown before the picture is open; most take some hundreds.
_PICTURE_TOKENS = 16 * BLOCK

# Where the dialects keep their prompts, in the order in which these become tokens.
_FIELDS = ("instructions", "system", "tools", "messages", "input", "prompt", "text", "image_data", "images")
_PICTURE_FIELDS = ("image_url", "image", "image_data", "images", "source")


class _Piece(NamedTuple):
    text: str
    is_picture: bool


def body_footprint(body: bytes, tenant: bytes = b"") -> Footprint:
    """Of a JSON body in any dialect; empty for a body that holds no prompt. tenant: what tells clients apart."""
    try:
        fields = msgspec.json.decode(body)
    except msgspec.DecodeError:
        fields = None
    if not isinstance(fields, dict):
        return Footprint(0, (), ())
    key = hash(tenant)
    blocks: list[int] = []
    pictures: list[PictureUse] = []
    for piece in (p for name in _FIELDS if name in fields for p in _pieces(fields[name], name in _PICTURE_FIELDS)):
        if piece.is_picture:
            pictures.append(PictureUse(hash(piece.text), len(blocks) * BLOCK, _PICTURE_TOKENS))
        num_blocks = _PICTURE_TOKENS // BLOCK if piece.is_picture else -(-len(piece.text) // _BLOCK_CHARACTERS)
        for i in range(num_blocks):
            start = i * _BLOCK_CHARACTERS
            part = piece.text if piece.is_picture else piece.text[start : start + _BLOCK_CHARACTERS]
            key = hash((key, piece.is_picture, i, part))
            blocks.append(key)
    return Footprint(len(blocks) * BLOCK, tuple(blocks), tuple(pictures))


def _pieces(node: Any, is_picture: bool) -> Iterator[_Piece]:
    """Strings inside `node` in order; those below a picture's field are pictures."""
    match node:
        case str():
            yield _Piece(node, is_picture)
        case list():
            for item in node:
                yield from _pieces(item, is_picture)
        case dict():
            for name, value in node.items():
                # What kind of part it is says nothing that its content does not.
                if name not in ("type", "detail"):
                    yield from _pieces(value, is_picture or name in _PICTURE_FIELDS)
