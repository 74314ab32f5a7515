"""The LLaVA family's picture arithmetic: one square view, or that and the tiles of a larger one; ordinary positions.

Rules are those of the releases as transformers has them in `LlavaImageProcessorPil`, `LlavaNextImageProcessorPil` and
`LlavaOnevisionImageProcessorPil`; tests compare the pixels byte for byte. The authors' layout (`LlavaLlamaForCausalLM` and its
like) follows their `mm_utils.py` and `llava_arch.py`: the same tiles, and a map that can be one row or column smaller.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sightline import hub
from sightline.errors import CheckpointError, ImageError, RequestError
from sightline.prompt.processor import Cells, ImagePlan, PixelLimits, ProcessedPrompt, read_json
from sightline.types import ImageRef, View

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_SIGLIP_MEAN = (0.5, 0.5, 0.5)
_NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
# A map with more features than allowed is shrunk only when the factor is above this.
_SHRINK_ABOVE = 1.1
# Thinner pictures would become none at all in some tiling, or huge ones when their short side is enlarged.
_MAX_ASPECT_RATIO = 200
# `Grid` of the model: the square view alone, and the square view with one newline.
_SQUARE, _SQUARE_NEWLINE = (0, 0, 0), (0, 1, 0)

# Towers that the authors' checkpoints name: side of a tile and of a patch in pixels.
_TOWERS = {
    "clip-vit-large-patch14-336": {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14},
    "siglip-so400m-patch14-384": {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14},
}


class Tiling(NamedTuple):
    """How pictures are tiled. pinpoints: (height, width) of the canvases. max_tiles: bound on the map, None without.

    square_in_company: several pictures in one prompt are squares without tiles, each with a newline (OneVision); else
    each has its tiles, and a picture without them has no newline.
    """

    pinpoints: tuple[tuple[int, int], ...]
    max_tiles: int | None
    square_in_company: bool


class LlavaProcessor:
    """Built from config.json and preprocessor_config.json; stateless.

    image_size, patch_size: sides of a tile and of a patch in pixels. side: features along a tile's side. tiling: None for LLaVA 1.5. square: how a
    picture becomes a square when it is not tiled: "crop", "pad" or "squash". placeholder: its text in prompts.
    """

    placeholder = "<image>"

    def __init__(self, model_dir: Path) -> None:
        config, file = read_json(model_dir / "config.json"), read_json(model_dir / "preprocessor_config.json")
        architecture = (config.get("architectures") or [""])[0]
        self.tiling: Tiling | None
        self._class_feature = 0
        self._map_size = unpadded if architecture in _HF else authors_unpadded
        if architecture in _HF:
            release = _HF[architecture]
            vision = config.get("vision_config") or {}
            self.image_token_id = int(
                config.get("image_token_index", config.get("image_token_id", release.image_token_id))
            )
            clip = vision.get("model_type", release.tower) == "clip_vision_model"
            select = config.get("vision_feature_select_strategy", "default" if clip else "full")
            self._class_feature = int(clip and select == "full")
            self.square = _square_mode(file, clip)
            self.tiling = release.tiling(config, file)
        else:
            vision = _companion(config, model_dir)
            clip = vision.get("model_type") == "clip_vision_model"
            self.image_token_id = _token_id(model_dir, self.placeholder, int(config["vocab_size"]))
            aspect = config.get("image_aspect_ratio") or "square"
            self.square = "pad" if aspect == "pad" else "crop" if clip else "squash"
            self.tiling = _original_tiling(config, aspect, int(vision["image_size"]))
        self.image_size = int(vision.get("image_size", 224))
        self.patch_size = int(vision.get("patch_size", 32 if clip else 16))
        self.side = self.image_size // self.patch_size
        mean = file.get("image_mean") or (_CLIP_MEAN if clip else _SIGLIP_MEAN)
        red, green, blue = (int(x * 255) for x in mean)
        self._background = (red, green, blue)
        self._resample = Image.Resampling(file.get("resample", Image.Resampling.BICUBIC))
        _check_size(file, self.image_size)

    def limits_for(self, detail: str) -> PixelLimits:
        """OpenAI's `detail`: low is the square view without tiles; auto, high and original keep the checkpoint's own."""
        return PixelLimits(single=detail == "low")

    def limits_among(self, limits: PixelLimits, num_images: int) -> PixelLimits:
        """OneVision was trained on several pictures without tiles, and transformers gives it such."""
        if self.tiling is not None and self.tiling.square_in_company and num_images > 1:
            return limits._replace(single=True)
        return limits

    def plan(self, width: int, height: int, limits: PixelLimits = PixelLimits()) -> ImagePlan:
        """limits.max_pixels bounds the canvas; below the smallest one only the square view is left. limits.min_pixels has no
        meaning here: the canvas is chosen by the picture's size."""
        if max(width, height) > _MAX_ASPECT_RATIO * min(width, height):
            raise ImageError(
                f"The image is {width}x{height}: its aspect ratio is above {_MAX_ASPECT_RATIO}. Crop or pad it.",
                code="invalid_image_format",
            )
        base = self.side**2 + self._class_feature
        canvas = self._canvas(width, height, limits)
        if canvas is None:
            newline = self.tiling is not None and self.tiling.square_in_company
            grid = _SQUARE_NEWLINE if newline else _SQUARE
            return ImagePlan(self.image_size, self.image_size, grid, base + newline)
        rows, columns = (length // self.image_size for length in canvas)
        map_height, map_width = self._map_size(height, width, rows * self.side, columns * self.side)
        grid = (rows, map_height, map_width)
        h, w = self._shrunk(map_height, map_width)
        return ImagePlan(width=canvas[1], height=canvas[0], grid=grid, num_tokens=base + h * (w + 1))

    def _canvas(self, width: int, height: int, limits: PixelLimits) -> tuple[int, int] | None:
        """(height, width): the one that keeps most of the picture's pixels, then wastes least, then stands first."""
        if self.tiling is None or limits.single:
            return None
        most = limits.max_pixels
        allowed = [p for p in self.tiling.pinpoints if most is None or p[0] * p[1] <= most]
        if not allowed:
            return None

        def quality(canvas: tuple[int, int]) -> tuple[int, int]:
            scale = min(canvas[1] / width, canvas[0] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - canvas[0] * canvas[1]

        return max(allowed, key=quality)

    def _shrunk(self, height: int, width: int) -> tuple[int, int]:
        """Size of the map after OneVision's bound; the model computes the same."""
        if self.tiling is None or self.tiling.max_tiles is None:
            return height, width
        factor = math.sqrt(height * width / (self.tiling.max_tiles * self.side**2))
        return (int(height // factor), int(width // factor)) if factor > _SHRINK_ABOVE else (height, width)

    def views(self, size: tuple[int, int], plan: ImagePlan) -> tuple[View, ...]:
        """[1 + tiles, image_size, image_size, 3]: the square view, then the tiles row by row."""
        side, resample = self.image_size, self._resample
        square = View(size=(side, side), resample=resample, tile=side)
        if plan.grid[0]:
            canvas = (plan.width, plan.height)
            fitted = fit(size, canvas)
            at = ((plan.width - fitted[0]) // 2, (plan.height - fitted[1]) // 2)
            return square, View(size=fitted, resample=resample, canvas=canvas, at=at, tile=side)
        mode = self.square
        if self.tiling is not None:
            # OneVision pads pictures in company; NeXT squashes, as it does for the view beside the tiles
            mode = "pad" if self.tiling.square_in_company else "squash"
        if mode == "squash":
            return (square,)
        if mode == "pad":
            return (View(size=(side, side), resample=resample, background=self._background, tile=side),)
        short = min(size)
        width, height = (side if length == short else int(side * length / short) for length in size)
        at = (-((width - side) // 2), -((height - side) // 2))
        return (View(size=(width, height), resample=resample, canvas=(side, side), at=at, tile=side),)

    def cells(self, plan: ImagePlan) -> tuple[Cells, ...]:
        """The square view's patches, then the canvas's tiles. Patches that do not fill the side leave a margin."""
        square = Cells("patch", self.side, self.side, self.patch_size, self.patch_size)
        if not plan.grid[0]:
            return (square,)
        tile = self.image_size
        return square, Cells("tile", plan.height // tile, plan.width // tile, tile, tile)

    def expand(self, input_ids: list[int], plans: list[ImagePlan], digests: list[bytes]) -> ProcessedPrompt:
        """Positions are 0 .. L-1."""
        slots = [i for i, token in enumerate(input_ids) if token == self.image_token_id]
        if len(slots) != len(plans):
            raise RequestError(
                f"The prompt has {len(slots)} picture placeholders for {len(plans)} pictures.", param="messages"
            )
        counts = np.ones(len(input_ids), dtype=np.int64)
        counts[slots] = [plan.num_tokens for plan in plans]
        offsets = (np.cumsum(counts) - counts)[slots].tolist()
        images = tuple(
            ImageRef(digest=digest, offset=offset, num_tokens=plan.num_tokens, grid=plan.grid)
            for digest, offset, plan in zip(digests, offsets, plans, strict=True)
        )
        return ProcessedPrompt(np.repeat(np.asarray(input_ids, dtype=np.int32), counts), None, 0, images)


def fit(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of a picture of `size` enlarged or shrunk into `canvas`, (width, height) too; rounded up."""
    scale_w, scale_h = canvas[0] / size[0], canvas[1] / size[1]
    if scale_w < scale_h:
        return canvas[0], min(math.ceil(size[1] * scale_w), canvas[1])
    return min(math.ceil(size[0] * scale_h), canvas[0]), canvas[1]


def unpadded(height: int, width: int, map_height: int, map_width: int) -> tuple[int, int]:
    """Size of the map without the margins that a picture of height x width leaves, as transformers computes it."""
    if width / height > map_width / map_height:
        kept = int(round(height * (map_width / width), 7))
        return map_height - (map_height - kept) // 2 * 2, map_width
    kept = int(round(width * (map_height / height), 7))
    return map_height, map_width - (map_width - kept) // 2 * 2


def authors_unpadded(height: int, width: int, map_height: int, map_width: int) -> tuple[int, int]:
    """As the authors' `unpad_image` does: where a product like 23.999999999999996 is cut to 23, one cell fewer is kept."""
    if width / height > map_width / map_height:
        kept = int(height * (map_width / width))
        return map_height - (map_height - kept) // 2 * 2, map_width
    kept = int(width * (map_height / height))
    return map_height, map_width - (map_width - kept) // 2 * 2


class _Release(NamedTuple):
    """What transformers' classes of an architecture mean by a missing key."""

    image_token_id: int
    tower: str
    tiling: Callable[[Mapping[str, Any], Mapping[str, Any]], Tiling | None]


def _no_tiling(config: Mapping[str, Any], file: Mapping[str, Any]) -> Tiling | None:
    return None


def _next_tiling(config: Mapping[str, Any], file: Mapping[str, Any]) -> Tiling | None:
    return Tiling(_pinpoints(config, file, _NEXT_PINPOINTS), None, square_in_company=False)


def _onevision_tiling(config: Mapping[str, Any], file: Mapping[str, Any]) -> Tiling | None:
    default = [[384 * h, 384 * w] for h in range(1, 7) for w in range(1, 7)]
    number = _max_tiles(config.get("vision_aspect_ratio", "anyres_max_9"))
    return Tiling(_pinpoints(config, file, default), number, square_in_company=True)


_HF = {
    "LlavaForConditionalGeneration": _Release(32000, "clip_vision_model", _no_tiling),
    "LlavaNextForConditionalGeneration": _Release(32000, "clip_vision_model", _next_tiling),
    "LlavaOnevisionForConditionalGeneration": _Release(151646, "siglip_vision_model", _onevision_tiling),
}


def _pinpoints(
    config: Mapping[str, Any], file: Mapping[str, Any], default: list[list[int]]
) -> tuple[tuple[int, int], ...]:
    """(height, width) of the canvases: transformers' files have them in both places."""
    pairs = file.get("image_grid_pinpoints") or config.get("image_grid_pinpoints") or default
    return tuple((int(height), int(width)) for height, width in pairs)


def _max_tiles(aspect: str) -> int | None:
    match = re.fullmatch(r"anyres_max_(\d+)", aspect)
    return int(match[1]) if match else None


def _original_tiling(config: Mapping[str, Any], aspect: str, tile: int) -> Tiling | None:
    """Pinpoints of the authors' files are (width, height), as a list or as a range of tiles: "(1x1),...,(6x6)"."""
    if not aspect.startswith("anyres"):
        return None
    pairs = config.get("image_grid_pinpoints")
    if isinstance(pairs, str):
        ends = [tuple(map(int, pair)) for pair in re.findall(r"\((\d+)x(\d+)\)", pairs)]
        if not ends:
            raise CheckpointError(f"config.json: image_grid_pinpoints is {pairs!r}, where (1x1),...,(6x6) is expected.")
        (w0, h0), (w1, h1) = ends[0], ends[-1]
        pairs = [[tile * w, tile * h] for w in range(w0, w1 + 1) for h in range(h0, h1 + 1)]
    if not isinstance(pairs, list) or not pairs:
        raise CheckpointError("config.json: image_grid_pinpoints is missing.")
    number = _max_tiles(aspect)
    return Tiling(tuple((int(h), int(w)) for w, h in pairs), number, square_in_company=number is not None)


def _square_mode(file: Mapping[str, Any], clip: bool) -> str:
    if file.get("do_pad") and file.get("image_processor_type") not in ("CLIPImageProcessor", "SiglipImageProcessor"):
        return "pad"
    size = file.get("size", {"shortest_edge": 0} if clip else {"height": 0, "width": 0})
    return "squash" if isinstance(size, Mapping) and "height" in size else "crop"


def _check_size(file: Mapping[str, Any], image_size: int) -> None:
    """Every way of this file ends in squares of the tower's size."""
    for key in ("size", "crop_size"):
        value = file.get(key)
        sides = set(value.values()) if isinstance(value, Mapping) else {value}
        if sides - {None, image_size}:
            raise CheckpointError(
                f"preprocessor_config.json: {key} is {value!r}, but the tower's image_size is {image_size}."
            )
    for key in ("do_resize", "do_convert_rgb"):
        if file.get(key) is False:
            raise CheckpointError(f"preprocessor_config.json: {key} is false, which is not supported.")


def _companion(config: Mapping[str, Any], model_dir: Path) -> Mapping[str, Any]:
    """The vision config of the tower that an authors' checkpoint names."""
    name = config.get("mm_vision_tower")
    if not isinstance(name, str):
        raise CheckpointError("config.json: mm_vision_tower is missing.")
    folder = hub.find_companion(name, model_dir)
    if folder is not None:
        found = read_json(folder / "config.json")
        vision: Mapping[str, Any] = found.get("vision_config") or found
        return vision
    known = _TOWERS.get(name.rstrip("/").rpartition("/")[2])
    if known is None:
        raise CheckpointError(
            f"config.json: mm_vision_tower is {name!r}, neither a folder here nor one of {list(_TOWERS)}."
        )
    return known


def _token_id(model_dir: Path, token: str, otherwise: int) -> int:
    """Id of an added token; else one beyond the vocabulary, which no text can produce."""
    added = read_json(model_dir / "tokenizer.json").get("added_tokens", ())
    return next((int(entry["id"]) for entry in added if entry["content"] == token), otherwise)
