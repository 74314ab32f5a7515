"""`prefill_attention` for Hopper's tensor cores: two groups of four warps compute, two more warps fetch.

FlashAttention-3's design (Shah et al. 2024, arXiv:2407.08608, section 3): products are asynchronous, so that a block's scores are computed
before the sum of the block before, and that goes on during this one's softmax; each group has 64 rows of a tile, and its products run
during the other's softmax. The bulk copy engine brings keys and values page by page: 16 rows of half a head are a box, and boxes
one behind the other are the layout that the tensor cores want of a whole block.

Measured and no faster: groups that take turns with their products, more buffers, queries in registers, programs that take several tiles
one after the other, three groups with 192 rows and blocks of 64 keys.
"""

from __future__ import annotations

import math
from typing import Any

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

from sightline.kernels.common import keys_of_a_split
from sightline.kernels.gluon import barrier, load_box

# Rows of a tile, and of the part that four warps have.
BLOCK_M = 128
_PART = gl.constexpr(64)
# Rows of all chunks up to which blocks of keys are short: long ones pay behind some 3000 keys only.
_FEW_ROWS = 1024
_PAGE = gl.constexpr(16)
_HEAD_DIM = gl.constexpr(128)
# Columns that 128 bytes hold, the widest box whose rows the copy engine interleaves.
_COLUMNS = gl.constexpr(64)
_LOG2_E = math.log2(math.e)

# named so since triton 3.9
_memory: Any = gl.shared_memory_descriptor
_reinterpret = _memory.reinterpret if hasattr(_memory, "reinterpret") else _memory._reinterpret


@gluon.jit
def _fetch(
    pages, tiles, full, done, table, blocks, end, column, LAG: gl.constexpr, STAGES: gl.constexpr, BLOCK_N: gl.constexpr
):  # fmt: skip
    """One warp: keys or values 0 .. end - 1 behind the page that `table` begins with, block by block, and zeros behind them. A
    buffer is free again once `done` was said of the block LAG behind the one that it held."""
    COUNT: gl.constexpr = BLOCK_N // _PAGE
    num_pages = gl.cdiv(end, _PAGE)
    # of the last page, which comes with these rows in front: zeros, because they are outside of the tensor
    absent = num_pages * _PAGE - end
    for j in range(blocks):
        i = j % STAGES
        ids: gl.tuple = ()
        for p in gl.static_range(COUNT):
            ids += (gl.load(table + j * COUNT + p, mask=j * COUNT + p < num_pages, other=-1),)
        mbarrier.wait(done.index((j + LAG) % STAGES), (((j + LAG) // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(i), BLOCK_N * _HEAD_DIM * 2)
        for p in gl.static_range(COUNT):
            row = gl.where(j * COUNT + p == num_pages - 1, -absent, 0)
            for half in gl.static_range(2):
                at = (i * 2 + half) * COUNT + p
                load_box(pages, [ids[p], row, column + half * _COLUMNS], full.index(i), tiles.index(at))


@gluon.jit
def _mask(scores, j, limit, end, BLOCK_N: gl.constexpr):
    """-inf where a row sees no key. `_fetch` says where those of the last page stand."""
    columns = j * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, scores.type.layout))
    last = (end - 1) // _PAGE * _PAGE
    positions = gl.where(columns < last, columns, columns + end - last - _PAGE)
    present = (positions < end) & ((columns < last) | (positions >= last))
    return gl.where(present[None, :] & (positions[None, :] <= limit[:, None]), scores, float("-inf"))


@gluon.jit
def _block(
    acc, top, total, rounded, memory, j, blocks, limit, end, scale,
    MASKED: gl.constexpr, SPLIT: gl.constexpr, STAGES: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """The softmax of block j, whose keys are there, and the sum of block j - 1."""
    queries, ks, vs, k_full, v_full, done = memory
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ACC: gl.constexpr = acc.type.layout
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2)
    i = j % STAGES
    i_before = (j - 1) % STAGES
    i_behind = (j + 1) % STAGES
    zeros = gl.zeros([_PART, BLOCK_N], gl.float32, S)
    s = warpgroup_mma(queries, ks.index(i).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(i_before), ((j - 1) // STAGES) & 1)
    o = warpgroup_mma(gl.convert_layout(rounded, P), vs.index(i_before), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[s])
    if MASKED:
        scores = _mask(scores, j, limit, end, BLOCK_N)
    new_top = gl.maximum(top, gl.max(scores, 1) * scale)
    # a row may see no key of its tile's last split
    shift = gl.where(new_top == float("-inf"), 0.0, new_top) if SPLIT and MASKED else new_top
    weights = gl.exp2(scores * scale - shift[:, None])
    fade = gl.exp2(top - shift)
    total = total * fade + gl.sum(weights, 1)
    # here, because its loop ends a basic block: else the assembler puts the softmax behind the sum, beside which it should run
    mbarrier.wait(k_full.index(i_behind), ((j + 1) // STAGES) & 1, pred=j + 1 < blocks)
    acc = warpgroup_mma_wait(0, deps=[o])
    barrier()
    mbarrier.arrive(done.index(i), count=1)
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, ACC))[:, None]
    return acc, new_top, total, weights.to(rounded.dtype)


@gluon.jit
def _places(chunk, ROW: gl.constexpr, TOKENS: gl.constexpr, GROUP: gl.constexpr, LAYOUT: gl.constexpr):
    """(row, head, whether it exists) of the tile's rows from ROW on, as a column of LAYOUT."""
    row0, first, q_len, kv_head = chunk
    m = ROW + gl.arange(0, _PART, layout=gl.SliceLayout(1, LAYOUT))
    token = first + m // GROUP
    return (row0 + token).to(gl.int64), kv_head * GROUP + m % GROUP, (m < TOKENS * GROUP) & (token < q_len)


@gluon.jit
def _attend(
    tensors, memory, chunk, keys, scale, ROW: gl.constexpr, TOKENS: gl.constexpr, GROUP: gl.constexpr,
    SPLIT: gl.constexpr, STAGES: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Four warps: rows ROW .. ROW + 63 of the tile, of which the first row of all sees `see` keys of this walk."""
    q, out, parts, lse, q_stride_row, q_stride_head, out_stride_row, out_stride_head = tensors
    queries, ks, vs, k_full, v_full, done = memory
    queries = queries.index(ROW // _PART)
    memory = (queries, ks, vs, k_full, v_full, done)
    see, end, blocks, part = keys
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _HEAD_DIM, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2)
    row, head, live = _places(chunk, ROW, TOKENS, GROUP, LOAD)
    at = row * q_stride_row + head * q_stride_head
    dims = gl.arange(0, _HEAD_DIM, layout=gl.SliceLayout(0, LOAD))
    queries.store(gl.load(q + at[:, None] + dims[None, :], mask=live[:, None], other=0.0))
    fence_async_shared()
    barrier()

    limit = see - 1 + (ROW + gl.arange(0, _PART, layout=gl.SliceLayout(1, S))) // GROUP
    acc = gl.zeros([_PART, _HEAD_DIM], gl.float32, ACC)
    zeros = gl.zeros([_PART, BLOCK_N], gl.float32, S)
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma(queries, ks.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores = _mask(warpgroup_mma_wait(0, deps=[s]), 0, limit, end, BLOCK_N)
    barrier()
    mbarrier.arrive(done.index(0), count=1)
    top = gl.max(scores, 1) * scale
    shift = gl.where(top == float("-inf"), 0.0, top) if SPLIT else top
    weights = gl.exp2(scores * scale - shift[:, None])
    total = gl.sum(weights, 1)
    rounded = weights.to(q.dtype.element_ty)
    mbarrier.wait(k_full.index(1), 0, pred=blocks > 1)
    # every row sees the keys of the blocks before `whole`
    whole = gl.maximum(gl.minimum(see, end) // BLOCK_N, 1)
    for j in range(1, whole):
        acc, top, total, rounded = _block(
            acc, top, total, rounded, memory, j, blocks, limit, end, scale, False, SPLIT, STAGES, BLOCK_N
        )
    for j in range(whole, blocks):
        acc, top, total, rounded = _block(
            acc, top, total, rounded, memory, j, blocks, limit, end, scale, True, SPLIT, STAGES, BLOCK_N
        )
    last = blocks - 1
    mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1)
    o = warpgroup_mma(gl.convert_layout(rounded, P), vs.index(last % STAGES), acc, is_async=True)
    row, head, live = _places(chunk, ROW, TOKENS, GROUP, ACC)
    dims = gl.arange(0, _HEAD_DIM, layout=gl.SliceLayout(0, ACC))
    share = gl.convert_layout(1.0 / (gl.where(total > 0, total, 1.0) if SPLIT else total), gl.SliceLayout(1, ACC))
    result = warpgroup_mma_wait(0, deps=[o]) * share[:, None]
    if SPLIT:
        split = live & (part >= 0)
        place = (part + row) * (gl.num_programs(0) * GROUP) + head
        gl.store(parts + place[:, None] * _HEAD_DIM + dims[None, :], result, mask=split[:, None])
        gl.store(lse + place, gl.convert_layout(top + gl.log2(total), gl.SliceLayout(1, ACC)), mask=split)
        live = live & (part < 0)
    at = row * out_stride_row + head * out_stride_head
    gl.store(out + at[:, None] + dims[None, :], result.to(out.dtype.element_ty), mask=live[:, None])


@gluon.jit(
    do_not_specialize=["stride_table", "num_rows", "num_splits"],
    do_not_specialize_on_alignment=["tiles", "cu_seqlens_q", "kv_lens", "page_table"],
)
def _prefill_hopper_kernel(
    q, k, v, out, parts, lse, tiles, cu_seqlens_q, kv_lens, page_table, scale, num_rows, num_splits, stride_table,
    q_stride_row, q_stride_head, out_stride_row, out_stride_head,
    GROUP: gl.constexpr, TOKENS: gl.constexpr, UNIT: gl.constexpr, MIN_UNITS: gl.constexpr, SPLIT: gl.constexpr,
    STAGES: gl.constexpr, BLOCK_N: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Program (kv_head, tile, split). What it is asked and where it writes is as in the portable kernel."""
    ROWS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    BOXES: gl.constexpr = STAGES * 2 * (BLOCK_N // _PAGE)
    dtype: gl.constexpr = k.dtype
    kv_head = gl.program_id(0)
    sequence = gl.load(tiles + 2 * gl.program_id(1))
    first = gl.load(tiles + 2 * gl.program_id(1) + 1)
    row0 = gl.load(cu_seqlens_q + sequence)
    q_len = gl.load(cu_seqlens_q + sequence + 1) - row0
    history = gl.load(kv_lens + sequence) - q_len
    see = history + first + 1
    end = history + gl.minimum(first + TOKENS, q_len)
    begin = 0
    if SPLIT:
        length = keys_of_a_split(end, num_splits, UNIT, MIN_UNITS)
        begin = gl.program_id(2) * length
    # also a tile of padding, whose sequence is empty
    if begin >= end:
        return
    table = page_table + sequence.to(gl.int64) * stride_table
    part = -1
    if SPLIT:
        part = gl.where(end > length, gl.program_id(2) * num_rows, -1)
        table += begin // _PAGE
        see -= begin
        end = gl.minimum(end - begin, length)
    blocks = gl.cdiv(end, BLOCK_N)

    queries = gl.allocate_shared_memory(dtype, [2, _PART, _HEAD_DIM], ROWS)
    k_boxes = gl.allocate_shared_memory(dtype, [BOXES, 1, _PAGE, _COLUMNS], k.layout)
    v_boxes = gl.allocate_shared_memory(dtype, [BOXES, 1, _PAGE, _COLUMNS], v.layout)
    ks = _reinterpret(k_boxes, dtype, [STAGES, BLOCK_N, _HEAD_DIM], ROWS)
    vs = _reinterpret(v_boxes, dtype, [STAGES, BLOCK_N, _HEAD_DIM], ROWS)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    done = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    for t in gl.static_range(STAGES):
        mbarrier.init(k_full.index(t), count=1)
        mbarrier.init(v_full.index(t), count=1)
        mbarrier.init(done.index(t), count=2)
    fence_async_shared()
    column = kv_head * _HEAD_DIM
    tensors = (q, out, parts, lse, q_stride_row, q_stride_head, out_stride_row, out_stride_head)
    memory = (queries, ks, vs, k_full, v_full, done)
    chunk = (row0, first, q_len, kv_head)
    keys = (see, end, blocks, part)
    gl.warp_specialize(
        [
            (_attend, (tensors, memory, chunk, keys, scale, 0, TOKENS, GROUP, SPLIT, STAGES, BLOCK_N)),
            (_attend, (tensors, memory, chunk, keys, scale, _PART, TOKENS, GROUP, SPLIT, STAGES, BLOCK_N)),
            (_fetch, (k, k_boxes, k_full, done, table, blocks, end, column, 0, STAGES, BLOCK_N)),
            (_fetch, (v, v_boxes, v_full, done, table, blocks, end, column, 1, STAGES, BLOCK_N)),
        ],
        [4, 1, 1],
        [232, 40, 40],
    )
    for t in gl.static_range(STAGES):
        mbarrier.invalidate(k_full.index(t))
        mbarrier.invalidate(v_full.index(t))
        mbarrier.invalidate(done.index(t))


def takes(k_cache: Tensor) -> bool:
    """Whether this kernel attends over such a cache, on a Hopper card."""
    page_size, _, head_dim = k_cache.shape[1:]
    return (
        k_cache.element_size() == 2
        and page_size == _PAGE.value
        and head_dim == _HEAD_DIM.value
        and k_cache.stride(2) == head_dim
    )


def prefill_attention_hopper(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, parts: Tensor, lse: Tensor, tiles: Tensor,
    cu_seqlens_q: Tensor, kv_lens: Tensor, page_table: Tensor, num_splits: int, *, unit: int, min_units: int,
) -> None:  # fmt: skip
    """See `kernels.prefill_attention.prefill_attention`, which calls it where `takes` says so, with tiles of BLOCK_M rows.

    parts, lse: written instead of `out` by tiles in several splits. A split is so many `unit` of keys, see `keys_of_a_split`.
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    block_n, stages = (64, 4) if num_rows <= _FEW_ROWS or num_splits > 1 else (128, 2)
    group = num_heads // num_kv_heads
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)

    def boxes(cache: Tensor) -> TensorDescriptor:
        shape, strides = [*cache.shape[:2], num_kv_heads * head_dim], [*cache.stride()[:2], 1]
        return TensorDescriptor(cache, shape, strides, [1, _PAGE.value, _COLUMNS.value], layout)

    _prefill_hopper_kernel[(num_kv_heads, tiles.shape[0], num_splits)](
        q, boxes(k_cache), boxes(v_cache), out, parts, lse, tiles, cu_seqlens_q, kv_lens, page_table,
        head_dim**-0.5 * _LOG2_E, num_rows, num_splits, page_table.stride(0), *q.stride()[:2], *out.stride()[:2],
        GROUP=group, TOKENS=BLOCK_M // group, UNIT=unit, MIN_UNITS=min_units, SPLIT=num_splits > 1,
        STAGES=stages, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
