"""Qwen2-VL's picture arithmetic (arXiv:2409.12191): any resolution, multiples of 28 pixels, multimodal rotary positions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image

from sightline.errors import CheckpointError, ImageError, RequestError
from sightline.prompt.processor import Cells, ImagePlan, PixelLimits, ProcessedPrompt, read_json
from sightline.types import ImageRef, View

_MAX_ASPECT_RATIO = 200
# Bounds of the released class, for files that name none.
_MIN_PIXELS, _MAX_PIXELS = 56 * 56, 28 * 28 * 1280
# `detail: low` is OpenAI's 512-pixel version of a picture.
_LOW_DETAIL_PIXELS = 512 * 512


class Qwen2VLProcessor:
    """Built from config.json and preprocessor_config.json; stateless."""

    def __init__(self, model_dir: Path) -> None:
        config, file = read_json(model_dir / "config.json"), read_json(model_dir / "preprocessor_config.json")
        vision = config.get("vision_config") or {}
        self.patch_size = int(file.get("patch_size") or vision.get("patch_size") or 14)
        self.merge_size = int(file.get("merge_size") or vision.get("spatial_merge_size") or 2)
        self.factor = self.patch_size * self.merge_size
        size = file.get("size") or {}
        self.min_pixels = int(file.get("min_pixels") or size.get("shortest_edge") or _MIN_PIXELS)
        self.max_pixels = int(file.get("max_pixels") or size.get("longest_edge") or _MAX_PIXELS)
        image_token_id = config.get("image_token_id")
        if not isinstance(image_token_id, int):
            raise CheckpointError("config.json: image_token_id is missing.")
        self.image_token_id = image_token_id

    def limits_for(self, detail: str) -> PixelLimits:
        """OpenAI's `detail`: low caps the picture at 512 x 512 pixels; auto, high and original keep the checkpoint's own."""
        return PixelLimits(max_pixels=_LOW_DETAIL_PIXELS) if detail == "low" else PixelLimits()

    def plan(self, width: int, height: int, limits: PixelLimits = PixelLimits()) -> ImagePlan:
        """Sides are rounded to multiples of patch_size * merge_size, the area brought between the two bounds."""
        min_pixels = max(self.min_pixels, limits.min_pixels or 0)
        max_pixels = min(self.max_pixels, limits.max_pixels or self.max_pixels)
        h, w = smart_resize(height, width, self.factor, min(min_pixels, max_pixels), max_pixels)
        grid = (1, h // self.patch_size, w // self.patch_size)
        return ImagePlan(width=w, height=h, grid=grid, num_tokens=grid[1] * grid[2] // self.merge_size**2)

    def views(self, size: tuple[int, int], plan: ImagePlan) -> tuple[View, ...]:
        """One, bicubic: [H, W, 3]."""
        return (View(size=(plan.width, plan.height), resample=Image.Resampling.BICUBIC),)

    def cells(self, plan: ImagePlan) -> tuple[Cells, ...]:
        """Merged patches, a token each."""
        rows, columns = plan.height // self.factor, plan.width // self.factor
        return (Cells("patch", rows, columns, self.factor, self.factor),)

    def expand(self, input_ids: list[int], plans: list[ImagePlan], digests: list[bytes]) -> ProcessedPrompt:
        """M-RoPE (section 2.1 of the paper): text advances all axes; a picture of h x w merged cells starts at the next
        position p, its cells are at (p, p + row, p + column), and text goes on at p + max(h, w)."""
        slots = [i for i, token in enumerate(input_ids) if token == self.image_token_id]
        if len(slots) != len(plans):
            raise RequestError(
                f"The prompt has {len(slots)} picture placeholders for {len(plans)} pictures.", param="messages"
            )
        ids: list[np.ndarray] = []
        positions: list[np.ndarray] = []
        images: list[ImageRef] = []
        done = length = at = 0
        for slot, plan, digest in zip(slots, plans, digests, strict=True):
            text = np.asarray(input_ids[done:slot], dtype=np.int32)
            ids += [text, np.full(plan.num_tokens, self.image_token_id, dtype=np.int32)]
            positions.append(_text_positions(at, len(text)))
            at += len(text)
            h, w = plan.grid[1] // self.merge_size, plan.grid[2] // self.merge_size
            positions.append(np.stack([np.zeros(h * w, np.int32), *np.indices((h, w), np.int32).reshape(2, -1)]) + at)
            at += max(h, w)
            images.append(ImageRef(digest, length + len(text), plan.num_tokens, plan.grid))
            length += len(text) + plan.num_tokens
            done = slot + 1
        tail = np.asarray(input_ids[done:], dtype=np.int32)
        all_ids = np.concatenate([*ids, tail])
        positions.append(_text_positions(at, len(tail)))
        return ProcessedPrompt(
            input_ids=all_ids,
            positions=np.concatenate(positions, axis=1) if images else None,
            position_delta=at + len(tail) - len(all_ids),
            images=tuple(images),
        )


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) as multiples of `factor`, rounding half to even, with min_pixels <= area <= max_pixels.

    The formula of Qwen2-VL's released processor. Raises `ImageError` for an aspect ratio above 200.
    """
    if max(height, width) / min(height, width) > _MAX_ASPECT_RATIO:
        raise ImageError(
            f"The image is {width}x{height}: its aspect ratio is above {_MAX_ASPECT_RATIO}. Crop or pad it.",
            code="invalid_image_format",
        )
    h, w = (round(side / factor) * factor for side in (height, width))
    if h * w > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        h, w = (max(factor, math.floor(side / beta / factor) * factor) for side in (height, width))
    elif h * w < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * beta / factor) * factor for side in (height, width))
    return h, w


def _text_positions(start: int, count: int) -> np.ndarray:
    return np.broadcast_to(np.arange(start, start + count, dtype=np.int32), (3, count))
