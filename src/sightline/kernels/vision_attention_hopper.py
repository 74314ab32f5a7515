"""`vision_attention` for Hopper's tensor cores: three groups of four warps compute, two more warps fetch.

A head is taken as two pieces, 64 and 16 columns. The groups share the keys that the bulk copy engine brings, and one's products run
during the others' softmax (the first of FlashAttention-3's two overlaps: Shah et al. 2024, arXiv:2407.08608, section 3.1). For the
second, inside a group, as in `prefill_attention_hopper`, registers suffice with shorter blocks or fewer groups only.

Measured on an H200 for 5476 patches and slower: that overlap with two groups or blocks of 64 keys, by 15 to 19 %; four groups, or two
programs on a multiprocessor, with blocks of 64 and without it, by 6 and 13 % (two programs take 4 % less for six pictures of 1296). Groups
that take turns with their products are 5 % faster for 21904 patches, and within 1 % for 5476 and 1296.
"""

from __future__ import annotations

import math

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sightline.kernels.gluon import barrier, load_box

# Four warps each, with so many rows.
_GROUPS = gl.constexpr(3)
_PART = gl.constexpr(64)
# Keys of a block, and blocks in shared memory.
_BLOCK_N = gl.constexpr(128)
_STAGES = gl.constexpr(3)
_MAIN = gl.constexpr(64)
_REST = gl.constexpr(16)
_LOG2_E = math.log2(math.e)


@gluon.jit
def _fetch(main, rest, tiles, tiles_rest, full, done, picture, column, blocks):
    """One warp: a picture's keys or values, block by block; zeros behind them."""
    for j in range(blocks):
        i = j % _STAGES
        mbarrier.wait(done.index(i), ((j // _STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(i), _BLOCK_N * (_MAIN + _REST) * 2)
        load_box(main, [picture, j * _BLOCK_N, column], full.index(i), tiles.index(i))
        load_box(rest, [picture, j * _BLOCK_N, column + _MAIN], full.index(i), tiles_rest.index(i))


@gluon.jit
def _block(acc, acc_rest, top, total, memory, j, num_patches, scale, MASKED: gl.constexpr):
    """Attention to block j. MASKED: it may have keys beyond the last."""
    q_main, q_rest, ks, ks_rest, vs, vs_rest, k_full, v_full, done = memory
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _BLOCK_N, 16])
    MAIN: gl.constexpr = acc.type.layout
    REST: gl.constexpr = acc_rest.type.layout
    P_MAIN: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=MAIN, k_width=2)
    P_REST: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=REST, k_width=2)
    i = j % _STAGES
    phase = (j // _STAGES) & 1
    keys = ks.index(i).reshape([_BLOCK_N, _MAIN]).permute((1, 0))
    keys_rest = ks_rest.index(i).reshape([_BLOCK_N, _REST]).permute((1, 0))
    values = vs.index(i).reshape([_BLOCK_N, _MAIN])
    values_rest = vs_rest.index(i).reshape([_BLOCK_N, _REST])
    zeros = gl.zeros([_PART, _BLOCK_N], gl.float32, S)
    mbarrier.wait(k_full.index(i), phase)
    s = warpgroup_mma(q_main, keys, zeros, use_acc=False, is_async=True)
    s = warpgroup_mma(q_rest, keys_rest, s, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[s])
    if MASKED:
        columns = gl.arange(0, _BLOCK_N, layout=gl.SliceLayout(0, S))
        scores = gl.where((columns < num_patches - j * _BLOCK_N)[None, :], scores, float("-inf"))
    new_top = gl.maximum(top, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - new_top[:, None])
    fade = gl.exp2(top - new_top)
    total = total * fade + gl.sum(weights, 1)
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, MAIN))[:, None]
    acc_rest = acc_rest * gl.convert_layout(fade, gl.SliceLayout(1, REST))[:, None]
    rounded = weights.to(ks.dtype)
    mbarrier.wait(v_full.index(i), phase)
    o = warpgroup_mma(gl.convert_layout(rounded, P_MAIN), values, acc, is_async=True)
    r = warpgroup_mma(gl.convert_layout(rounded, P_REST), values_rest, acc_rest, is_async=True)
    acc, acc_rest = warpgroup_mma_wait(0, deps=[o, r])
    barrier()
    mbarrier.arrive(done.index(i), count=1)
    return acc, acc_rest, new_top, total


@gluon.jit
def _places(
    tensor, stride, head, row0, FIRST: gl.constexpr, COUNT: gl.constexpr, HEAD_DIM: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """(where they are, whether they exist): COUNT columns of the head, from FIRST on, in a group's rows."""
    first, column, num_patches = head
    rows = row0 + gl.arange(0, _PART, layout=gl.SliceLayout(1, LAYOUT))
    dims = FIRST + gl.arange(0, COUNT, layout=gl.SliceLayout(0, LAYOUT))
    at = tensor + (first + rows)[:, None] * stride + column + dims[None, :]
    return at, (rows < num_patches)[:, None] & (dims < HEAD_DIM)[None, :]


@gluon.jit
def _attend(q, out, stride, stride_out, memory, head, row0, scale, HEAD_DIM: gl.constexpr, GROUP: gl.constexpr):
    """Four warps: rows row0 + GROUP * _PART and so on of a picture."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _BLOCK_N, 16])
    MAIN: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _MAIN, 16])
    REST: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _REST, 16])
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    LOAD_REST: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])
    q_mains, q_rests, ks, ks_rest, vs, vs_rest, k_full, v_full, done = memory
    q_main = q_mains.index(GROUP)
    q_rest = q_rests.index(GROUP)
    memory = (q_main, q_rest, ks, ks_rest, vs, vs_rest, k_full, v_full, done)
    num_patches = head[2]
    row0 += GROUP * _PART
    # zeros where a head is narrower than the rest: what keys and values have there is the next head's
    at, live = _places(q, stride, head, row0, 0, _MAIN, HEAD_DIM, LOAD)
    q_main.store(gl.load(at, mask=live, other=0.0))
    at, live = _places(q, stride, head, row0, _MAIN, _REST, HEAD_DIM, LOAD_REST)
    q_rest.store(gl.load(at, mask=live, other=0.0))
    fence_async_shared()
    barrier()

    acc = gl.zeros([_PART, _MAIN], gl.float32, MAIN)
    acc_rest = gl.zeros([_PART, _REST], gl.float32, REST)
    top = gl.full([_PART], float("-inf"), gl.float32, gl.SliceLayout(1, S))
    total = gl.zeros([_PART], gl.float32, gl.SliceLayout(1, S))
    whole = num_patches // _BLOCK_N
    for j in range(whole):
        acc, acc_rest, top, total = _block(acc, acc_rest, top, total, memory, j, num_patches, scale, False)
    # a loop of one round at most: with a branch in its place ptxas wants more instructions for descriptors in the other (not timed)
    for j in range(whole, gl.cdiv(num_patches, _BLOCK_N)):
        acc, acc_rest, top, total = _block(acc, acc_rest, top, total, memory, j, num_patches, scale, True)

    share = 1.0 / total
    result = acc * gl.convert_layout(share, gl.SliceLayout(1, MAIN))[:, None]
    at, live = _places(out, stride_out, head, row0, 0, _MAIN, HEAD_DIM, MAIN)
    gl.store(at, result.to(out.dtype.element_ty), mask=live)
    result = acc_rest * gl.convert_layout(share, gl.SliceLayout(1, REST))[:, None]
    at, live = _places(out, stride_out, head, row0, _MAIN, _REST, HEAD_DIM, REST)
    gl.store(at, result.to(out.dtype.element_ty), mask=live)


@gluon.jit(do_not_specialize=["num_patches"])
def _vision_hopper_kernel(
    q, out, k_main, k_rest, v_main, v_rest, num_patches, scale, stride, stride_out,
    HEAD_DIM: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Program (block of patches, head, picture)."""
    ROWS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * _MAIN, element_bitwidth=16, rank=2)
    ROWS_REST: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * _REST, element_bitwidth=16, rank=2)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    dtype: gl.constexpr = k_main.dtype
    picture = gl.program_id(2)
    row0 = gl.program_id(0) * (_GROUPS * _PART)
    column = gl.program_id(1) * HEAD_DIM
    blocks = gl.cdiv(num_patches, _BLOCK_N)

    q_mains = gl.allocate_shared_memory(dtype, [_GROUPS, _PART, _MAIN], ROWS)
    q_rests = gl.allocate_shared_memory(dtype, [_GROUPS, _PART, _REST], ROWS_REST)
    ks = gl.allocate_shared_memory(dtype, [_STAGES, 1, _BLOCK_N, _MAIN], k_main.layout)
    ks_rest = gl.allocate_shared_memory(dtype, [_STAGES, 1, _BLOCK_N, _REST], k_rest.layout)
    vs = gl.allocate_shared_memory(dtype, [_STAGES, 1, _BLOCK_N, _MAIN], v_main.layout)
    vs_rest = gl.allocate_shared_memory(dtype, [_STAGES, 1, _BLOCK_N, _REST], v_rest.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BAR)
    v_full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BAR)
    done = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BAR)
    for t in gl.static_range(_STAGES):
        mbarrier.init(k_full.index(t), count=1)
        mbarrier.init(v_full.index(t), count=1)
        mbarrier.init(done.index(t), count=_GROUPS)
    fence_async_shared()
    memory = (q_mains, q_rests, ks, ks_rest, vs, vs_rest, k_full, v_full, done)
    head = (picture.to(gl.int64) * num_patches, column, num_patches)
    gl.warp_specialize(
        [
            (_attend, (q, out, stride, stride_out, memory, head, row0, scale, HEAD_DIM, 0)),
            (_attend, (q, out, stride, stride_out, memory, head, row0, scale, HEAD_DIM, 1)),
            (_attend, (q, out, stride, stride_out, memory, head, row0, scale, HEAD_DIM, 2)),
            (_fetch, (k_main, k_rest, ks, ks_rest, k_full, done, picture, column, blocks)),
            (_fetch, (v_main, v_rest, vs, vs_rest, v_full, done, picture, column, blocks)),
        ],
        [4, 4, 1, 1],
        [160, 160, 24, 24],
    )
    for t in gl.static_range(_STAGES):
        mbarrier.invalidate(k_full.index(t))
        mbarrier.invalidate(v_full.index(t))
        mbarrier.invalidate(done.index(t))


def takes(q: Tensor) -> bool:
    """Whether this kernel computes queries [rows, heads, head_dim] with such strides, on a Hopper card."""
    return (
        q.element_size() == 2
        and _MAIN.value < q.shape[2] <= _MAIN.value + _REST.value
        # the copy engine's rule
        and q.stride(0) * q.element_size() % 16 == 0
        and q.shape[2] * q.element_size() % 16 == 0
    )


def vision_attention_hopper(q: Tensor, k: Tensor, v: Tensor, num_pictures: int, out: Tensor) -> None:
    """See `kernels.vision_attention.vision_attention`, which calls it where `takes` says so."""
    num_rows, num_heads, head_dim = q.shape
    num_patches, stride, width = num_rows // num_pictures, q.stride(0), num_heads * head_dim

    def rows(tensor: Tensor, columns: int) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout(swizzle_byte_width=2 * columns, element_bitwidth=16, rank=3)
        shape, strides = [num_pictures, num_patches, width], [num_patches * stride, stride, 1]
        return TensorDescriptor(tensor, shape, strides, [1, _BLOCK_N.value, columns], layout)

    main, rest = _MAIN.value, _REST.value
    _vision_hopper_kernel[(triton.cdiv(num_patches, _GROUPS.value * _PART.value), num_heads, num_pictures)](
        q, out, rows(k, main), rows(k, rest), rows(v, main), rows(v, rest),
        num_patches, head_dim**-0.5 * _LOG2_E, stride, width, HEAD_DIM=head_dim, num_warps=4,
    )  # fmt: skip
