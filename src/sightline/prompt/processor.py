"""The protocol of a family's processor: the one owner of its picture arithmetic. CPU only, no torch.

A processor is built from the checkpoint folder (a `Path`) and is stateless afterwards, so that worker threads share it.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from sightline.errors import CheckpointError
from sightline.types import ImageRef


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

    def resize(self, image: Image.Image, plan: ImagePlan) -> np.ndarray:
        """Resized uint8 pixels [H, W, 3], equal to transformers' PIL image processor before rescaling."""
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
