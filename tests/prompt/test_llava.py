"""The LLaVA family's picture arithmetic beside transformers' PIL processors: pixels, token counts, grids, placeholders."""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sightline.errors import CheckpointError, ImageError, RequestError
from sightline.prompt.llava import LlavaProcessor
from sightline.prompt.pipeline import PromptPipeline
from sightline.prompt.processor import PixelLimits, render
from tests import llava_oracle, released, tiny_llava

KINDS: dict[str, dict[str, Any]] = {
    "crop": {"kind": "llava"},
    "pad": {"kind": "llava", "pad": True},
    "next": {"kind": "next"},
    "onevision": {"kind": "onevision", "text": "qwen2"},
}
SIZES = [
    *[(w, h) for w in (1, 2, 3, 13, 27, 55, 56, 57, 60, 61) for h in (1, 2, 28, 56, 60, 100)],
    *[(random.Random(i).randint(1, 400), random.Random(1000 + i).randint(1, 400)) for i in range(120)],
    *[(200, 1), (1, 200), (600, 5), (5, 600), (480, 270), (320, 240), (256, 256), (75, 300), (112, 112), (113, 112)],
    *[(56 * k + d, 70) for k in range(1, 5) for d in (-1, 0, 1)],
    *[(130, 60 * k + d) for k in range(1, 5) for d in (-1, 0, 1)],
]


@functools.cache
def folder(kind: str) -> Path:
    return tiny_llava.llava(**KINDS[kind])


@functools.cache
def processor(kind: str) -> LlavaProcessor:
    return LlavaProcessor(folder(kind))


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 10007 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def normalised(kind: str, pixels: np.ndarray) -> np.ndarray:
    """float32 [tiles, 3, S, S], as transformers feeds its tower."""
    file = json.loads((folder(kind) / "preprocessor_config.json").read_text())
    mean, std = (np.array(file[key], dtype=np.float32) for key in ("image_mean", "image_std"))
    x = ((pixels.astype(np.float64) * (1 / 255)).astype(np.float32) - mean) / std
    return x.transpose(0, 3, 1, 2)


def expected_pixels(kind: str, pictures: list[Image.Image]) -> list[np.ndarray]:
    values = llava_oracle.preprocess(folder(kind), pictures)["pixel_values"].numpy()
    return [v if v.ndim == 4 else v[None] for v in values]


def test_there_are_enough_sizes() -> None:
    assert len(set(SIZES)) >= 200


@pytest.mark.parametrize("chunk", range(8))
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_equal_transformers(kind: str, chunk: int) -> None:
    mine = processor(kind)
    for width, height in SIZES[chunk::8]:
        image = noise(width, height)
        plan = mine.plan(width, height)
        pixels = render(image, mine.views(image.size, plan))
        assert pixels.dtype == np.uint8
        (expected,) = expected_pixels(kind, [image])
        assert pixels.shape[0] == expected.shape[0], (width, height)
        np.testing.assert_allclose(normalised(kind, pixels), expected, atol=1e-6, err_msg=f"{width}x{height}")


@pytest.mark.parametrize("kind", ["next", "onevision"])
def test_token_counts_equal_transformers(kind: str) -> None:
    rng = random.Random(0)
    sizes = [*SIZES, *((rng.randint(1, 3000), rng.randint(1, 3000)) for _ in range(2000))]
    for width, height in sizes:
        if max(width, height) > 200 * min(width, height):
            continue
        plan = processor(kind).plan(width, height)
        assert plan.num_tokens == llava_oracle.num_tokens(folder(kind), height, width), (width, height)
        assert plan.grid[0] > 0


@pytest.mark.parametrize("chunk", range(4))
def test_pictures_in_company_equal_transformers(chunk: int) -> None:
    """OneVision's second mode: padded to squares, no tiles, one newline each."""
    mine = processor("onevision")
    limits = mine.limits_among(PixelLimits(), 2)
    for width, height in SIZES[chunk::4]:
        image = noise(width, height)
        plan = mine.plan(width, height, limits)
        assert plan.grid == (0, 1, 0)
        assert plan.num_tokens == 17
        expected = expected_pixels("onevision", [image, image])[0]
        got = normalised("onevision", render(image, mine.views(image.size, plan)))
        np.testing.assert_allclose(got, expected, atol=1e-6, err_msg=f"{width}x{height}")


@pytest.mark.parametrize(("attribute", "value"), [("_resample", Image.Resampling.BILINEAR), ("_background", (0, 0, 0))])
def test_the_comparison_sees_a_mistake(monkeypatch: pytest.MonkeyPatch, attribute: str, value: Any) -> None:
    mine = LlavaProcessor(folder("pad"))
    monkeypatch.setattr(mine, attribute, value)
    image = noise(101, 77)
    (expected,) = expected_pixels("pad", [image])
    assert np.abs(normalised("pad", render(image, mine.views(image.size, mine.plan(101, 77)))) - expected).max() > 0.1


def test_counts_of_the_releases(tmp_path: Path) -> None:
    sizes = [(336, 336), (640, 480), (1024, 1024), (1920, 1080), (300, 1200), (4096, 3072)]
    for architecture, side, counts in (
        ("LlavaForConditionalGeneration", 336, [576] * 6),
        ("LlavaNextForConditionalGeneration", 336, [1176, 2340, 2928, 1948, 1944, 2340]),
        ("LlavaOnevisionForConditionalGeneration", 384, [1485, 2929, 7371, 7269, 3753, 7309]),
    ):
        config = {"architectures": [architecture], "vision_config": {"image_size": side, "patch_size": 14}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        mine = LlavaProcessor(tmp_path)
        assert [mine.plan(w, h).num_tokens for w, h in sizes] == counts, architecture


def test_limits_and_detail() -> None:
    mine, tile = processor("next"), tiny_llava.CLIP_SIZE
    assert mine.plan(500, 500).grid[0] == 2
    assert mine.plan(500, 500, PixelLimits(max_pixels=3 * tile * tile)).grid[0] < 3
    assert mine.plan(500, 500, PixelLimits(max_pixels=1)).grid == (0, 0, 0)
    low = mine.plan(500, 300, mine.limits_for("low"))
    assert (low.grid, low.num_tokens) == ((0, 0, 0), 16)
    assert render(noise(500, 300), mine.views((500, 300), low)).shape == (1, tile, tile, 3)
    assert mine.limits_for("high") == PixelLimits()
    assert mine.limits_among(PixelLimits(), 3) == PixelLimits()
    one = processor("onevision")
    assert one.limits_among(PixelLimits(), 1) == PixelLimits()
    assert one.plan(500, 300, one.limits_for("low")).grid == (0, 1, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(201, 1), (1, 500), (10_000, 49)])
def test_extreme_aspect_is_refused(kind: str, size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="aspect ratio"):
        processor(kind).plan(*size)


def test_placeholders() -> None:
    mine = processor("next")
    plans = [mine.plan(100, 150), mine.plan(64, 64)]
    ids = [1, 2, tiny_llava.IMAGE, 3, tiny_llava.IMAGE]
    prompt = mine.expand(ids, plans, [b"a" * 32, b"b" * 32])
    a, b = (plan.num_tokens for plan in plans)
    assert prompt.input_ids.tolist() == [1, 2, *[tiny_llava.IMAGE] * a, 3, *[tiny_llava.IMAGE] * b]
    assert [(i.offset, i.num_tokens, i.grid) for i in prompt.images] == [
        (2, a, plans[0].grid),
        (3 + a, b, plans[1].grid),
    ]
    assert (prompt.positions, prompt.position_delta) == (None, 0)
    with pytest.raises(RequestError, match="2 picture placeholders for 1"):
        mine.expand(ids, plans[:1], [b"a" * 32])
    assert mine.expand([5, 6], [], []).input_ids.tolist() == [5, 6]


# ---- the authors' layout ----


def original(**options: Any) -> Path:
    return tiny_llava.llava(layout="original", **options)


@pytest.mark.parametrize(("kind", "options"), list(KINDS.items()))
def test_authors_files_mean_the_same(kind: str, options: dict[str, Any]) -> None:
    """Pixels and counts of the same model in transformers' layout; the tokenizer has no placeholder."""
    theirs = LlavaProcessor(original(**options))
    assert theirs.image_token_id == tiny_llava.ORIGINAL_IMAGE
    for width, height in SIZES[::9]:
        plan = processor(kind).plan(width, height)
        assert theirs.plan(width, height) == plan
        image = noise(width, height)
        assert theirs.views(image.size, plan) == processor(kind).views(image.size, plan)


def test_known_towers_need_no_folder(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlavaQwenForCausalLM"],
        "vocab_size": 100,
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": "(1x1),...,(6x6)",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert LlavaProcessor(tmp_path).plan(1024, 1024).num_tokens == 7371
    (tmp_path / "config.json").write_text(json.dumps({**config, "mm_vision_tower": "somebody/unknown"}))
    with pytest.raises(CheckpointError, match="somebody/unknown"):
        LlavaProcessor(tmp_path)


def test_sizes_that_do_not_fit_the_tower(tmp_path: Path) -> None:
    target = Path(shutil.copytree(folder("next"), tmp_path / "model"))
    file = json.loads((target / "preprocessor_config.json").read_text())
    (target / "preprocessor_config.json").write_text(json.dumps({**file, "crop_size": {"height": 28, "width": 28}}))
    with pytest.raises(CheckpointError, match="crop_size"):
        LlavaProcessor(target)


# ---- through the pipeline ----


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    noise(width, height).save(buffer, "PNG")
    return buffer.getvalue()


def chat(pipeline: PromptPipeline, *parts: Any, **options: Any) -> Any:
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return asyncio.run(pipeline.chat([{"role": "user", "content": content}], **options))


def test_company_changes_the_picture_and_its_identity() -> None:
    pipeline = PromptPipeline(folder("onevision"), allow_local=True)
    a, b = png(100, 150), png(90, 60)
    alone, both = chat(pipeline, a, "what?"), chat(pipeline, a, "and", b)
    assert alone.images[0].grid[0] > 0
    assert [image.grid for image in both.images] == [(0, 1, 0)] * 2
    assert alone.images[0].digest != both.images[0].digest
    assert chat(pipeline, b, a).images[1].digest == both.images[0].digest
    next_ = PromptPipeline(folder("next"), allow_local=True)
    assert chat(next_, a, "what?").images[0].digest == chat(next_, a, b).images[0].digest


def test_modalities_of_sglang() -> None:
    """Accepted, though several pictures need no field."""
    pipeline = PromptPipeline(folder("onevision"))
    url = "data:image/png;base64," + base64.b64encode(png(100, 150)).decode()
    grids = []
    for extra in ({}, {"modalities": "image"}, {"modalities": "multi-images"}):
        part = {"type": "image_url", "image_url": {"url": url}, **extra}
        grids.append(asyncio.run(pipeline.chat([{"role": "user", "content": [part]}])).images[0].grid)
    assert grids[0] == grids[1]
    assert grids[2] == (0, 1, 0)
    part = {"type": "image_url", "image_url": {"url": url}, "modalities": "video"}
    with pytest.raises(RequestError, match="modalities"):
        asyncio.run(pipeline.chat([{"role": "user", "content": [part]}]))


@pytest.mark.parametrize("kind", ["pad", "onevision"])
def test_users_cannot_type_a_placeholder(kind: str) -> None:
    """The authors' tokenizers have no `<image>`: the template's becomes the reserved id, the user's stays text."""
    for model_dir in (folder(kind), original(**KINDS[kind])):
        pipeline = PromptPipeline(model_dir, allow_local=True)
        prompt = chat(pipeline, "a <image> b", png(40, 40), "<image>")
        placeholders = (prompt.input_ids == pipeline.processor.image_token_id).sum()  # type: ignore[union-attr]
        assert placeholders == prompt.images[0].num_tokens == prompt.num_image_tokens
        text = pipeline.tokenizer.decode([i for i in prompt.input_ids.tolist() if i < tiny_llava.IMAGE])
        assert text.count("<image>") == 2


def test_the_families_template_is_used_where_there_is_none() -> None:
    vicuna = PromptPipeline(original(kind="llava", pad=True), allow_local=True)
    text = vicuna.tokenizer.decode([i for i in chat(vicuna, png(40, 40), "hi").input_ids.tolist() if i < 320])
    assert text.startswith("A chat between a curious user")
    assert text.endswith("USER: \nhi ASSISTANT:")


def test_resizing_in_strips_is_resizing(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = processor("pad")
    whole = {}
    for strip in (1, 7, 256, 100_000):
        monkeypatch.setattr("sightline.prompt.processor._STRIP", strip)
        whole[strip] = [
            render(noise(w, h), mine.views((w, h), mine.plan(w, h))).tobytes()
            for w, h in ((300, 20), (20, 300), (200, 199))
        ]
    assert len({tuple(v) for v in whole.values()}) == 1


def test_the_map_is_cut_as_each_sides_code_cuts_it(tmp_path: Path) -> None:
    """294 * (108 / 1323) is 23.999999999999996: 24 rows of the picture to transformers, 23 to the authors."""
    theirs, authors = tmp_path / "theirs", tmp_path / "authors"
    released.write("llava-onevision-7b", theirs)
    released.write("llava-onevision-7b, authors'", authors)
    for width, height in ((1323, 294), (1323, 147), (1024, 768)):
        rows = np.arange(27)
        scale = 108 / width
        margin = (27 - int(height * scale)) // 2
        plan = LlavaProcessor(authors).plan(width, height)
        if height != 768:
            kept = len(rows[margin : 27 - margin])
            assert (plan.grid, plan.num_tokens) == ((1, kept, 108), 729 + kept * 109)
            assert LlavaProcessor(theirs).plan(width, height).grid == (1, kept + 2, 108)
        else:
            assert plan == LlavaProcessor(theirs).plan(width, height)
