"""Llama 3.2 Vision's processor beside transformers' PIL one: canvases, pixels, aspect ratio ids, prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sightline.errors import CheckpointError, RequestError
from sightline.prompt.mllama import MllamaProcessor, tile_arrangements
from sightline.prompt.processor import PixelLimits, render

IMAGE = 128256
RELEASE = {"size": {"height": 560, "width": 560}, "max_image_tiles": 4, "resample": 2}
# Where rules change: around one tile, around canvases of equal scale, extreme ratios, single pixels.
CORNERS = [
    (1, 1), (1, 560), (560, 1), (559, 559), (560, 560), (561, 561), (560, 561), (561, 560), (1120, 1120), (1121, 1120),
    (1120, 560), (560, 1120), (1680, 560), (1681, 559), (2240, 560), (2241, 560), (560, 2240), (300, 1200), (1200, 300),
    (336, 336), (640, 480), (1024, 1024), (1920, 1080), (2, 3000), (3000, 2), (840, 840), (279, 281), (1119, 1121),
]  # fmt: skip


def make(folder: Path, **changes: Any) -> MllamaProcessor:
    (folder / "config.json").write_text(json.dumps({"image_token_index": IMAGE}))
    (folder / "preprocessor_config.json").write_text(json.dumps({**RELEASE, **changes}))
    return MllamaProcessor(folder)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> MllamaProcessor:
    return make(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def judge() -> Any:
    from transformers import MllamaImageProcessorPil

    return MllamaImageProcessorPil(
        size={"height": 560, "width": 560}, max_image_tiles=4, do_rescale=False, do_normalize=False
    )


def _same(processor: MllamaProcessor, judge: Any, width: int, height: int, rng: np.random.Generator) -> None:
    picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    expected = judge(picture, return_tensors="np")
    plan = processor.plan(width, height)
    tiles = render(picture, processor.views(picture.size, plan))
    assert plan.num_tokens == 1
    assert plan.grid[0] == expected["aspect_ratio_ids"][0, 0], (width, height)
    assert tiles.dtype == np.uint8
    assert tiles.shape == (expected["num_tiles"][0][0], 560, 560, 3), (width, height)
    own = expected["pixel_values"][0, 0, : len(tiles)].transpose(0, 2, 3, 1)
    assert (own == tiles).all(), (width, height)


def test_pixels_equal_transformers(processor: MllamaProcessor, judge: Any) -> None:
    rng = np.random.default_rng(0)
    sizes = CORNERS + [(int(w), int(h)) for w, h in 2.0 ** rng.uniform(0, 11.3, (200, 2))]
    for width, height in sizes:
        _same(processor, judge, width, height, rng)


def test_canvases_equal_transformers_for_many_sizes(processor: MllamaProcessor) -> None:
    """Headers alone, so thousands are cheap."""
    from transformers.models.mllama.image_processing_pil_mllama import (
        get_image_size_fit_to_canvas,
        get_optimal_tiled_canvas,
    )

    rng = np.random.default_rng(1)
    sizes = [(int(w), int(h)) for w, h in rng.integers(1, 3000, (2000, 2))]
    sizes += [(w, h) for w in range(540, 580, 3) for h in range(1100, 1140, 3)]
    for width, height in sizes:
        canvas = get_optimal_tiled_canvas(height, width, 4, 560)
        new_height, new_width = get_image_size_fit_to_canvas(height, width, *canvas, 560)
        plan = processor.plan(width, height)
        assert (plan.grid[1] * 560, plan.grid[2] * 560) == canvas
        assert (plan.width, plan.height) == (new_width, new_height)


def test_aspect_ratio_ids_are_those_of_the_release() -> None:
    assert tile_arrangements(4) == [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]


def test_pixels_behind_the_picture_are_black(processor: MllamaProcessor) -> None:
    plan = processor.plan(300, 200)
    assert (plan.width, plan.height, plan.grid) == (560, 373, (1, 1, 1))
    tiles = render(Image.new("RGB", (300, 200), "white"), processor.views((300, 200), plan))
    assert (tiles[0, :373] == 255).all()
    assert (tiles[0, 373:] == 0).all()


def test_max_pixels_bounds_the_canvas(processor: MllamaProcessor) -> None:
    assert processor.plan(1120, 1120).grid == (6, 2, 2)
    assert processor.plan(1120, 1120, PixelLimits(max_pixels=2 * 560 * 560)).grid[0] == 1
    assert processor.plan(2000, 500, PixelLimits(max_pixels=2 * 560 * 560)).grid == (2, 1, 2)
    assert processor.plan(1120, 1120, PixelLimits(max_pixels=1)).grid == (1, 1, 1)


def test_min_pixels_is_met_or_refused(processor: MllamaProcessor) -> None:
    assert processor.plan(100, 100, PixelLimits(min_pixels=560 * 560)).width == 560
    with pytest.raises(RequestError, match="560x560 pixels and cannot enlarge it to min_pixels 313601"):
        processor.plan(100, 100, PixelLimits(min_pixels=560 * 560 + 1))


def test_prompt_keeps_its_length(processor: MllamaProcessor) -> None:
    plans = [processor.plan(100, 100), processor.plan(1000, 300)]
    ids = [1, IMAGE, 2, 3, IMAGE, 4]
    prompt = processor.expand(ids, plans, [b"a" * 32, b"b" * 32])
    assert prompt.input_ids.tolist() == ids
    assert prompt.input_ids.dtype == np.int32
    assert prompt.positions is None
    assert prompt.position_delta == 0
    assert [(i.digest[:1], i.offset, i.num_tokens, i.grid) for i in prompt.images] == [
        (b"a", 1, 1, (1, 1, 1)),
        (b"b", 4, 1, plans[1].grid),
    ]


def test_low_detail_is_one_tile(processor: MllamaProcessor) -> None:
    assert processor.plan(3000, 2000, processor.limits_for("low")).grid == (1, 1, 1)
    assert processor.plan(3000, 2000, processor.limits_for("high")).grid == (6, 2, 2)


def test_what_cannot_be_used_is_refused(processor: MllamaProcessor, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="2 picture placeholders for 1 pictures"):
        processor.expand([IMAGE] * 2, [processor.plan(9, 9)], [b"a" * 32])
    for key, value in {"size": {"height": 560, "width": 448}, "do_pad": False, "resample": 3}.items():
        with pytest.raises(CheckpointError, match=key):
            make(tmp_path, **{key: value})
