"""`vision_attention` for Hopper's tensor cores: a block's scores are computed while the softmax of the block before is.

FlashAttention-3's overlap inside a warp group (Shah et al. 2024, arXiv:2407.08608, section 3.2): products are asynchronous, and
the bulk copy engine brings keys and values. Measured on H200 and H100 beside the kernel that needs no Hopper: 16 heads of 80, 5476
patches 0.40 ms instead of 0.58, three pictures of 1296 0.078 instead of 0.111; heads of 72, ten tiles of 729 0.096 instead of
0.138. A head is taken as two pieces, 64 and 16. The last block has a loop of its own, which masks: a branch would make ptxas run
one product after the other.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_LOG2_E = math.log2(math.e)
_MAIN = 64
_REST = 16
# four for each of 132 multiprocessors
_MANY = 528
# named so since triton 3.9
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def _fetch(main, rest, bar, tiles, tiles_rest, picture, row, column, i, wanted, BLOCK_N: gl.constexpr):
    """Begin to load BLOCK_N rows into buffer i, unless they are beyond the last."""
    mbarrier.expect(bar.index(i), BLOCK_N * 160, wanted)
    _load(main, [picture, row, column], bar.index(i), tiles.index(i), wanted)
    _load(rest, [picture, row, column + 64], bar.index(i), tiles_rest.index(i), wanted)


@gluon.jit
def _step(
    acc, acc_rest, rounded, top, total, q_main, q_rest, ks, ks_rest, vs, vs_rest, k_bar, v_bar,
    k_main, k_rest, v_main, v_rest, picture, column, num_patches, j, blocks, scale,
    MASKED: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Block j's scores, and behind them the sum of the block before, which goes on during this one's softmax. MASKED: it may have
    keys beyond the last."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_N, 16])
    MAIN: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, 64, 16])
    REST: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, 16, 16])
    P_MAIN: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=MAIN, k_width=2)
    P_REST: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=REST, k_width=2)
    i = j % STAGES
    i_before = (j - 1) % STAGES
    zeros = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, S)
    mbarrier.wait(k_bar.index(i), (j // STAGES) & 1)
    s = warpgroup_mma(q_main, ks.index(i).reshape([BLOCK_N, 64]).permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma(q_rest, ks_rest.index(i).reshape([BLOCK_N, 16]).permute((1, 0)), s, is_async=True)
    mbarrier.wait(v_bar.index(i_before), ((j - 1) // STAGES) & 1)
    o = warpgroup_mma(gl.convert_layout(rounded, P_MAIN), vs.index(i_before).reshape([BLOCK_N, 64]), acc, is_async=True)
    r = warpgroup_mma(
        gl.convert_layout(rounded, P_REST), vs_rest.index(i_before).reshape([BLOCK_N, 16]), acc_rest, is_async=True
    )
    scores = warpgroup_mma_wait(2, deps=[s])
    ahead = j + STAGES
    _fetch(k_main, k_rest, k_bar, ks, ks_rest, picture, ahead * BLOCK_N, column, i, ahead < blocks, BLOCK_N)
    if MASKED:
        columns = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S))
        scores = gl.where((columns < num_patches - j * BLOCK_N)[None, :], scores, float("-inf"))
    new_top = gl.maximum(top, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - new_top[:, None])
    fade = gl.exp2(top - new_top)
    total = total * fade + gl.sum(weights, 1)
    rounded = weights.to(k_main.dtype)
    acc, acc_rest = warpgroup_mma_wait(0, deps=[o, r])
    ahead -= 1
    _fetch(v_main, v_rest, v_bar, vs, vs_rest, picture, ahead * BLOCK_N, column, i_before, ahead < blocks, BLOCK_N)
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, MAIN))[:, None]
    acc_rest = acc_rest * gl.convert_layout(fade, gl.SliceLayout(1, REST))[:, None]
    return acc, acc_rest, rounded, new_top, total


@gluon.jit(do_not_specialize=["num_patches"])
def _vision_hopper_kernel(
    q, out, k_main, k_rest, v_main, v_rest, num_patches, scale, stride, stride_out,
    HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Program (block of patches, head, picture)."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_N, 16])
    MAIN: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, 64, 16])
    REST: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, 16, 16])
    P_MAIN: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=MAIN, k_width=2)
    P_REST: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=REST, k_width=2)
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    LOAD_REST: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [num_warps, 1], [1, 0])
    dtype: gl.constexpr = k_main.dtype
    picture = gl.program_id(2)
    first = picture.to(gl.int64) * num_patches
    row0 = gl.program_id(0) * BLOCK_M
    column = gl.program_id(1) * HEAD_DIM

    rows = row0 + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, LOAD))
    dims = gl.arange(0, 64, layout=gl.SliceLayout(0, LOAD))
    queries = gl.load(
        q + (first + rows)[:, None] * stride + column + dims[None, :], mask=(rows < num_patches)[:, None], other=0.0
    )
    rows = row0 + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, LOAD_REST))
    dims = 64 + gl.arange(0, 16, layout=gl.SliceLayout(0, LOAD_REST))
    # zeros where a head is narrower: what keys and values have there is the next head's
    queries_rest = gl.load(
        q + (first + rows)[:, None] * stride + column + dims[None, :],
        mask=(rows < num_patches)[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    )
    q_main = gl.allocate_shared_memory(dtype, [BLOCK_M, 64], gl.NVMMASharedLayout(128, 16, 2), queries)
    q_rest = gl.allocate_shared_memory(dtype, [BLOCK_M, 16], gl.NVMMASharedLayout(32, 16, 2), queries_rest)
    ks = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, 64], k_main.layout)
    ks_rest = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, 16], k_rest.layout)
    vs = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, 64], v_main.layout)
    vs_rest = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, 16], v_rest.layout)
    k_bar = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_bar = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for t in gl.static_range(STAGES):
        mbarrier.init(k_bar.index(t), count=1)
        mbarrier.init(v_bar.index(t), count=1)
    fence_async_shared()
    blocks = gl.cdiv(num_patches, BLOCK_N)
    for t in gl.static_range(STAGES):
        _fetch(k_main, k_rest, k_bar, ks, ks_rest, picture, t * BLOCK_N, column, t, t < blocks, BLOCK_N)
        _fetch(v_main, v_rest, v_bar, vs, vs_rest, picture, t * BLOCK_N, column, t, t < blocks, BLOCK_N)

    columns = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S))
    zeros = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, S)
    acc = gl.zeros([BLOCK_M, 64], gl.float32, MAIN)
    acc_rest = gl.zeros([BLOCK_M, 16], gl.float32, REST)

    mbarrier.wait(k_bar.index(0), 0)
    s = warpgroup_mma(q_main, ks.index(0).reshape([BLOCK_N, 64]).permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma(q_rest, ks_rest.index(0).reshape([BLOCK_N, 16]).permute((1, 0)), s, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[s])
    _fetch(k_main, k_rest, k_bar, ks, ks_rest, picture, STAGES * BLOCK_N, column, 0, blocks > STAGES, BLOCK_N)
    scores = gl.where((columns < num_patches)[None, :], scores, float("-inf"))
    top = gl.max(scores, 1) * scale
    weights = gl.exp2(scores * scale - top[:, None])
    total = gl.sum(weights, 1)
    rounded = weights.to(dtype)
    whole = num_patches // BLOCK_N
    for j in range(1, whole):
        acc, acc_rest, rounded, top, total = _step(
            acc, acc_rest, rounded, top, total, q_main, q_rest, ks, ks_rest, vs, vs_rest, k_bar, v_bar,
            k_main, k_rest, v_main, v_rest, picture, column, num_patches, j, blocks, scale,
            False, BLOCK_M, BLOCK_N, STAGES, num_warps,
        )  # fmt: skip
    for j in range(gl.maximum(whole, 1), blocks):
        acc, acc_rest, rounded, top, total = _step(
            acc, acc_rest, rounded, top, total, q_main, q_rest, ks, ks_rest, vs, vs_rest, k_bar, v_bar,
            k_main, k_rest, v_main, v_rest, picture, column, num_patches, j, blocks, scale,
            True, BLOCK_M, BLOCK_N, STAGES, num_warps,
        )  # fmt: skip
    last = (blocks - 1) % STAGES
    mbarrier.wait(v_bar.index(last), ((blocks - 1) // STAGES) & 1)
    o = warpgroup_mma(gl.convert_layout(rounded, P_MAIN), vs.index(last).reshape([BLOCK_N, 64]), acc, is_async=True)
    r = warpgroup_mma(
        gl.convert_layout(rounded, P_REST), vs_rest.index(last).reshape([BLOCK_N, 16]), acc_rest, is_async=True
    )
    acc, acc_rest = warpgroup_mma_wait(0, deps=[o, r])
    for t in gl.static_range(STAGES):
        mbarrier.invalidate(k_bar.index(t))
        mbarrier.invalidate(v_bar.index(t))

    share = 1.0 / total
    rows_out = row0 + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, MAIN))
    dims_out = gl.arange(0, 64, layout=gl.SliceLayout(0, MAIN))
    result = acc * gl.convert_layout(share, gl.SliceLayout(1, MAIN))[:, None]
    at = out + (first + rows_out)[:, None] * stride_out + column + dims_out[None, :]
    gl.store(at, result.to(dtype), mask=(rows_out < num_patches)[:, None])
    rows_out = row0 + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, REST))
    dims_out = 64 + gl.arange(0, 16, layout=gl.SliceLayout(0, REST))
    result = acc_rest * gl.convert_layout(share, gl.SliceLayout(1, REST))[:, None]
    at = out + (first + rows_out)[:, None] * stride_out + column + dims_out[None, :]
    gl.store(at, result.to(dtype), mask=(rows_out < num_patches)[:, None] & (dims_out < HEAD_DIM)[None, :])


class Tile(NamedTuple):
    """Patches and keys of a tile, and how it is compiled."""

    block_m: int
    block_n: int
    stages: int
    num_warps: int


def hopper_tile(num_patches: int, num_heads: int, num_pictures: int) -> Tile:
    """The fastest on an H200: four small programs on a multiprocessor, unless there are too many of them with few keys each."""
    num_small = triton.cdiv(num_patches, 64) * num_heads * num_pictures
    return Tile(64, 64, 3, 4) if num_patches >= 2048 or num_small <= _MANY else Tile(128, 64, 3, 4)


def takes(q: Tensor) -> bool:
    """Whether this kernel computes queries [rows, heads, head_dim] with such strides, on a Hopper card."""
    return (
        q.element_size() == 2
        and _MAIN < q.shape[2] <= _MAIN + _REST
        # the copy engine's rule
        and q.stride(0) * q.element_size() % 16 == 0
        and q.shape[2] * q.element_size() % 16 == 0
    )


def vision_attention_hopper(
    q: Tensor, k: Tensor, v: Tensor, num_pictures: int, out: Tensor, tile: Tile | None = None
) -> None:
    """See `kernels.vision_attention.vision_attention`, which calls it where `takes` says so. tile: `hopper_tile` unless given."""
    num_rows, num_heads, head_dim = q.shape
    num_patches, stride, width = num_rows // num_pictures, q.stride(0), num_heads * head_dim
    tile = tile or hopper_tile(num_patches, num_heads, num_pictures)

    def rows(tensor: Tensor, columns: int) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout(swizzle_byte_width=2 * columns, element_bitwidth=16, rank=3)
        shape, strides = [num_pictures, num_patches, width], [num_patches * stride, stride, 1]
        return TensorDescriptor(tensor, shape, strides, [1, tile.block_n, columns], layout)

    _vision_hopper_kernel[(triton.cdiv(num_patches, tile.block_m), num_heads, num_pictures)](
        q, out, rows(k, _MAIN), rows(k, _REST), rows(v, _MAIN), rows(v, _REST),
        num_patches, head_dim**-0.5 * _LOG2_E, stride, width,
        HEAD_DIM=head_dim, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, STAGES=tile.stages, num_warps=tile.num_warps,
    )  # fmt: skip
