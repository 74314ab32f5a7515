"""`skinny_linear` for Hopper: the bulk copy engine streams the weight, and begins before the kernel in front has ended.

Weights do not depend on that kernel, so a program asks for as much of its own as its shared memory holds, and only then waits
for the inputs (programmatic dependent launch): reading goes on from one product to the next. Tiles that do not fill the device once
more are shared, K by K, by all its programs. Rows of the weight come in groups of eight, the gate's group before that of the
up of the same features, so that both are in the same thread of the tensor cores' result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sightline.kernels.common import multiprocessors
from sightline.kernels.gluon import barrier, load_box, silu_and_mul, suits_the_copy_engine

# Programs that share a tile, at most.
_MOST_SPLITS = 8
# Shared memory of the pipeline of a program, which is alone on its multiprocessor.
_PIPELINE = 224 * 1024


@gluon.jit
def _place(j, blocks, rounds, programs, program, slot, begin):
    """Tile of this program's block j, and which block of K it is."""
    tile = j // blocks
    shared = tile >= rounds
    inner = j - tile * blocks + gl.where(shared, begin, 0)
    return gl.where(shared, rounds * programs + slot, tile * programs + program), inner


@gluon.jit
def _sum(
    acc, parts, arrived, m, slot, split,
    SPLITS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    """The sum over all programs that share the tile, in a fixed order, and whether this one is the last: else it is not known."""
    PART: gl.constexpr = BLOCK_N * BLOCK_M
    row = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, ACC))[:, None]
    column = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, ACC))[None, :]
    # what a warp has at once lies side by side
    at = parts + slot.to(gl.int64) * (SPLITS * PART)
    at += ((row // 8) * (BLOCK_M // 8) + column // 8) * 64 + row % 8 * 8 + column % 8
    live = (column // 8 * 8 < m) & (row >= 0)
    gl.store(at + split * PART, acc, mask=live)
    barrier()
    last = gl.atomic_add(arrived + slot, 1, sem="acq_rel") == SPLITS - 1
    if last:
        # as it was found, for the next launch
        gl.store(arrived + slot, 0)
        acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, ACC)
        for other in gl.static_range(SPLITS):
            acc += gl.load(at + other * PART, mask=live, other=0.0, cache_modifier=".cg")
    return acc, last


@gluon.jit
def _pairs(values, BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr):
    """Even and odd groups of eight rows."""
    return values.reshape([BLOCK_N // 16, 2, 8, BLOCK_M]).permute((0, 2, 3, 1)).split()


@gluon.jit
def _finish(
    acc, bias, residual, out, m, n, tile,
    HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr, SWIGLU: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    """acc [BLOCK_N, BLOCK_M] of a tile to the output."""
    dtype: gl.constexpr = out.dtype.element_ty
    i = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, ACC))
    rows = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, ACC))
    if SWIGLU:
        features = tile * (BLOCK_N // 2) + i // 16 * 8 + i % 8
    else:
        features = tile * BLOCK_N + i
    if HAS_BIAS:
        acc += gl.load(bias + features, mask=features < n, other=0.0).to(gl.float32)[:, None]
    mask = ((features < n)[:, None] & (rows < m)[None, :]).to(gl.int32)
    at = rows[None, :] * n + features[:, None]
    if SWIGLU:
        gate, up = _pairs(acc, BLOCK_N, BLOCK_M)
        at, _ = _pairs(at, BLOCK_N, BLOCK_M)
        mask, _ = _pairs(mask, BLOCK_N, BLOCK_M)
        acc = silu_and_mul(gate, up, dtype)
    if HAS_RESIDUAL:
        acc += gl.load(residual + at, mask=mask != 0, other=0.0).to(gl.float32)
    gl.store(out + at, acc.to(dtype), mask=mask != 0)


@gluon.jit(do_not_specialize=["m", "rounds", "rest", "programs"])
def _skinny_hopper_kernel(
    weight, x, bias, residual, out, parts, arrived, m, n, blocks, rounds, rest, programs,
    HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr, SWIGLU: gl.constexpr, SPLITS: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Program: `rounds` tiles of BLOCK_N rows of the weight, `programs` apart, each of `blocks` blocks of K; and of one of the
    `rest` tiles behind them one of SPLITS shares of K."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_M, 16])
    BYTES: gl.constexpr = (BLOCK_N + BLOCK_M) * BLOCK_K * 2
    GROUPS: gl.constexpr = BLOCK_N // 16
    tiles = gl.allocate_shared_memory(weight.dtype, [STAGES, GROUPS, 2, 8, BLOCK_K], weight.layout)
    inputs = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_M, BLOCK_K], x.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for t in gl.static_range(STAGES):
        mbarrier.init(ready.index(t), count=1)
    fence_async_shared()
    gdc_launch_dependents()

    program = gl.program_id(0)
    has_share = (program < rest * SPLITS).to(gl.int32)
    split = program // gl.maximum(rest, 1)
    slot = program % gl.maximum(rest, 1)
    begin = split * blocks // SPLITS
    size = (split + 1) * blocks // SPLITS - begin
    count = rounds * blocks + has_share * size
    for t in gl.static_range(STAGES):
        tile, inner = _place(t, blocks, rounds, programs, program, slot, begin)
        mbarrier.expect(ready.index(t), BYTES, t < count)
        load_box(weight, [tile * GROUPS, 0, 0, inner * BLOCK_K], ready.index(t), tiles.index(t), t < count)
    gdc_wait()
    for t in gl.static_range(STAGES):
        tile, inner = _place(t, blocks, rounds, programs, program, slot, begin)
        load_box(x, [0, inner * BLOCK_K], ready.index(t), inputs.index(t), t < count)

    for u in range(rounds + has_share):
        # not carried from tile to tile: triton 3.6 takes such a number for constant
        done = u * blocks
        last = u < rounds
        acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, ACC)
        for j in range(done, done + gl.where(last, blocks, size)):
            i = j % STAGES
            mbarrier.wait(ready.index(i), (j // STAGES) & 1)
            rows = tiles.index(i).reshape([BLOCK_N, BLOCK_K])
            acc = warpgroup_mma(rows, inputs.index(i).permute((1, 0)), acc)
            # read by all before it is overwritten
            barrier()
            wanted = j + STAGES < count
            place, inner = _place(j + STAGES, blocks, rounds, programs, program, slot, begin)
            mbarrier.expect(ready.index(i), BYTES, wanted)
            load_box(weight, [place * GROUPS, 0, 0, inner * BLOCK_K], ready.index(i), tiles.index(i), wanted)
            load_box(x, [0, inner * BLOCK_K], ready.index(i), inputs.index(i), wanted)
        if SPLITS > 1:
            if u >= rounds:
                acc, last = _sum(acc, parts, arrived, m, slot, split, SPLITS, BLOCK_N, BLOCK_M, ACC)
        else:
            last = u >= 0
        if last:
            whole = gl.where(u < rounds, u * programs + program, rounds * programs + slot)
            _finish(acc, bias, residual, out, m, n, whole, HAS_BIAS, HAS_RESIDUAL, SWIGLU, BLOCK_N, BLOCK_M, ACC)


class Stream(NamedTuple):
    """Tile of x and the weight, and how deep the pipeline is."""

    block_m: int
    block_n: int
    block_k: int
    stages: int


def stream_for(num_rows: int) -> Stream:
    """The fastest on an H200, where wider tiles, and two or three programs on a multiprocessor, were slower."""
    block_m, block_n = max(16, triton.next_power_of_2(num_rows)), 64
    block_k = 256 if block_m == 16 else 128
    return Stream(block_m, block_n, block_k, _PIPELINE // ((block_m + block_n) * block_k * 2))


def takes(x: Tensor, weight: Tensor, bias: Tensor | None, swiglu: bool) -> bool:
    """Whether this kernel computes the product."""
    return suits_the_copy_engine(x, weight) and not (swiglu and bias is not None)


def skinny_linear_hopper(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    swiglu: bool,
    arrived: Tensor,
) -> Tensor:
    """See `kernels.skinny_linear.skinny_linear`, which calls it where `takes` says so. arrived: int32 zeros, left so."""
    m, k = x.shape
    total, stride = weight.shape[0], weight.stride(0)
    n = total // 2 if swiglu else total
    block_m, block_n, block_k, stages = stream_for(m)
    tiles, blocks = triton.cdiv(total, block_n), triton.cdiv(k, block_k)
    programs = multiprocessors(x.device)
    rounds, rest = divmod(tiles, programs)
    splits = min(programs // rest, blocks, _MOST_SPLITS) if rest else 1
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    parts = out
    if splits > 1:
        assert rest <= arrived.shape[0]
        parts = torch.empty(rest * splits * block_n * block_m, dtype=torch.float32, device=x.device)
    # pairs of groups of eight rows: gate and up, or neighbours
    pair, group = (8, n) if swiglu else (16, 8)
    layout, layout_x = (gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=r) for r in (4, 2))
    strides, box = [pair * stride, group * stride, stride, 1], [block_n // 16, 2, 8, block_k]
    _skinny_hopper_kernel[(programs if rounds else rest * splits,)](
        TensorDescriptor(weight, [total // 16, 2, 8, k], strides, box, layout),
        TensorDescriptor(x, [m, k], [x.stride(0), 1], [block_m, block_k], layout_x),
        bias, residual, out, parts, arrived, m, n, blocks, rounds, rest, programs,
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, SWIGLU=swiglu, SPLITS=splits,
        BLOCK_N=block_n, BLOCK_M=block_m, BLOCK_K=block_k, STAGES=stages, num_warps=4, launch_pdl=True,
    )  # fmt: skip
    return out
