"""The protocol of a family's processor: the one owner of its picture arithmetic, and `render`, which carries it out on the CPU.
No torch.

A processor is built from the checkpoint folder (a `Path`) and is stateless afterwards, so that worker threads share it.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from sightline.errors import CheckpointError
from sightline.prompt.resize import resize
from sightline.types import ImageRef, Pixels, View

# A GPU resizes with these filters, and gets pictures with sides up to _LONGEST that are not much larger than what becomes of them.
_FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
_LONGEST = 1 << 14
_SMALL_BYTES = 16 << 20
_SHRINKS = 4
# Rows of a padded picture that are resized at once.
_STRIP = 256


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of the checkpoint; empty when there is no such file. Raises `CheckpointError`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path.name} holds no JSON object.")
    return found


class ImagePlan(NamedTuple):
    """What a picture of a given size becomes, known from its header alone.

    width, height: of the resized picture in pixels. grid: (t, h, w), see `ImageRef.grid`. num_tokens: placeholders.
    """

    width: int
    height: int
    grid: tuple[int, int, int]
    num_tokens: int


class PixelLimits(NamedTuple):
    """Per-request bounds on a resized picture, in pixels; None keeps the checkpoint's own.

    single: one view of the picture and no tiles, for families that tile.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    single: bool = False


class Cells(NamedTuple):
    """How a view is divided, row by row from its upper left corner; width, height: of one cell in pixels.

    unit: "patch" where a cell becomes one token, "tile" where the vision tower sees each cell by itself.
    """

    unit: Literal["patch", "tile"]
    rows: int
    columns: int
    width: int
    height: int


class ProcessedPrompt(NamedTuple):
    """input_ids: int32 [L] with placeholders expanded. positions: int32 [3, L], or None for 0..L-1."""

    input_ids: np.ndarray
    positions: np.ndarray | None
    position_delta: int
    images: tuple[ImageRef, ...]


class Processor(Protocol):
    """What `prompt.pipeline` asks of a family."""

    image_token_id: int

    def limits_for(self, detail: str) -> PixelLimits:
        """What OpenAI's `detail` (low, high, auto, original) means for this family."""
        ...

    def plan(self, width: int, height: int, limits: PixelLimits = PixelLimits()) -> ImagePlan:
        """Size, grid and token count for a picture of `width` x `height`. Raises `ImageError` if it cannot be used."""
        ...

    def views(self, size: tuple[int, int], plan: ImagePlan) -> tuple[View, ...]:
        """What becomes of a picture of `size`, (width, height): pixels equal to those of transformers' PIL image processor
        before rescaling, once `render` has joined them along the first axis."""
        ...

    def cells(self, plan: ImagePlan) -> tuple[Cells, ...]:
        """How each of `views` is divided, for people who look at it."""
        ...

    def expand(self, input_ids: list[int], plans: list[ImagePlan], digests: list[bytes]) -> ProcessedPrompt:
        """Replace the i-th single placeholder by plans[i].num_tokens of them and compute positions.

        Raises `RequestError` when the prompt does not hold exactly one placeholder for each picture.
        """
        ...


@runtime_checkable
class MindsCompany(Protocol):
    """A processor whose pictures look different when a prompt has several of them."""

    def limits_among(self, limits: PixelLimits, num_images: int) -> PixelLimits:
        """The limits of each of `num_images` pictures, from what the request says of it."""
        ...


@runtime_checkable
class HasPlaceholder(Protocol):
    """A processor whose placeholder text may be missing from the checkpoint's tokenizer.

    Templates may write it nevertheless; it then stands for `image_token_id`.
    """

    placeholder: str
    image_token_id: int


def load_processor(path: str | None, model_dir: Path) -> Processor | None:
    """The processor that `registry.Family.processor` names, for a checkpoint folder; None for text alone."""
    if path is None:
        return None
    module, _, name = path.partition(":")
    processor: Processor = getattr(importlib.import_module(module), name)(model_dir)
    return processor


# -- views to pixels -----------------------------------------------------------------------------------------------------


def prepare(image: Image.Image, views: Sequence[View], for_device: bool = False) -> Pixels:
    """Pixels of an upright RGB picture for the engine: its views, or itself where a GPU is to make them and it suits that."""
    if for_device and _suits_device(image.size, views):
        return Pixels(np.asarray(image), tuple(views))
    return Pixels(render(image, views))


def _suits_device(size: tuple[int, int], views: Sequence[View]) -> bool:
    source = 3 * size[0] * size[1]
    rendered = sum(3 * math.prod(view.canvas or view.size) for view in views)
    return (
        max(size) <= _LONGEST
        and source <= max(_SMALL_BYTES, _SHRINKS * rendered)
        and all(view.resample in _FILTERS for view in views)
    )


def render(image: Image.Image, views: Sequence[View]) -> np.ndarray:
    """The views' uint8 pixels of an upright RGB picture; `engine.render` gives the same bytes on a GPU."""
    parts = [arrange(np.asarray(_resized(image, view)), view, _black) for view in views]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def arrange(pixels: Any, view: View, black: Callable[[tuple[int, ...]], Any]) -> Any:
    """Resized pixels [H, W, 3], a numpy or torch array, on the view's canvas and in its tiles; black: a new array of zeros."""
    size, (x, y) = view.canvas or view.size, view.at
    if size != view.size:
        canvas = black((size[1], size[0], 3))
        left, top = max(x, 0), max(y, 0)
        part = pixels[top - y : size[1] - y, left - x : size[0] - x]
        canvas[top : top + part.shape[0], left : left + part.shape[1]] = part
        pixels = canvas
    if not view.tile:
        return pixels
    rows, columns = size[1] // view.tile, size[0] // view.tile
    tiles = pixels.reshape(rows, view.tile, columns, view.tile, 3).swapaxes(1, 2)
    return tiles.reshape(rows * columns, view.tile, view.tile, 3)


def _black(shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape, dtype=np.uint8)


def _resized(image: Image.Image, view: View) -> Image.Image:
    resample = Image.Resampling(view.resample)
    if view.background is not None:
        return _padded(image, view.size, resample, view.background)
    return image if image.size == view.size else resize(image, view.size, resample)


def _padded(
    image: Image.Image, size: tuple[int, int], resample: Image.Resampling, background: tuple[int, int, int]
) -> Image.Image:
    """The picture in the middle of a square of one colour, resized.

    Resizing a square treats rows first and each by itself, so strips of rows give the same pixels, and the whole square
    (gigabytes for a long picture) never exists.
    """
    (width, height), side = image.size, max(image.size)
    left, top = (side - width) // 2, (side - height) // 2
    narrow = Image.new("RGB", (size[0], side), background)
    for y in range(0, height, _STRIP):
        rows = min(_STRIP, height - y)
        strip = Image.new("RGB", (side, rows), background)
        strip.paste(image.crop((0, y, width, y + rows)), (left, 0))
        narrow.paste(strip.resize((size[0], rows), resample), (0, top + y))
    return narrow.resize(size, resample)
