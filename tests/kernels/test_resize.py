"""Resizing on the device gives Pillow's bytes: single axes, and every family's views."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("triton", reason="no triton on this machine")

from sightline.engine.render import render as render_on_device
from sightline.kernels import resize as module
from sightline.kernels.resize import resize_axis, resize_axis_reference
from sightline.models.loader import architecture, read_config
from sightline.prompt.processor import PixelLimits, Processor, load_processor, render
from sightline.registry import FAMILIES
from sightline.types import View
from tests import tiny, tiny_llava, tiny_mllama

CHECKPOINTS: dict[str, Callable[[], Path]] = {
    "qwen2-vl": tiny.qwen2_vl,
    "mllama": tiny_mllama.mllama,
    "llava-crop": lambda: tiny_llava.llava(kind="llava"),
    "llava-pad": lambda: tiny_llava.llava(kind="llava", pad=True),
    "llava-next": lambda: tiny_llava.llava(kind="next"),
    "onevision": lambda: tiny_llava.llava(kind="onevision", text="qwen2"),
}


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 10007 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def check(image: Image.Image, views: tuple[View, ...], device: torch.device) -> None:
    """The interpreter checks the kernel, the reference its arithmetic; on a GPU the kernel does both."""
    got = render_on_device(torch.from_numpy(np.array(image)).to(device), views).cpu().numpy()
    np.testing.assert_array_equal(got, render(image, views), err_msg=f"{image.size} {views}")


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Where kernels are interpreted, which is slow, the kernel's torch equal in its place."""
    if device.type == "cpu":
        monkeypatch.setattr(module, "resize_axis", resize_axis_reference)


def sides(rnd: random.Random, largest: float) -> tuple[int, int]:
    return int(2 ** rnd.uniform(0, largest)), int(2 ** rnd.uniform(0, largest))


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC], ids=lambda f: f.name)
def test_any_size_equals_pillow(resample: Image.Resampling, device: torch.device) -> None:
    rnd = random.Random(0)
    sizes = [(sides(rnd, 9.5), sides(rnd, 9.5)) for _ in range(300)]
    sizes += [
        ((1, 1), (70, 70)),
        ((3000, 2), (1, 9)),
        ((2, 3000), (9, 1)),
        ((1024, 64), (1036, 56)),
        ((40, 90), (40, 30)),
    ]
    for before, after in sizes:
        image = noise(*before)
        got = render_on_device(torch.from_numpy(np.array(image)).to(device), (View(size=after, resample=resample),))
        expected = np.asarray(image.resize(after, resample))
        np.testing.assert_array_equal(got.cpu().numpy(), expected, err_msg=f"{before} {after}")


def test_the_kernel_equals_its_reference(device: torch.device) -> None:
    rnd = random.Random(1)
    for _ in range(25):
        lines, pixels, inner = rnd.randint(1, 3), rnd.randint(1, 90), 3 * rnd.choice((1, 2, 40))
        length = pixels + rnd.choice((0, 0, rnd.randint(1, 30)))
        data = torch.randint(0, 256, (lines, pixels, inner), dtype=torch.uint8, device=device)
        size, resample, start = rnd.randint(1, 120), rnd.choice((2, 3)), (length - pixels) // 2
        args = (data, size, resample, start, length, (122, 116, 104))
        assert torch.equal(resize_axis(*args), resize_axis_reference(*args)), args[1:]


def family(name: str) -> Processor:
    folder = CHECKPOINTS[name]()
    processor = load_processor(FAMILIES[architecture(read_config(folder))].processor, folder)
    assert processor is not None
    return processor


def views_of(processor: Any, size: tuple[int, int], **limits: Any) -> tuple[View, ...]:
    views: tuple[View, ...] = processor.views(size, processor.plan(*size, PixelLimits(**limits)))
    return views


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_views_of_every_family_are_the_same_bytes(name: str, device: torch.device) -> None:
    processor, rnd = family(name), random.Random(2)
    sizes = [(56, 56), (200, 199), (300, 20), (20, 300), (113, 112), (640, 480)]
    sizes += [(rnd.randint(20, 400), rnd.randint(20, 400)) for _ in range(40)]
    for size in sizes:
        for single in (False, True):
            check(noise(*size), views_of(processor, size, single=single), device)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_kernel_makes_the_views_of_every_family(name: str, device: torch.device) -> None:
    processor = family(name)
    size = (30, 57)
    check(noise(*size), views_of(processor, size), device)


def test_another_pass_order_would_be_seen() -> None:
    """The rounding between the passes is visible, so the order that Pillow takes matters."""
    image = noise(60, 200)
    rows = image.resize((50, 200), Image.Resampling.BICUBIC).resize((50, 40), Image.Resampling.BICUBIC)
    columns = image.resize((60, 40), Image.Resampling.BICUBIC).resize((50, 40), Image.Resampling.BICUBIC)
    assert not np.array_equal(np.asarray(rows), np.asarray(columns))
