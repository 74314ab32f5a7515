"""RMSNorm, alone and with the residual sum in front of it, in one pass.

Rounding is `layers.norm.RMSNorm`'s: the residual sum is rounded to the tensors' dtype and the norm reads the rounded sum; from
there on all is float32, rounded once at the end. (Sums are taken in another order than torch's.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F


@triton.jit
def _rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    total,
    eps,
    x_stride,
    residual_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    """Program (row). With ADD, total = x + residual is written and normalised, else x is normalised."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    values = tl.load(x + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(residual + row * residual_stride + columns, mask=mask, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + row * WIDTH + columns, rounded, mask=mask)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / WIDTH + eps)
    gain = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + columns, (values * scale * gain).to(out.dtype.element_ty), mask=mask)


def _launch(x: Tensor, residual: Tensor, weight: Tensor, out: Tensor, total: Tensor, eps: float, add: bool) -> None:
    rows, width = x.shape
    if rows == 0:
        return
    block = triton.next_power_of_2(width)
    _rms_norm_kernel[(rows,)](
        x,
        residual,
        weight,
        out,
        total,
        eps,
        x.stride(0),
        residual.stride(0),
        WIDTH=width,
        BLOCK=block,
        ADD=add,
        num_warps=max(1, min(8, block // 512)),
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, width], rows contiguous; weight [width] -> x / sqrt(mean(x^2) + eps) * weight, contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, x, weight, out, out, eps, False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual [T, width], rows contiguous -> (norm(x + residual), x + residual), both new and contiguous."""
    out, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch(x, residual, weight, out, total, eps, True)
    return out, total


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in torch."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in torch."""
    total = x + residual
    return rms_norm_reference(total, weight, eps), total
