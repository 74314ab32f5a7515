"""Norms in one pass, rounded as those of `layers.norm` are: all is float32 up to the end. (Sums are taken in another order.)"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sightline.kernels.common import on_hopper


@triton.jit
def _rms_norm_kernel(
    x, weight, out, eps, stride, EARLY: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Program (row). EARLY: it is launched before the kernel in front has ended, and so may be the one behind it."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    values = tl.load(x + row * stride + columns, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / WIDTH + eps)
    gain = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + columns, (values * scale * gain).to(out.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, width], rows contiguous; weight [width] -> x / sqrt(mean(x^2) + eps) * weight, contiguous."""
    rows, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows:
        block = triton.next_power_of_2(width)
        warps = max(1, min(8, block // 512))
        # `kernels.skinny_linear_hopper` behind it then reads weights meanwhile
        early = {"launch_pdl": True} if on_hopper(x) else {}
        _rms_norm_kernel[(rows,)](
            x, weight, out, eps, x.stride(0), EARLY=bool(early), WIDTH=width, BLOCK=block, num_warps=warps, **early
        )
    return out


@triton.jit
def _bias_layer_norm_kernel(x, pending, weight, bias, out, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row)."""
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    values += tl.load(pending + columns, mask=mask, other=0.0).to(tl.float32)
    rounded = values.to(x.dtype.element_ty)
    tl.store(x + at, rounded, mask=mask)
    values = rounded.to(tl.float32)
    mean = tl.sum(values, 0) / WIDTH
    centred = tl.where(mask, values - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / WIDTH + eps)
    gain = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, (centred * scale * gain + shift).to(out.dtype.element_ty), mask=mask)


def bias_layer_norm(x: Tensor, pending: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Add `pending` [width] to x [T, width] in place; returns its LayerNorm. x is contiguous."""
    assert x.is_contiguous()
    rows, width = x.shape
    out = torch.empty_like(x)
    if rows:
        block = triton.next_power_of_2(width)
        warps = max(1, min(8, block // 512))
        _bias_layer_norm_kernel[(rows,)](x, pending, weight, bias, out, eps, WIDTH=width, BLOCK=block, num_warps=warps)
    return out


def bias_layer_norm_reference(x: Tensor, pending: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`bias_layer_norm` in torch."""
    return F.layer_norm(x.add_(pending), (x.shape[-1],), weight, bias, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in torch."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)
