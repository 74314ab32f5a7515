"""Pillow's resize of 8-bit pictures, one axis at a time, bit for bit.

The arithmetic is that of Pillow's Resample.c: weights in double precision, rounded to 22-bit fixed point, sums in int32.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

_BITS = tl.constexpr(22)
_HALF = tl.constexpr(1 << 21)
_BLOCK = 512
# Pillow's number of a filter -> its reach in pixels
_BILINEAR, _BICUBIC = 2, 3
_SUPPORT = {_BILINEAR: 1.0, _BICUBIC: 2.0}


@lru_cache(maxsize=256)
def weights(length: int, size: int, resample: int) -> np.ndarray:
    """int32 [1 + taps, size] for an axis of `length` resized to `size`: the first pixel of each sum, then its weights, each times
    2**22. Weights that stand for pixels behind the axis' end are 0."""
    scale = length / size
    stretch = max(scale, 1.0)
    support = _SUPPORT[resample] * stretch
    centre = (np.arange(size) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + support + 0.5).astype(np.int64), length)
    pixel = first + np.arange((last - first).max())[:, None]
    w = np.where(pixel < last, _filter(np.abs((pixel - centre + 0.5) * (1.0 / stretch)), resample), 0.0)
    # one after the other, as Pillow adds them: numpy's sum takes them in pairs
    w /= np.cumsum(w, axis=0)[-1]
    fixed = (w * (1 << _BITS.value) + np.copysign(0.5, w)).astype(np.int32)
    return np.concatenate([first[None].astype(np.int32), fixed])


def _filter(x: np.ndarray, resample: int) -> np.ndarray:
    if resample == _BILINEAR:
        return np.where(x < 1.0, 1.0 - x, 0.0)
    a = -0.5
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


# Any picture's sizes: a kernel for each kind of number would be compiled while requests wait.
@triton.jit(do_not_specialize=["present", "size", "inner", "taps", "start", "colour", "blocks"])
def _resize_axis_kernel(pixels, table, out, present, size, inner, taps, start, colour, blocks, BLOCK: tl.constexpr):
    """Program (line of the outer axis and block of its bytes). colour: red in the lowest 8 bits, then green and blue."""
    line = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    exists = at < size * inner
    place = at // inner
    byte = at - place * inner
    around = (colour >> (byte % 3 * 8)) & 255
    nearest = tl.load(table + place, mask=exists, other=0) - start
    pixels += line * present * inner
    total = tl.full((BLOCK,), _HALF, tl.int32)
    for tap in range(taps):
        weight = tl.load(table + (tap + 1) * size + place, mask=exists, other=0)
        pixel = nearest + tap
        inside = (pixel >= 0) & (pixel < present)
        value = tl.load(pixels + pixel.to(tl.int64) * inner + byte, mask=exists & inside, other=0).to(tl.int32)
        total += tl.where(inside, value, around) * weight
    value = tl.minimum(tl.maximum(total >> _BITS, 0), 255)
    tl.store(out + line * size * inner + at, value.to(tl.uint8), mask=exists)


def resize_axis(
    pixels: Tensor, size: int, resample: int, start: int = 0, length: int = 0, colour: tuple[int, int, int] = (0, 0, 0)
) -> Tensor:
    """uint8 [A, N, B], contiguous -> [A, size, B].

    B counts bytes of RGB, one pixel's or a row's. length: of the axis that is resized, N unless the pixels are only a part of it
    that begins at `start`; `colour` is around them. resample: 2 is bilinear, 3 bicubic.
    """
    assert pixels.is_contiguous()
    lines, present, inner = pixels.shape
    assert size * inner < 2**31
    table = torch.from_numpy(weights(length or present, size, resample))
    if pixels.device.type == "cuda":
        table = table.pin_memory().to(pixels.device, non_blocking=True)
    out = torch.empty((lines, size, inner), dtype=torch.uint8, device=pixels.device)
    blocks = triton.cdiv(size * inner, _BLOCK)
    red, green, blue = colour
    _resize_axis_kernel[(lines * blocks,)](
        pixels,
        table,
        out,
        present,
        size,
        inner,
        table.shape[0] - 1,
        start,
        red | green << 8 | blue << 16,
        blocks,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return out


def resize_axis_reference(
    pixels: Tensor, size: int, resample: int, start: int = 0, length: int = 0, colour: tuple[int, int, int] = (0, 0, 0)
) -> Tensor:
    """`resize_axis` in torch."""
    lines, present, inner = pixels.shape
    first, *taps = torch.from_numpy(weights(length or present, size, resample)).to(pixels.device)
    around = pixels.new_tensor(colour).repeat(inner // 3).expand(lines, 1, inner)
    # the last pixel is the colour, for all that is outside
    framed = torch.cat((pixels, around), dim=1).int()
    total = torch.full((lines, size, inner), _HALF.value, dtype=torch.int32, device=pixels.device)
    for tap, weight in enumerate(taps):
        pixel = first - start + tap
        pixel = torch.where((pixel >= 0) & (pixel < present), pixel, present)
        total += framed.index_select(1, pixel) * weight[:, None]
    return (total >> _BITS.value).clamp(0, 255).to(torch.uint8)
