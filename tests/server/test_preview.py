"""POST /v1/images/preview: the engine's own pixels, for every family, behind the same checks as a chat."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

from sightline.prompt.pipeline import PromptPipeline
from sightline.prompt.preview import preview
from sightline.prompt.processor import render
from sightline.server.preview import PreviewRequest, _previews
from tests import tiny, tiny_llava, tiny_mllama
from tests.server.conftest import data_url, image_part, picture

FAMILIES = {
    "qwen2_vl": tiny.qwen2_vl,
    "llava": lambda: tiny_llava.llava("llava"),
    "llava_next": lambda: tiny_llava.llava("next"),
    "llava_onevision": lambda: tiny_llava.llava("onevision"),
    "mllama": tiny_mllama.mllama,
}


def post(url: str, **body: Any) -> requests.Response:
    return requests.post(f"{url}/v1/images/preview", json=body, timeout=30)


def pixels(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def test_pixels_cells_and_tokens(tiny_server: str) -> None:
    part = image_part(1, width=200, height=100)
    answer = post(tiny_server, images=[part, image_part(2)]).json()
    assert [item["index"] for item in answer["data"]] == [0, 1]
    item = answer["data"][0]
    (view,) = item["views"]
    cells = view["cells"]
    assert (item["width"], item["height"]) == (200, 100)
    assert (cells["unit"], cells["width"], cells["height"]) == ("patch", 28, 28)
    assert (cells["columns"] * 28, cells["rows"] * 28) == (view["width"], view["height"]) == (196, 112)
    assert item["image_tokens"] == cells["rows"] * cells["columns"]
    resized = Image.open(io.BytesIO(picture(1, 200, 100))).resize((196, 112), Image.Resampling.BICUBIC)
    assert np.array_equal(pixels(view["image_url"]["url"]), np.asarray(resized))
    chat = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
    usage = requests.post(f"{tiny_server}/v1/chat/completions", json=chat, timeout=30).json()["usage"]
    assert usage["prompt_tokens_details"]["image_tokens"] == item["image_tokens"]


def test_bounds_and_detail_count(tiny_server: str) -> None:
    part = image_part(3, width=200, height=200)
    bounded = post(tiny_server, images=[part], mm_processor_kwargs={"max_pixels": 56 * 56}).json()["data"][0]
    assert (bounded["views"][0]["width"], bounded["image_tokens"]) == (56, 4)


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({"images": []}, 400, "images", "empty_array"),
        ({}, 400, "images", "missing_required_parameter"),
        ({"images": [{"type": "text", "text": "a"}]}, 400, "images[0].type", None),
        (
            {"images": [image_part(1), {"type": "image_url", "image_url": {"url": data_url(picture(1)[:900])}}]},
            400,
            "images[1].image_url",
            "image_parse_error",
        ),
        ({"images": [image_part(1)] * 17}, 400, "images", None),
        ({"images": [image_part(1)], "model": "other"}, 404, "model", "model_not_found"),
        ({"images": [image_part(1)], "num_images": 0}, 400, "num_images", "invalid_type"),
        (
            {"images": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]},
            403,
            "images[0].image_url",
            None,
        ),
    ],
    ids="none missing text broken many model num_images file".split(),
)
def test_what_is_refused(tiny_server: str, body: dict, status: int, param: str, code: str | None) -> None:
    response = post(tiny_server, **body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert code is None or error["code"] == code


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_shows_what_its_processor_makes(family: str) -> None:
    """Cut at its cells, a preview is what the vision tower gets."""
    asyncio.run(_compare(FAMILIES[family](), family))


async def _compare(model_dir: Path, family: str) -> None:
    pipeline = PromptPipeline(model_dir, allow_local=True)
    processor = pipeline.processor
    assert processor is not None
    image = Image.open(io.BytesIO(picture(5, 150, 70)))
    prompt = await pipeline.chat([{"role": "user", "content": [{"type": "image", "image": picture(5, 150, 70)}]}])
    (given,) = prompt.pictures.values()
    seen = await preview(pipeline, given)
    await pipeline.close()
    assert (seen.size, seen.num_tokens) == ((150, 70), prompt.num_image_tokens)
    whole = [np.asarray(Image.open(io.BytesIO(view.png))) for view in seen.views]
    for array, view in zip(whole, seen.views, strict=True):
        cells = view.cells
        assert array.shape == (view.height, view.width, 3)
        assert cells.rows * cells.height <= view.height < (cells.rows + 1) * cells.height
        assert cells.columns * cells.width <= view.width < (cells.columns + 1) * cells.width
    expected = render(image, processor.views(image.size, given.plan))
    if family == "qwen2_vl":
        assert np.array_equal(whole[0], expected)
        return
    side = expected.shape[1]
    tiles = [
        a[y : y + side, x : x + side] for a in whole for y in range(0, len(a), side) for x in range(0, a.shape[1], side)
    ]
    assert np.array_equal(np.stack(tiles), expected)
    units = ["tile"] if family == "mllama" else ["patch"] if family == "llava" else ["patch", "tile"]
    assert [view.cells.unit for view in seen.views] == units


def test_company_changes_onevision() -> None:
    """Several pictures in one prompt have no tiles there, whether they are all sent or only counted."""
    part = image_part(5, width=150, height=70)
    bodies = [{"images": [part]}, {"images": [part], "num_images": 2}, {"images": [part, part]}]

    async def shown() -> list[int]:
        lifecycle = SimpleNamespace(pipeline=PromptPipeline(tiny_llava.llava("onevision")))
        answers = [await _previews(lifecycle, PreviewRequest.parse(json.dumps(body).encode())) for body in bodies]
        await lifecycle.pipeline.close()
        return [len(answer[0]["views"]) for answer in answers]

    assert asyncio.run(shown()) == [2, 1, 1]
