"""A decoder layer's matrix products for a few rows, as when some clients decode: bound by reading the weights once.

The rows are the narrow side of each tile, and the weights its wide one. Where tiles of whole rows of the weight are too few for
the device, several programs share one: each leaves its sum in a workspace, and the last to come adds them up in a fixed
order, so that the result does not depend on who was last. On a Hopper card `kernels.skinny_linear_hopper` does the same faster.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from sightline.kernels.common import dot, hopper_form

_MAX_BLOCKS = 16384


@triton.jit
def _finish(
    acc, bias, residual, out, features, rows, m, n, block,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SWIGLU: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_N, BLOCK_M] to the output."""
    dtype = out.dtype.element_ty
    if SWIGLU:
        half: tl.constexpr = BLOCK_N // 2
        gate, up = tl.split(tl.permute(tl.reshape(acc, (2, half, BLOCK_M)), (1, 2, 0)))
        gate = gate.to(dtype).to(tl.float32)
        rounded = (gate / (1.0 + tl.exp(-gate))).to(dtype)
        acc = rounded.to(tl.float32) * up.to(dtype).to(tl.float32)
        features = block * half + tl.arange(0, half)
    known = features < n
    mask = known[:, None] & (rows < m)[None, :]
    at = rows[None, :] * n + features[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + features, mask=known, other=0.0).to(tl.float32)[:, None]
    if HAS_RESIDUAL:
        acc += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["m"])
def _skinny_linear_kernel(
    x, weight, bias, residual, out, parts, arrived, m, n, k, stride_x, stride_weight, length, num_splits,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SWIGLU: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (block of output features, split of K). With SWIGLU, `weight` has n more rows behind the first n, and a block
    takes half of its rows from each."""
    block, split = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, BLOCK_N)
    if SWIGLU:
        half: tl.constexpr = BLOCK_N // 2
        features = block * half + i % half + (i // half) * n
        exists = block * half + i % half < n
    else:
        features = block * BLOCK_N + i
        exists = features < n
    rows = tl.arange(0, BLOCK_M)
    inner = tl.arange(0, BLOCK_K)
    first = split * length
    tiles = weight + (features.to(tl.int64) * stride_weight + first)[:, None] + inner[None, :]
    inputs = x + rows[:, None] * stride_x + (first + inner)[None, :]
    live = (rows < m)[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, length, BLOCK_K):
        if EVEN:
            tile = tl.load(tiles, eviction_policy="evict_first")
            values = tl.load(inputs, mask=live, other=0.0)
        else:
            inside = (first + start + inner < tl.minimum(first + length, k))[None, :]
            tile = tl.load(tiles, mask=inside & exists[:, None], other=0.0, eviction_policy="evict_first")
            values = tl.load(inputs, mask=live & inside, other=0.0)
        acc = dot(tile, tl.trans(values), acc)
        tiles += BLOCK_K
        inputs += BLOCK_K
    if SPLIT:
        width = tl.num_programs(0) * BLOCK_N
        at = parts + rows[None, :] * width + (block * BLOCK_N + i)[:, None]
        mask = (rows < m)[None, :]
        tl.store(at + split * BLOCK_M * width, acc, mask=mask)
        tl.debug_barrier()
        last = tl.atomic_add(arrived + block, 1, sem="acq_rel") == num_splits - 1
        if last:
            # as it was found, for the next launch
            tl.store(arrived + block, 0)
            acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for other in range(num_splits):
                acc += tl.load(at + other * BLOCK_M * width, mask=mask, other=0.0, cache_modifier=".cg")
            _finish(
                acc, bias, residual, out, features, rows, m, n, block,
                HAS_BIAS, HAS_RESIDUAL, SWIGLU, BLOCK_N, BLOCK_M,
            )  # fmt: skip
    else:
        _finish(
            acc, bias, residual, out, features, rows, m, n, block,
            HAS_BIAS, HAS_RESIDUAL, SWIGLU, BLOCK_N, BLOCK_M,
        )  # fmt: skip


class Shape(NamedTuple):
    """Tile of the weight and how many programs share its K."""

    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int


def skinny_shape(n: int, k: int, itemsize: int) -> Shape:
    """The one that is used unless a caller names another: fastest on an H200; float32 is for tests."""
    if itemsize != 2:
        return Shape(32, 32, 2 if k >= 128 else 1, 4, 2)
    if n >= 100_000:
        return Shape(128, 128, 1, 4, 3)
    tiles = -(-n // 64)
    splits = next((s for s in (1, 2, 4, 8) if tiles * s >= 128), 8)
    while splits > 1 and k % (128 * splits):
        splits //= 2
    return Shape(64, 128, splits, 4, 4)


@functools.cache
def _arrivals(device: torch.device, stream: int) -> Tensor:
    """int32 zeros, one for each block; every launch on `stream` leaves zeros."""
    return torch.zeros(_MAX_BLOCKS, dtype=torch.int32, device=device)


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    swiglu: bool = False,
    shape: Shape | None = None,
) -> Tensor:
    """x [M, K] weight [N, K]^T (+ bias [N]) (+ residual [M, N]) -> [M, N], contiguous; sums in float32, rounded once.

    M is at most 128. swiglu: weight is [2 N, K], gate above up, and the result silu(gate) * up, rounded as `silu_and_mul`
    does. Rows of x and weight and the whole residual are contiguous. shape: of the portable kernel, which it then is.
    """
    m, k = x.shape
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    arrived = _arrivals(x.device, stream)
    hopper = hopper_form("skinny_linear", x)
    if shape is None and hopper is not None and hopper.takes(x, weight, bias, swiglu):
        result: Tensor = hopper.skinny_linear_hopper(x, weight, bias, residual, swiglu, arrived)
        return result
    total = weight.shape[0]
    n = total // 2 if swiglu else total
    shape = shape or skinny_shape(total, k, x.element_size())
    block_n, block_k, splits, warps, stages = shape
    block_m = max(16, triton.next_power_of_2(m))
    blocks = triton.cdiv(n, block_n // 2 if swiglu else block_n)
    length = triton.cdiv(triton.cdiv(k, block_k), splits) * block_k
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    parts = out
    if splits > 1:
        parts = torch.empty(splits * block_m * blocks * block_n, dtype=torch.float32, device=x.device)
    assert blocks <= _MAX_BLOCKS
    even = k == length * splits and n % (block_n // 2 if swiglu else block_n) == 0
    _skinny_linear_kernel[(blocks, splits)](
        x, weight, bias, residual, out, parts, arrived, m, n, k, x.stride(0), weight.stride(0), length, splits,
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, SWIGLU=swiglu, SPLIT=splits > 1, EVEN=even,
        BLOCK_N=block_n, BLOCK_M=block_m, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def skinny_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None, swiglu: bool = False
) -> Tensor:
    """`skinny_linear` in torch, sums in float32."""
    out = F.linear(x.float(), weight.float())
    if swiglu:
        gate, up = out.to(x.dtype).chunk(2, dim=-1)
        out = (F.silu(gate) * up).float()
    if bias is not None:
        out = out + bias.float()
    return (out if residual is None else out + residual.float()).to(x.dtype)
