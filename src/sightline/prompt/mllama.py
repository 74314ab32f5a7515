"""Llama 3.2 Vision's picture arithmetic: a canvas of tiles, one placeholder for each picture, ordinary positions.

The rules are those of Meta's reference processor (`llama-models`, vision preprocessing) as transformers has them in
`MllamaImageProcessorPil`; tests compare the pixels byte for byte. `ImageRef.grid` is (aspect ratio id, rows, columns) of
tiles: the id selects the vision tower's tile embeddings.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image

from sightline.errors import CheckpointError, RequestError
from sightline.prompt.processor import Cells, ImagePlan, PixelLimits, ProcessedPrompt, read_json
from sightline.types import ImageRef, View

# Values of the releases, for files that omit them.
_IMAGE_TOKEN_INDEX = 128256
_TILE_SIZE = 560
_MAX_TILES = 4


def tile_arrangements(max_tiles: int) -> list[tuple[int, int]]:
    """(rows, columns) of every canvas, in the order that numbers aspect ratios; the id of entry i is i + 1."""
    sides = range(1, max_tiles + 1)
    return [(rows, columns) for rows in sides for columns in sides if rows * columns <= max_tiles]


class MllamaProcessor:
    """Built from config.json and preprocessor_config.json; stateless.

    tile_size: side of a square tile in pixels. max_tiles: most tiles of one picture.
    """

    def __init__(self, model_dir: Path) -> None:
        config = read_json(model_dir / "config.json")
        file = read_json(model_dir / "preprocessor_config.json")
        image_token_id = config.get("image_token_index", config.get("image_token_id", _IMAGE_TOKEN_INDEX))
        if not isinstance(image_token_id, int):
            raise CheckpointError(f"config.json: image_token_index is {image_token_id!r}, where an id is expected.")
        self.image_token_id = image_token_id
        size = file.get("size", {"height": _TILE_SIZE, "width": _TILE_SIZE})
        if not isinstance(size, dict) or not size.get("height") or size.get("height") != size.get("width"):
            raise CheckpointError(f"preprocessor_config.json: size is {size!r}, where a square tile is expected.")
        self.tile_size = int(size["height"])
        self.max_tiles = int(file.get("max_image_tiles", _MAX_TILES))
        for key, expected in (("do_resize", True), ("do_pad", True), ("resample", int(Image.Resampling.BILINEAR))):
            if file.get(key, expected) != expected:
                raise CheckpointError(
                    f"preprocessor_config.json: {key} is {file[key]!r}, which is not supported (supported: {expected!r})."
                )
        self.arrangements = tile_arrangements(self.max_tiles)

    def limits_for(self, detail: str) -> PixelLimits:
        """OpenAI's `detail`: low is one tile; auto, high and original keep the checkpoint's canvases."""
        return PixelLimits(max_pixels=self.tile_size**2) if detail == "low" else PixelLimits()

    def plan(self, width: int, height: int, limits: PixelLimits = PixelLimits()) -> ImagePlan:
        """The picture takes one placeholder whatever its size.

        limits.max_pixels bounds the canvas, of which one tile is always allowed. A picture is enlarged only to fill one
        tile, so a limits.min_pixels above what it gets by itself raises `RequestError`.
        """
        rows, columns = self._canvas(width, height, limits.max_pixels)
        new_width, new_height = self._fit(width, height, rows, columns)
        if limits.min_pixels is not None and new_width * new_height < limits.min_pixels:
            raise RequestError(
                f"This model resizes the image to {new_width}x{new_height} pixels and cannot enlarge it to min_pixels "
                f"{limits.min_pixels}; leave min_pixels out.",
                param="min_pixels",
                code="invalid_value",
            )
        grid = (self.arrangements.index((rows, columns)) + 1, rows, columns)
        return ImagePlan(width=new_width, height=new_height, grid=grid, num_tokens=1)

    def _canvas(self, width: int, height: int, max_pixels: int | None) -> tuple[int, int]:
        """(rows, columns): the one that enlarges the picture least, or shrinks it least when none is large enough; of
        equals the one with fewest tiles."""
        tile = self.tile_size
        most = self.max_tiles if max_pixels is None else max(1, max_pixels // tile**2)
        allowed = [(rows, columns) for rows, columns in self.arrangements if rows * columns <= most]
        scales = [min(rows * tile / height, columns * tile / width) for rows, columns in allowed]
        enlarging = [scale for scale in scales if scale >= 1]
        best = min(enlarging) if enlarging else max(scales)
        chosen = [canvas for canvas, scale in zip(allowed, scales, strict=True) if scale == best]
        return min(chosen, key=lambda canvas: canvas[0] * canvas[1])

    def _fit(self, width: int, height: int, rows: int, columns: int) -> tuple[int, int]:
        """(width, height) after the resize: inside the canvas, and the longer side at least one tile."""
        tile = self.tile_size
        most_width = min(max(width, tile), columns * tile)
        most_height = min(max(height, tile), rows * tile)
        scale_w, scale_h = most_width / width, most_height / height
        if scale_w < scale_h:
            return most_width, min(math.floor(height * scale_w) or 1, most_height)
        return min(math.floor(width * scale_h) or 1, most_width), most_height

    def views(self, size: tuple[int, int], plan: ImagePlan) -> tuple[View, ...]:
        """[rows * columns, tile_size, tile_size, 3]: resized, black below and to the right, cut row by row."""
        (_, rows, columns), tile = plan.grid, self.tile_size
        bilinear, canvas = Image.Resampling.BILINEAR, (columns * tile, rows * tile)
        return (View(size=(plan.width, plan.height), resample=bilinear, canvas=canvas, tile=tile),)

    def cells(self, plan: ImagePlan) -> tuple[Cells, ...]:
        """The canvas's tiles."""
        _, rows, columns = plan.grid
        return (Cells("tile", rows, columns, self.tile_size, self.tile_size),)

    def expand(self, input_ids: list[int], plans: list[ImagePlan], digests: list[bytes]) -> ProcessedPrompt:
        """Nothing is inserted: the placeholder is the picture's only token, and positions are 0 .. L-1."""
        ids = np.asarray(input_ids, dtype=np.int32)
        offsets = np.flatnonzero(ids == self.image_token_id).tolist()
        if len(offsets) != len(plans):
            raise RequestError(
                f"The prompt has {len(offsets)} picture placeholders for {len(plans)} pictures.", param="messages"
            )
        images = tuple(
            ImageRef(digest=digest, offset=offset, num_tokens=1, grid=plan.grid)
            for digest, offset, plan in zip(digests, offsets, plans, strict=True)
        )
        return ProcessedPrompt(ids, None, 0, images)
