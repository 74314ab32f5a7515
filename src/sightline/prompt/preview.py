"""What a family makes of a picture, for people who look at it: the pixels that the vision tower sees, and how they are divided."""

from __future__ import annotations

import io
from typing import NamedTuple

import msgspec
from PIL import Image

from sightline.prompt.pipeline import Picture, PromptPipeline
from sightline.prompt.processor import Cells, render


class ViewPreview(NamedTuple):
    """One view. png: its uint8 pixels, uncut. width, height: in pixels."""

    png: bytes
    width: int
    height: int
    cells: Cells


class Preview(NamedTuple):
    """size: (width, height) of the upright picture. num_tokens: what it takes in a prompt."""

    size: tuple[int, int]
    num_tokens: int
    views: tuple[ViewPreview, ...]


async def preview(pipeline: PromptPipeline, picture: Picture) -> Preview:
    """The same decode and resize as on the way to the engine. Raises `ImageError` for a broken file."""
    processor = pipeline.processor
    assert processor is not None

    def look(image: Image.Image) -> Preview:
        views = processor.views(image.size, picture.plan)
        pixels = (render(image, (msgspec.structs.replace(view, tile=0),)) for view in views)
        seen = tuple(
            ViewPreview(_png(Image.fromarray(array)), array.shape[1], array.shape[0], cells)
            for array, cells in zip(pixels, processor.cells(picture.plan), strict=True)
        )
        return Preview(image.size, picture.plan.num_tokens, seen)

    return await pipeline.use(picture, look)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    # Quick rather than small: the pictures are looked at once.
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
