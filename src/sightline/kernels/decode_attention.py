"""Attention of decode rows, one query for each sequence, over the paged cache.

Decoding reads every key once, so it is bound by memory and needs many programs at once. A plan, made on the device once a step,
divides the keys of all rows into items of about equal length; a program takes one of them for one key head, whose query heads
are the rows of its tile. Of a row with several items the last program to arrive merges what all found by their log-sum-exp
(flash-decoding; Dao et al. 2023, https://pytorch.org/blog/flash-decoding/), in a fixed order. So the same batch gives the same
bits; how a row is divided, and with it the rounding, depends on its neighbours' lengths.

Launches depend on shapes alone; lengths are read on the device. So they can be captured in a CUDA graph and replayed with other
lengths and pages.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sightline.kernels.common import dot, keys_of_a_split, multiprocessors
from sightline.kernels.prefill_attention import prefill_attention_reference

_LOG2_E = math.log2(math.e)
# Numbers of an item of a plan.
_FIELDS = tl.constexpr(6)
# Items merged at once.
_MERGE = tl.constexpr(4)
# Rows up to which two programs share a multiprocessor and load a block ahead; with more, four wait for each other's loads.
_FEW = 64
# Keys of an item, at least, but for the last of a row.
_MIN_KEYS = 128
# Of a row, at most: with more, merging takes longer than they gain.
_MAX_ITEMS = tl.constexpr(32)


@triton.jit
def load_rows(pointers, dims, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK_N, BLOCK_D], zeros beyond HEAD_DIM."""
    if HEAD_DIM == BLOCK_D:
        rows = tl.load(pointers)
    else:
        rows = tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    return rows


@triton.jit
def attend_block(queries, keys, values, present, scale, acc, top, total):
    """(acc, top, total) of an online softmax in base 2 after a block of keys, of which those `present` count."""
    scores = dot(queries, tl.trans(keys), tl.zeros([queries.shape[0], keys.shape[0]], tl.float32))
    scores = tl.where(present[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_top[:, None])
    fade = tl.exp2(top - new_top)
    total = total * fade + tl.sum(weights, 1)
    acc = dot(weights.to(values.dtype), values, acc * fade[:, None])
    return acc, new_top, total


@triton.jit
def _count(kv_lens, batch, longest, BLOCK_B: tl.constexpr):
    """Items of all rows with keys, if none may be longer."""
    i = tl.arange(0, BLOCK_B)
    count = 0
    for start in range(0, batch, BLOCK_B):
        count += tl.sum(tl.cdiv(tl.load(kv_lens + start + i, mask=start + i < batch, other=0), longest))
    return count


@triton.jit(
    do_not_specialize=["batch", "programs", "capacity", "num_kv_heads"],
    do_not_specialize_on_alignment=["kv_lens"],
)
def _plan_kernel(
    kv_lens,
    items,
    batch,
    programs,
    capacity,
    num_kv_heads,
    BLOCK_N: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """One program. A row gets one item, or several of equal length, which stand together; rows without keys are given to the first
    items."""
    i = tl.arange(0, BLOCK_B)
    num_keys = 0
    live = 0
    most = 0
    for start in range(0, batch, BLOCK_B):
        kv_len = tl.load(kv_lens + start + i, mask=start + i < batch, other=0)
        num_keys += tl.sum(kv_len)
        live += tl.sum((kv_len > 0).to(tl.int32))
        most = tl.maximum(most, tl.max(kv_len))
    # as short as lets all run at once; one row that is much longer than the others does not make it more than twice the mean
    programs = tl.maximum(programs, live)
    longest = keys_of_a_split(num_keys, programs, BLOCK_N, MIN_BLOCKS)
    longest = tl.maximum(longest, keys_of_a_split(most, _MAX_ITEMS, BLOCK_N, 1))
    bound = 2 * longest
    while (_count(kv_lens, batch, longest, BLOCK_B) > programs) & (longest < bound):
        longest += tl.maximum(longest // (16 * BLOCK_N), 1) * BLOCK_N

    for start in range(0, capacity, BLOCK_B):
        slot = items + (start + i) * _FIELDS
        tl.store(slot + 4, 0, mask=start + i < capacity)
        tl.store(slot + 5, -1, mask=start + i < capacity)
    for start in range(0, batch * num_kv_heads, BLOCK_B):
        tl.store(items + capacity * _FIELDS + start + i, 0, mask=start + i < batch * num_kv_heads)
    tl.debug_barrier()
    num_items = 0
    num_empty = 0
    for start in range(0, batch, BLOCK_B):
        row = start + i
        kv_len = tl.load(kv_lens + row, mask=row < batch, other=-1)
        empty = (kv_len == 0).to(tl.int32)
        slot = num_empty + tl.cumsum(empty) - 1
        tl.store(items + slot * _FIELDS + 5, row, mask=empty > 0)
        num_empty += tl.sum(empty)
        kv_len = tl.maximum(kv_len, 0)
        length = keys_of_a_split(kv_len, tl.maximum(tl.cdiv(kv_len, longest), 1), BLOCK_N, 1)
        count = tl.cdiv(kv_len, length)
        base = num_items + tl.cumsum(count) - count
        for part in range(tl.max(count)):
            slots = items + (base + part) * _FIELDS
            present = part < count
            tl.store(slots, row, mask=present)
            tl.store(slots + 1, part * length, mask=present)
            tl.store(slots + 2, tl.minimum((part + 1) * length, kv_len), mask=present)
            tl.store(slots + 3, base, mask=present)
            tl.store(slots + 4, count, mask=present)
        num_items += tl.sum(count)


@triton.jit
def _store(at, values, stride_head, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr):
    """values [heads, dims] to the group of heads at `at`."""
    head = tl.arange(0, values.shape[0])
    dims = tl.arange(0, values.shape[1])
    mask = (head < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(at + head[:, None] * stride_head + dims[None, :], values.to(at.dtype.element_ty), mask=mask)


@triton.jit
def start_item(
    out,
    items,
    out_stride_row,
    out_stride_head,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(row, first key, end of the keys, first item of the row, items of the row) of program (kv_head, item); no items: no work. If
    it is given a row without keys, too, its zeros are written."""
    at = items + tl.program_id(1) * _FIELDS
    row, first, end = tl.load(at).to(tl.int64), tl.load(at + 1), tl.load(at + 2)
    base, count, empty = tl.load(at + 3), tl.load(at + 4), tl.load(at + 5).to(tl.int64)
    if empty >= 0:
        zeros = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        group = out + empty * out_stride_row + tl.program_id(0) * GROUP * out_stride_head
        _store(group, zeros, out_stride_head, GROUP, HEAD_DIM)
    return row, first, end, base, count


@triton.jit
def _merge(
    parts,
    lse,
    out,
    count,
    stride,
    stride_head,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the mean of `count` items, weighted by 2 ** lse, added up in their order. parts, lse, out: at the group's first head."""
    head = tl.arange(0, BLOCK_G)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    mask = (head < GROUP) & (dims < HEAD_DIM)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_G, 1], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G, 1], tl.float32)
    for start in range(0, count, _MERGE):
        # one behind the other, so that no thread needs another's, and loads of the next do not wait
        for i in tl.static_range(_MERGE):
            at = tl.minimum(start + i, count - 1) * stride + head
            # not from the first cache, which may hold what was there before
            values = tl.load(parts + at * HEAD_DIM + dims, mask=mask, other=0.0, cache_modifier=".cg")
            part_lse = tl.load(lse + at, mask=head < GROUP, other=0.0, cache_modifier=".cg")
            part_lse = tl.where(start + i < count, part_lse, float("-inf"))
            new_top = tl.maximum(top, part_lse)
            weight = tl.exp2(part_lse - new_top)
            fade = tl.exp2(top - new_top)
            acc = acc * fade + values * weight
            total = total * fade + weight
            top = new_top
    tl.store(out + head * stride_head + dims, (acc / total).to(out.dtype.element_ty), mask=mask)


@triton.jit
def finish_item(
    acc,
    top,
    total,
    out,
    parts,
    items,
    row,
    base,
    count,
    out_stride_row,
    out_stride_head,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Of program (kv_head, item), with what `attend_block` gave: write the row's output; where it has several items, leave this one's
    part, and let the last program to arrive write."""
    kv_head, item, num_kv_heads, capacity = tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1)
    stride = num_kv_heads * GROUP
    out += row * out_stride_row + kv_head * GROUP * out_stride_head
    if count == 1:
        _store(out, acc / total[:, None], out_stride_head, GROUP, HEAD_DIM)
    else:
        lse = parts + capacity * stride * HEAD_DIM
        at = item * stride + kv_head * GROUP
        _store(parts + at * HEAD_DIM, acc / total[:, None], HEAD_DIM, GROUP, HEAD_DIM)
        head = tl.arange(0, acc.shape[0])
        tl.store(lse + at + head, top + tl.log2(total), mask=head < GROUP)
        tl.debug_barrier()
        arrived = items + capacity * _FIELDS + row * num_kv_heads + kv_head
        if tl.atomic_add(arrived, 1, sem="acq_rel") == count - 1:
            # as it was found, for the next layer
            tl.store(arrived, 0)
            first = base * stride + kv_head * GROUP
            _merge(
                parts + first * HEAD_DIM,
                lse + first,
                out,
                count,
                stride,
                out_stride_head,
                GROUP,
                BLOCK_G,
                HEAD_DIM,
                acc.shape[1],
            )


@triton.jit(do_not_specialize=["stride_table"], do_not_specialize_on_alignment=["page_table"])
def _decode_kernel(
    q,
    k,
    v,
    out,
    parts,
    items,
    page_table,
    scale,
    stride_table,
    q_stride_row,
    q_stride_head,
    out_stride_row,
    out_stride_head,
    stride_page,
    stride_slot,
    stride_head,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Program (kv_head, item)."""
    kv_head = tl.program_id(0)
    row, first, end, base, count = start_item(
        out, items, out_stride_row, out_stride_head, GROUP, BLOCK_G, HEAD_DIM, BLOCK_D
    )
    if count == 0:
        return
    h = tl.arange(0, BLOCK_H)
    dims = tl.arange(0, BLOCK_D)
    columns = tl.arange(0, BLOCK_N)
    head = kv_head * GROUP + h
    mask = (h < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    queries = tl.load(q + row * q_stride_row + head[:, None] * q_stride_head + dims[None, :], mask=mask, other=0.0)
    k_base = k + kv_head * stride_head
    v_base = v + kv_head * stride_head
    table = page_table + row * stride_table
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    # a block's last keys again where it has fewer; pages are looked up a block ahead, so that loads wait for no other
    positions = tl.minimum(first + columns, end - 1)
    pages = tl.load(table + positions // PAGE_SIZE)
    for start in range(first, end, BLOCK_N):
        slots = pages.to(tl.int64) * stride_page + positions % PAGE_SIZE * stride_slot
        positions = tl.minimum(start + BLOCK_N + columns, end - 1)
        pages = tl.load(table + positions // PAGE_SIZE)
        at = slots[:, None] + dims[None, :]
        keys = load_rows(k_base + at, dims, HEAD_DIM, BLOCK_D)
        values = load_rows(v_base + at, dims, HEAD_DIM, BLOCK_D)
        acc, top, total = attend_block(queries, keys, values, start + columns < end, scale, acc, top, total)
    finish_item(
        acc, top, total, out, parts, items, row, base, count, out_stride_row, out_stride_head, GROUP, BLOCK_G, HEAD_DIM
    )


class Split(NamedTuple):
    """Keys that a program takes at once, how it is compiled, and among how many programs for each multiprocessor the keys of all
    rows are divided."""

    block_n: int
    num_warps: int
    num_stages: int
    programs: int


def decode_split(dtype: torch.dtype, batch: int) -> Split:
    """The one that is used unless a caller names another: fastest on an H200; float32 is for tests."""
    if dtype.itemsize != 2:
        return Split(32, 8, 2, 4)
    return Split(64, 4, 3, 2) if batch <= _FEW else Split(64, 4, 2, 4)


class DecodePlan(NamedTuple):
    """What each program of a step's decode rows does, the same in all layers.

    items: int32, (row, first key, end of the keys, first item of the row, items of the row, row without keys or -1) of each of
    `capacity` programs of a key head, those without work last, with 0 items; behind them, for each row and key head, how many
    programs have arrived. parts: float32 scratch: for each item and query head a mean of the values, then for each the
    log-sum-exp, base 2.
    """

    items: Tensor
    parts: Tensor
    capacity: int
    how: Split


def decode_plan(
    kv_lens: Tensor, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, *, how: Split | None = None
) -> DecodePlan:
    """For rows of kv_lens, int32 [B] side by side, which are read on the device. dtype: of the cache. how: `decode_split` unless given."""
    batch, device = kv_lens.shape[0], kv_lens.device
    how = how or decode_split(dtype, batch)
    programs = -(-how.programs * multiprocessors(device) // num_kv_heads)
    # items of twice the mean are at most half as many as programs, and the last one of each row
    capacity = max(programs, batch + max(programs, batch) // 2)
    items = torch.empty(capacity * _FIELDS.value + batch * num_kv_heads, dtype=torch.int32, device=device)
    parts = torch.empty(capacity * num_heads * (head_dim + 1), dtype=torch.float32, device=device)
    _plan_kernel[(1,)](
        kv_lens,
        items,
        batch,
        programs,
        capacity,
        num_kv_heads,
        BLOCK_N=how.block_n,
        MIN_BLOCKS=max(1, _MIN_KEYS // how.block_n),
        BLOCK_B=256,
        num_warps=4,
    )
    return DecodePlan(items, parts, capacity, how)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    kv_lens: Tensor,
    *,
    out: Tensor | None = None,
    plan: DecodePlan | None = None,
) -> Tensor:
    """q [B, num_heads, head_dim], the newest token of each sequence -> the same shape. Scale is head_dim ** -0.5.

    k_cache, v_cache: [num_pages, page_size, num_kv_heads, head_dim]; page_table: int32 [B, P]; kv_lens: int32 [B], 0 for a
    padding row, whose output is zero and whose pages are not looked at. The last axis of every tensor must be contiguous.
    out: written instead of a new tensor. plan: `decode_plan` of the same lengths, for launches one behind the other; made here
    unless given.
    """
    batch, num_heads, head_dim = q.shape
    page_size, num_kv_heads = k_cache.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if batch == 0:
        return out
    assert k_cache.stride() == v_cache.stride()
    items, parts, capacity, how = plan or decode_plan(kv_lens[:batch], num_heads, num_kv_heads, head_dim, q.dtype)
    group = num_heads // num_kv_heads
    _decode_kernel[(num_kv_heads, capacity)](
        q,
        k_cache,
        v_cache,
        out,
        parts,
        items,
        page_table,
        head_dim**-0.5 * _LOG2_E,
        page_table.stride(0),
        *q.stride()[:2],
        *out.stride()[:2],
        *k_cache.stride()[:3],
        GROUP=group,
        BLOCK_G=triton.next_power_of_2(group),
        BLOCK_H=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(max(head_dim, 16)),
        BLOCK_N=how.block_n,
        PAGE_SIZE=page_size,
        num_warps=how.num_warps,
        num_stages=how.num_stages,
    )
    return out


def decode_attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, kv_lens: Tensor
) -> Tensor:
    """`decode_attention` in torch: chunks of one token."""
    cu_seqlens_q = torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device)
    return prefill_attention_reference(q, k_cache, v_cache, cu_seqlens_q, kv_lens, page_table)
