"""Activations in one pass. As in `layers.activation`, SwiGLU's silu(gate) is rounded before the product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

_BLOCK = 1024


@triton.jit
def _silu_and_mul_kernel(gate_up, out, stride, width, BLOCK: tl.constexpr):
    """Program (row, block of columns)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate = tl.load(gate_up + row * stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + columns, mask=mask, other=0.0).to(tl.float32)
    rounded = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty)
    tl.store(out + row * width + columns, (rounded.to(tl.float32) * up).to(out.dtype.element_ty), mask=mask)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2 I], rows contiguous, gate beside up -> silu(gate) * up, [T, I], contiguous."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        grid = (rows, triton.cdiv(width, _BLOCK))
        _silu_and_mul_kernel[grid](gate_up, out, gate_up.stride(0), width, BLOCK=_BLOCK, num_warps=4)
    return out


@triton.jit
def _quick_gelu_kernel(x, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, (values / (1.0 + tl.exp(-1.702 * values))).to(out.dtype.element_ty), mask=mask)


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), contiguous, rounded once."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        _quick_gelu_kernel[(triton.cdiv(x.numel(), _BLOCK),)](x, out, x.numel(), BLOCK=_BLOCK, num_warps=4)
    return out


def quick_gelu_reference(x: Tensor) -> Tensor:
    """`quick_gelu` in torch."""
    return (x.float() * (1.702 * x.float()).sigmoid()).to(x.dtype)


def silu_and_mul_reference(gate_up: Tensor) -> Tensor:
    """`silu_and_mul` in torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
