"""Qwen2-VL's picture arithmetic beside transformers': grids, token counts, pixels, rotary positions."""

from __future__ import annotations

import functools
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sightline.errors import ImageError, RequestError
from sightline.prompt.processor import PixelLimits, render
from sightline.prompt.qwen2_vl import Qwen2VLProcessor
from tests import tiny

SIZES = [
    *[(w, h) for w in (1, 2, 3, 13, 14, 15, 27, 28, 29, 41, 42, 43) for h in (1, 14, 28, 29, 42, 100)],
    *[(random.Random(i).randint(1, 400), random.Random(1000 + i).randint(1, 400)) for i in range(110)],
    *[
        (200, 1),
        (1, 200),
        (1000, 5),
        (5, 1000),
        (1920, 1080),
        (640, 480),
        (1024, 1024),
        (300, 1200),
        (57, 57),
        (56, 56),
    ],
    *[(28 * k + d, 70) for k in range(1, 6) for d in (-1, 0, 1, 13, 14, 15)],
]


@functools.cache
def processor() -> Qwen2VLProcessor:
    return Qwen2VLProcessor(tiny.qwen2_vl())


@functools.cache
def oracle():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil.from_pretrained(tiny.qwen2_vl())


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 10007 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def patchify(pixels: np.ndarray, grid: tuple[int, int, int], patch: int = 14, merge: int = 2) -> np.ndarray:
    """float32 [N, 3 * 2 * patch * patch], as the checkpoint's convolution wants it: normalised, both frames equal."""
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    x = ((pixels.astype(np.float64) * (1 / 255)).astype(np.float32) - mean.astype(np.float32)) / std.astype(np.float32)
    _, gh, gw = grid
    x = x.transpose(2, 0, 1).reshape(3, gh // merge, merge, patch, gw // merge, merge, patch)
    x = x.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None].repeat(2, axis=5)
    return x.reshape(gh * gw, -1)


def test_there_are_enough_sizes() -> None:
    assert len(set(SIZES)) >= 200


@pytest.mark.parametrize("chunk", range(10))
def test_pixels_and_counts_equal_transformers(chunk: int) -> None:
    for width, height in SIZES[chunk::10]:
        image = noise(width, height)
        plan = processor().plan(width, height)
        expected = oracle()(images=[image], return_tensors="np")
        assert list(plan.grid) == expected["image_grid_thw"][0].tolist(), (width, height)
        assert plan.num_tokens == plan.grid[1] * plan.grid[2] // 4
        pixels = render(image, processor().views(image.size, plan))
        assert pixels.shape == (plan.height, plan.width, 3)
        assert pixels.dtype == np.uint8
        np.testing.assert_allclose(
            patchify(pixels, plan.grid), expected["pixel_values"], atol=1e-6, err_msg=f"{width}x{height}"
        )


def test_the_comparison_sees_another_filter() -> None:
    image = noise(101, 77)
    plan = processor().plan(101, 77)
    other = np.asarray(image.resize((plan.width, plan.height), Image.Resampling.BILINEAR))
    expected = oracle()(images=[image], return_tensors="np")["pixel_values"]
    assert np.abs(patchify(other, plan.grid) - expected).max() > 0.1


@pytest.mark.parametrize("size", [(201, 1), (1, 500), (10_000, 49)])
def test_extreme_aspect_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="aspect ratio"):
        processor().plan(*size)
    with pytest.raises(ValueError, match="aspect ratio"):
        oracle()(images=[Image.new("RGB", size)], return_tensors="np")


def test_limits_of_a_request_stay_within_the_checkpoints() -> None:
    free = processor().plan(1000, 1000)
    small = processor().plan(1000, 1000, PixelLimits(max_pixels=28 * 28 * 16))
    assert small.num_tokens <= 16 < free.num_tokens
    assert processor().plan(1000, 1000, PixelLimits(max_pixels=10**9)) == free
    large = processor().plan(30, 30, PixelLimits(min_pixels=28 * 28 * 9))
    assert large.num_tokens >= 9
    assert processor().limits_for("low").max_pixels == 512 * 512
    assert processor().limits_for("high") == PixelLimits()


def test_both_spellings_of_the_bounds(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"image_token_id": 7, "vision_config": {}}')
    found = []
    for text in (
        '{"min_pixels": 3136, "max_pixels": 12544}',
        '{"size": {"shortest_edge": 3136, "longest_edge": 12544}}',
    ):
        (tmp_path / "preprocessor_config.json").write_text(text)
        mine = Qwen2VLProcessor(tmp_path)
        found.append((mine.min_pixels, mine.max_pixels, mine.factor, mine.image_token_id))
    assert found == [(3136, 12544, 28, 7)] * 2


@pytest.mark.parametrize("seed", range(30))
def test_positions_equal_transformers(seed: int) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    rng = random.Random(seed)
    ids: list[int] = []
    plans = []
    for _ in range(rng.randint(0, 4)):
        ids += [rng.randrange(300) for _ in range(rng.randint(0, 12))]
        ids += [tiny.VISION_START, tiny.IMAGE_PAD, tiny.VISION_END]
        plans.append(processor().plan(rng.randint(20, 300), rng.randint(20, 300)))
    ids += [rng.randrange(300) for _ in range(rng.randint(1, 12))]
    prompt = processor().expand(ids, plans, [bytes([i]) * 32 for i in range(len(plans))])
    length = len(prompt.input_ids)
    assert length == len(ids) + sum(p.num_tokens - 1 for p in plans)
    for image, plan in zip(prompt.images, plans, strict=True):
        assert image.num_tokens == plan.num_tokens
        assert (prompt.input_ids[image.offset : image.offset + image.num_tokens] == tiny.IMAGE_PAD).all()
        assert prompt.input_ids[image.offset - 1] == tiny.VISION_START
    if not plans:
        assert prompt.positions is None
        assert prompt.position_delta == 0
        return

    config = AutoConfig.from_pretrained(tiny.qwen2_vl())
    stub = type("Stub", (), {"config": config, "get_vision_position_ids": Qwen2VLModel.get_vision_position_ids})()
    input_ids = torch.tensor(prompt.input_ids[None].astype(np.int64))
    kinds = (input_ids == tiny.IMAGE_PAD).int()
    grids = torch.tensor([p.grid for p in plans])
    positions, delta = Qwen2VLModel.get_rope_index(stub, input_ids, mm_token_type_ids=kinds, image_grid_thw=grids)
    assert prompt.positions is not None
    np.testing.assert_array_equal(prompt.positions, positions[:, 0].numpy())
    assert prompt.position_delta == int(delta[0])


def test_example_of_the_reference() -> None:
    """17 text, a picture of 6x9 cells, 2, one of 11x4, 17: by hand."""
    plans = [processor().plan(9 * 28, 6 * 28), processor().plan(4 * 28, 11 * 28)]
    ids = [1] * 17 + [tiny.IMAGE_PAD] + [2, 3] + [tiny.IMAGE_PAD] + [4] * 17
    prompt = processor().expand(ids, plans, [b"a" * 32, b"b" * 32])
    assert [p.num_tokens for p in plans] == [54, 44]
    assert len(prompt.input_ids) == 134
    assert prompt.positions is not None
    assert prompt.positions[:, 17].tolist() == [17, 17, 17]
    assert prompt.positions[:, 70].tolist() == [17, 22, 25]
    assert prompt.positions[:, 71].tolist() == [26, 26, 26]
    assert prompt.positions.max() == 55
    assert prompt.position_delta == -78


def test_placeholders_must_match_the_pictures() -> None:
    with pytest.raises(RequestError, match="1 picture placeholders for 0"):
        processor().expand([1, tiny.IMAGE_PAD], [], [])
