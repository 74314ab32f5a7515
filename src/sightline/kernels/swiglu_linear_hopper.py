"""A product of many rows that ends with SwiGLU, on Hopper, as in a step with prompts.

Two groups of four warps multiply, 64 rows of a tile each, one more warp fetches with the bulk copy engine, and a program takes tile
after tile: the next one's first blocks come while the last one's result is rounded. cuBLAS multiplies as fast, but its result
goes through memory to the activation's kernel. Rows of the weight come in groups of eight, the gate's group before that of the
up of the same features, so that both are in the same thread of the tensor cores' result.

Measured and no faster: three buffers, two with blocks of 128, other orders of the tiles, groups that begin one after the other, and
the layer's other products with this design.
"""

from __future__ import annotations

import torch
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

from sightline.kernels.common import multiprocessors
from sightline.kernels.gluon import barrier, load_box, silu_and_mul, store_box, suits_the_copy_engine

# Rows that four warps have of a tile; its rows of the weight, gates and ups; of K, what 128 bytes hold; buffers.
_PART, _BLOCK_N, _BLOCK_K, _STAGES = gl.constexpr(64), gl.constexpr(256), gl.constexpr(64), gl.constexpr(4)
_GROUPS, _FEATURES = gl.constexpr(16), gl.constexpr(128)
# Tiles of rows that share each of the weight's while it is in the L2 cache.
_SHARING = gl.constexpr(16)


@gluon.jit
def _place(t, tiles_m, tiles_n):
    """(m, n) of tile t."""
    whole = _SHARING * tiles_n
    band = t // whole
    height = gl.minimum(tiles_m - band * _SHARING, _SHARING)
    rest = t - band * whole
    return band * _SHARING + rest % height, rest // height


@gluon.jit
def _fetch(x, weight, xs, weights, full, done, tiles_m, tiles_n, blocks):
    """One warp: the blocks of K of all tiles of this program."""
    count = 0
    for t in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        m, n = _place(t, tiles_m, tiles_n)
        for j in range(blocks):
            i = count % _STAGES
            mbarrier.wait(done.index(i), ((count // _STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(i), (2 * _PART + _BLOCK_N) * _BLOCK_K * 2)
            load_box(weight, [n * _GROUPS, 0, 0, j * _BLOCK_K], full.index(i), weights.index(i))
            for part in gl.static_range(2):
                load_box(x, [(2 * m + part) * _PART, j * _BLOCK_K], full.index(i), xs.index(2 * i + part))
            count += 1


@gluon.jit
def _multiply(out, xs, weights, results, full, done, tiles_m, tiles_n, blocks, PART: gl.constexpr):
    """Four warps: rows 64 PART .. 64 PART + 63 of each tile."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _BLOCK_N, 16])
    result = results.index(PART)
    count = 0
    for t in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        m, n = _place(t, tiles_m, tiles_n)
        acc = gl.zeros([_PART, _BLOCK_N], gl.float32, ACC)
        for j in range(blocks):
            i = count % _STAGES
            mbarrier.wait(full.index(i), (count // _STAGES) & 1)
            rows = weights.index(i).reshape([_BLOCK_N, _BLOCK_K])
            product = warpgroup_mma(xs.index(2 * i + PART), rows.permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[product])
            # the block before was read by all four warps
            barrier()
            mbarrier.arrive(done.index((count - 1) % _STAGES), count=1, pred=j > 0)
            count += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        barrier()
        mbarrier.arrive(done.index((count - 1) % _STAGES), count=1)
        # columns in groups of eight, the gate's before the up's
        gate, up = acc.reshape([_PART, _GROUPS, 2, 8]).permute((0, 1, 3, 2)).split()
        values = silu_and_mul(gate, up, out.dtype).to(out.dtype).reshape([_PART, _FEATURES])
        tma.store_wait(0)
        barrier()
        result.store(values)
        fence_async_shared()
        barrier()
        store_box(out, [(2 * m + PART) * _PART, n * _FEATURES], result)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles_m", "tiles_n", "blocks"])
def _swiglu_linear_kernel(x, weight, out, tiles_m, tiles_n, blocks, num_warps: gl.constexpr):
    """Program: tiles as many apart as there are programs."""
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    xs = gl.allocate_shared_memory(x.dtype, [2 * _STAGES, _PART, _BLOCK_K], x.layout)
    weights = gl.allocate_shared_memory(weight.dtype, [_STAGES, _GROUPS, 2, 8, _BLOCK_K], weight.layout)
    results = gl.allocate_shared_memory(out.dtype, [2, _PART, _FEATURES], out.layout)
    full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BAR)
    done = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BAR)
    for i in gl.static_range(_STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(done.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (out, xs, weights, results, full, done, tiles_m, tiles_n, blocks, 0)),
            (_multiply, (out, xs, weights, results, full, done, tiles_m, tiles_n, blocks, 1)),
            (_fetch, (x, weight, xs, weights, full, done, tiles_m, tiles_n, blocks)),
        ],
        [4, 1],
        [232, 40],
    )
    for i in gl.static_range(_STAGES):
        mbarrier.invalidate(full.index(i))
        mbarrier.invalidate(done.index(i))


# Whether this kernel computes the product.
takes = suits_the_copy_engine


def swiglu_linear_hopper(x: Tensor, weight: Tensor) -> Tensor:
    """See `kernels.swiglu_linear.swiglu_linear`, which calls it where `takes` says so."""
    m, k = x.shape
    features, stride = weight.shape[0] // 2, weight.stride(0)
    out = torch.empty(m, features, dtype=x.dtype, device=x.device)
    layout, layout_w = (gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=r) for r in (2, 4))
    groups = [
        [features // 8, 2, 8, k],
        [8 * stride, features * stride, stride, 1],
        [_GROUPS.value, 2, 8, _BLOCK_K.value],
    ]

    def rows(tensor: Tensor, columns: int) -> TensorDescriptor:
        return TensorDescriptor(tensor, list(tensor.shape), [tensor.stride(0), 1], [_PART.value, columns], layout)

    tiles_m, tiles_n = triton.cdiv(m, 2 * _PART.value), triton.cdiv(features, _FEATURES.value)
    _swiglu_linear_kernel[(min(multiprocessors(x.device), tiles_m * tiles_n),)](
        rows(x, _BLOCK_K.value), TensorDescriptor(weight, *groups, layout_w), rows(out, _FEATURES.value),
        tiles_m, tiles_n, triton.cdiv(k, _BLOCK_K.value), num_warps=4,
    )  # fmt: skip
    return out
