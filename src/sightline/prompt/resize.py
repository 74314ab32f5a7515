"""Pillow's resize on several threads. It is most of the time between a large picture's arrival and its encoding."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import PIL
from PIL import Image

# Pixels in and out from which threads pay.
_LARGE = 1_000_000
_THREADS = min(4, os.cpu_count() or 1)
_PILLOW = tuple(map(int, PIL.__version__.split(".")[:2]))


def columns_first(before: tuple[int, int], after: tuple[int, int]) -> bool:
    """Whether Pillow resizes columns before rows, from (width, height) before and after; the rounding in between shows it.

    Releases before 12.2 never do; those before 13 do for pictures more than a hundred times as high as wide (Image.resize);
    later ones where the height shrinks by more than twice what the width does (ImagingResampleInner in Resample.c).
    """
    shrinks = before[1] - after[1]
    if shrinks <= 0 or _PILLOW < (12, 2):
        return False
    return before[1] > 100 * before[0] if _PILLOW < (13, 0) else shrinks > 2 * (before[0] - after[0])


def resize(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """`image.resize(size, resample)`, byte for byte.

    Pillow makes two passes with 8-bit pixels between them. Rows do not depend on each other, nor do columns, so each pass is
    cut into bands. It begins with the rows unless the height shrinks, when its choice differs between releases: then, and for
    small pictures, the work is left to it.
    """
    width, height = size
    if _THREADS == 1 or height < image.height or image.width * image.height + width * height < _LARGE:
        return image.resize(size, resample)
    if width != image.width:
        image = _in_bands(image, (width, image.height), resample, rows=True)
    if height != image.height:
        image = _in_bands(image, size, resample, rows=False)
    return image


def _in_bands(image: Image.Image, size: tuple[int, int], resample: Image.Resampling, rows: bool) -> Image.Image:
    """One pass: the axis along the bands keeps its size."""
    length = image.height if rows else image.width
    count = min(_THREADS, length)
    cuts = [length * i // count for i in range(count + 1)]
    result = Image.new(image.mode, size)

    def band(start: int, end: int) -> None:
        if rows:
            part = image.crop((0, start, image.width, end)).resize((size[0], end - start), resample)
        else:
            part = image.crop((start, 0, end, image.height)).resize((end - start, size[1]), resample)
        result.paste(part, (0, start) if rows else (start, 0))

    list(_pool().map(band, cuts[:-1], cuts[1:]))
    return result


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="sightline-resize")
