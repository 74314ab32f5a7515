"""Attention of decode rows, one query for each sequence, over the paged cache.

Decoding reads every key once, so it is bound by memory and needs many programs at once: the keys of a sequence are split
between programs whose results a second kernel merges by their log-sum-exp (flash-decoding; Dao et al. 2023,
https://pytorch.org/blog/flash-decoding/). The query heads of one key head are the rows of one tile.

The launch depends on shapes alone; lengths are read on the device. So it can be captured in a CUDA graph and replayed
with other lengths and pages.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sightline.kernels.common import dot, key_slots, keys_of_a_split, multiprocessors
from sightline.kernels.prefill_attention import prefill_attention_reference

_LOG2_E = math.log2(math.e)
_MAX_SPLITS = 128
# Programs for each multiprocessor: with more, merging costs what they gain.
_PROGRAMS = 1
# Sequences up to which a program takes long blocks of keys.
_FEW = 64
# Splits merged at once.
_MERGE = 16


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


@triton.jit(do_not_specialize=["stride_table", "num_splits"], do_not_specialize_on_alignment=["page_table", "kv_lens"])
def _split_kernel(
    q,
    k,
    v,
    out,
    parts,
    lse,
    page_table,
    kv_lens,
    scale,
    stride_table,
    num_splits,
    q_stride_row,
    q_stride_head,
    out_stride_row,
    out_stride_head,
    stride_page,
    stride_slot,
    stride_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Program (split, kv_head, row). Without SPLIT there is one split, which writes `out`."""
    split, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_len = tl.load(kv_lens + row)
    if SPLIT:
        length = keys_of_a_split(kv_len, num_splits, BLOCK_N, 1)
        first = split * length
        end = tl.minimum(first + length, kv_len)
        if first >= kv_len:
            return
    else:
        first = 0
        end = kv_len

    h = tl.arange(0, BLOCK_H)
    dims = tl.arange(0, BLOCK_D)
    columns = tl.arange(0, BLOCK_N)
    head = kv_head * GROUP + h
    mask = (h < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    queries = tl.load(
        q + row * q_stride_row + head[:, None] * q_stride_head + dims[None, :],
        mask=mask,
        other=0.0,
    )
    k_base = k + kv_head * stride_head
    v_base = v + kv_head * stride_head
    table = page_table + row * stride_table
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    for start in range(first, end, BLOCK_N):
        positions = start + columns
        present = positions < end
        key_mask = present[:, None] & (dims < HEAD_DIM)[None, :]
        slots = key_slots(table, positions, present, stride_page, stride_slot, PAGE_SIZE)
        keys = tl.load(k_base + slots[:, None] + dims[None, :], mask=key_mask, other=0.0)
        values = tl.load(v_base + slots[:, None] + dims[None, :], mask=key_mask, other=0.0)
        acc, top, total = attend_block(queries, keys, values, present, scale, acc, top, total)

    if SPLIT:
        at = (row * tl.num_programs(1) * GROUP + head) * num_splits + split
        tl.store(parts + at[:, None] * HEAD_DIM + dims[None, :], acc / total[:, None], mask=mask)
        tl.store(lse + at, top + tl.log2(total), mask=h < GROUP)
    else:
        # a row without keys: zeros
        result = acc / tl.where(total > 0, total, 1.0)[:, None]
        at = row * out_stride_row + head * out_stride_head
        tl.store(out + at[:, None] + dims[None, :], result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=["kv_lens"])
def _merge_kernel(
    parts,
    lse,
    out,
    kv_lens,
    num_splits,
    out_stride_row,
    out_stride_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program (head, row): the mean of the live splits, weighted by 2 ** lse."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv_len = tl.load(kv_lens + row)
    live = tl.cdiv(kv_len, keys_of_a_split(kv_len, num_splits, BLOCK_N, 1))
    base = (row * tl.num_programs(0) + head) * num_splits
    dims = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for start in range(0, live, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        present = split < live
        sums = tl.load(lse + base + split, mask=present, other=float("-inf"))
        mask = present[:, None] & (dims < HEAD_DIM)[None, :]
        values = tl.load(parts + (base + split)[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
        new_top = tl.maximum(top, tl.max(sums, 0))
        weights = tl.exp2(sums - new_top)
        fade = tl.exp2(top - new_top)
        acc = acc * fade + tl.sum(weights[:, None] * values, 0)
        total = total * fade + tl.sum(weights, 0)
        top = new_top
    result = acc / tl.where(total > 0, total, 1.0)
    at = row * out_stride_row + head * out_stride_head
    tl.store(out + at + dims, result.to(out.dtype.element_ty), mask=dims < HEAD_DIM)


class Split(NamedTuple):
    """Keys that a program takes at once, and how it is compiled."""

    block_n: int
    num_warps: int
    num_stages: int


def decode_split(dtype: torch.dtype, batch: int) -> Split:
    """The one that is used unless a caller names another: fastest on an H200; float32 is for tests."""
    if dtype.itemsize != 2:
        return Split(32, 8, 2)
    return Split(128, 4, 3) if batch <= _FEW else Split(64, 4, 4)


def decode_splits(batch: int, num_kv_heads: int, max_keys: int, block_n: int, device: torch.device) -> int:
    """Splits of each sequence so that `batch` of them fill the device. max_keys: of the longest that the table can hold."""
    wanted = _PROGRAMS * multiprocessors(device)
    return max(1, min(_MAX_SPLITS, -(-wanted // (batch * num_kv_heads)), -(-max_keys // block_n)))


def decode_workspace(batch: int, num_heads: int, splits: int, head_dim: int, device: torch.device) -> Tensor:
    """float32 scratch for `decode_attention` of up to `batch` rows and `splits`; holds no state between calls."""
    return torch.empty(batch * num_heads * splits * (head_dim + 1), dtype=torch.float32, device=device)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    kv_lens: Tensor,
    *,
    out: Tensor | None = None,
    num_splits: int | None = None,
    workspace: Tensor | None = None,
    how: Split | None = None,
) -> Tensor:
    """q [B, num_heads, head_dim], the newest token of each sequence -> the same shape. Scale is head_dim ** -0.5.

    k_cache, v_cache: [num_pages, page_size, num_kv_heads, head_dim]; page_table: int32 [B, P]; kv_lens: int32 [B], 0 for a
    padding row, whose output is zero and whose pages are not looked at. The last axis of every tensor must be contiguous.
    out: written instead of a new tensor. num_splits: `decode_splits` unless given. workspace: see `decode_workspace`. how:
    `decode_split` unless given.
    """
    batch, num_heads, head_dim = q.shape
    page_size, num_kv_heads = k_cache.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if batch == 0:
        return out
    assert k_cache.stride() == v_cache.stride()
    how = how or decode_split(q.dtype, batch)
    max_keys = page_table.shape[1] * page_size
    splits = num_splits or decode_splits(batch, num_kv_heads, max_keys, how.block_n, q.device)
    split = splits > 1
    if split:
        if workspace is None:
            workspace = decode_workspace(batch, num_heads, splits, head_dim, q.device)
        size = batch * num_heads * splits
        parts, lse = workspace[: size * head_dim], workspace[size * head_dim :]
    else:
        parts = lse = out
    group = num_heads // num_kv_heads
    _split_kernel[(splits, num_kv_heads, batch)](
        q,
        k_cache,
        v_cache,
        out,
        parts,
        lse,
        page_table,
        kv_lens,
        head_dim**-0.5 * _LOG2_E,
        page_table.stride(0),
        splits,
        *q.stride()[:2],
        *out.stride()[:2],
        *k_cache.stride()[:3],
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(max(head_dim, 16)),
        BLOCK_H=max(16, triton.next_power_of_2(group)),
        BLOCK_N=how.block_n,
        PAGE_SIZE=page_size,
        SPLIT=split,
        num_warps=how.num_warps,
        num_stages=how.num_stages,
    )
    if split:
        merge_splits(parts, lse, out, kv_lens, splits, how.block_n)
    return out


def merge_splits(parts: Tensor, lse: Tensor, out: Tensor, kv_lens: Tensor, splits: int, block_n: int) -> None:
    """Write to out [B, num_heads, head_dim] what `splits` programs of each row and head found; zeros for a row without keys.

    parts: float32 [B * num_heads * splits * head_dim], means of the values; lse: base 2 [B * num_heads * splits]. kv_lens: int32
    [B], which with block_n tell how many splits had keys: only these are read.
    """
    batch, num_heads, head_dim = out.shape
    _merge_kernel[(num_heads, batch)](
        parts,
        lse,
        out,
        kv_lens,
        splits,
        *out.stride()[:2],
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(max(head_dim, 16)),
        BLOCK_N=block_n,
        BLOCK_S=_MERGE,
        num_warps=4,
    )


def decode_attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, kv_lens: Tensor
) -> Tensor:
    """`decode_attention` in torch: chunks of one token."""
    cu_seqlens_q = torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device)
    return prefill_attention_reference(q, k_cache, v_cache, cu_seqlens_q, kv_lens, page_table)
