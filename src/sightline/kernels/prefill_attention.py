"""Causal attention of prompt chunks over the paged cache.

The algorithm is FlashAttention-2's (Dao 2023, arXiv:2307.08691): a tile of queries walks over the keys with a running
maximum and sum. A tile's rows are the query heads of one key head for a few consecutive tokens, so that a key is loaded
once for all of them and few keys of a tile lie above the diagonal. Where tiles are too few for the device, as those of a short
question behind a long conversation, the keys of each are split between programs, as in `kernels.decode_attention`.

On a Hopper card and with heads of 128, `kernels.prefill_attention_hopper` takes the same tiles in its own way; the splits are merged here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from sightline.kernels.common import dot, hopper_form, key_slots, keys_of_a_split

_LOG2_E = math.log2(math.e)
# 1.5 large tiles for each of 132 multiprocessors.
_MANY_ROWS = 50_000
_MAX_SPLITS = 16
# Blocks of keys that a program walks at least: with fewer, merging costs what they gain.
_MIN_BLOCKS: tl.constexpr = tl.constexpr(4)
# Rows of a tile merged by one program.
_MERGE_ROWS = 16


@triton.jit
def _walk(
    acc,
    top,
    total,
    q,
    k_base,
    v_base,
    table,
    first,
    end,
    limit,
    scale,
    stride_page,
    stride_slot,
    MASKED: tl.constexpr,
    SPLIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Keys first .. end - 1 in blocks; `limit` [BLOCK_M] is the last key that each row sees, asked only if MASKED."""
    dims = tl.arange(0, BLOCK_D)
    columns = tl.arange(0, BLOCK_N)
    for start in range(first, end, BLOCK_N):
        positions = start + columns
        if MASKED:
            present = positions < end
            slots = key_slots(table, positions, present, stride_page, stride_slot, PAGE_SIZE)
            mask = present[:, None] & (dims < HEAD_DIM)[None, :]
            k = tl.load(k_base + slots[:, None] + dims[None, :], mask=mask, other=0.0)
            v = tl.load(v_base + slots[:, None] + dims[None, :], mask=mask, other=0.0)
        else:
            slots = key_slots(table, positions, None, stride_page, stride_slot, PAGE_SIZE)
            if BLOCK_D == HEAD_DIM:
                k = tl.load(k_base + slots[:, None] + dims[None, :])
                v = tl.load(v_base + slots[:, None] + dims[None, :])
            else:
                mask = (dims < HEAD_DIM)[None, :]
                k = tl.load(k_base + slots[:, None] + dims[None, :], mask=mask, other=0.0)
                v = tl.load(v_base + slots[:, None] + dims[None, :], mask=mask, other=0.0)
        scores = dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_N], tl.float32))
        if MASKED:
            seen = (positions[None, :] <= limit[:, None]) & present[None, :]
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        # a row may see no key of its tile's last split
        shift = tl.where(new_top == float("-inf"), 0.0, new_top) if SPLIT and MASKED else new_top
        weights = tl.exp2(scores * scale - shift[:, None])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(weights, 1)
        acc = dot(weights.to(v.dtype), v, acc * fade[:, None])
        top = new_top
    return acc, top, total


@triton.jit(
    do_not_specialize=["stride_table", "num_rows", "num_splits"],
    do_not_specialize_on_alignment=["tiles", "cu_seqlens_q", "kv_lens", "page_table"],
)
def _prefill_kernel(
    q,
    k,
    v,
    out,
    parts,
    lse,
    tiles,
    cu_seqlens_q,
    kv_lens,
    page_table,
    scale,
    num_rows,
    num_splits,
    stride_table,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Program (kv_head, tile, split). What is in one split goes to `out`, the rest to `parts` [splits, rows, heads, HEAD_DIM]."""
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(0)
    sequence = tl.load(tiles + 2 * tl.program_id(1))
    first = tl.load(tiles + 2 * tl.program_id(1) + 1)
    row0 = tl.load(cu_seqlens_q + sequence)
    q_len = tl.load(cu_seqlens_q + sequence + 1) - row0
    history = tl.load(kv_lens + sequence) - q_len
    # every row sees the keys before `whole`; the tile's last row sees those before `end`
    whole = (history + first + 1) // BLOCK_N * BLOCK_N
    end = history + tl.minimum(first + TOKENS, q_len)
    begin = 0
    stop = end
    if SPLIT:
        length = keys_of_a_split(end, num_splits, BLOCK_N, _MIN_BLOCKS)
        begin = tl.program_id(2) * length
        stop = tl.minimum(begin + length, end)
        if begin >= end:
            return

    m = tl.arange(0, BLOCK_M)
    token = first + m // GROUP
    head = kv_head * GROUP + m % GROUP
    dims = tl.arange(0, BLOCK_D)
    live = (m < TOKENS * GROUP) & (token < q_len)
    mask = live[:, None] & (dims < HEAD_DIM)[None, :]
    row = (row0 + token).to(tl.int64)
    queries = tl.load(
        q + (row * q_stride_row + head * q_stride_head)[:, None] + dims[None, :],
        mask=mask,
        other=0.0,
    )

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    k_base = k + kv_head * stride_head
    v_base = v + kv_head * stride_head
    table = page_table + sequence.to(tl.int64) * stride_table
    limit = history + token
    acc, top, total = _walk(
        acc, top, total, queries, k_base, v_base, table, begin, tl.minimum(whole, stop), limit, scale,
        stride_page, stride_slot, False, SPLIT, HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE,
    )  # fmt: skip
    acc, top, total = _walk(
        acc, top, total, queries, k_base, v_base, table, tl.maximum(whole, begin), stop, limit, scale,
        stride_page, stride_slot, True, SPLIT, HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE,
    )  # fmt: skip
    if SPLIT:  # noqa: SIM102 (one is for the compiler, the other for the device)
        if stop - begin < end:
            at = (tl.program_id(2) * num_rows + row) * (tl.num_programs(0) * GROUP) + head
            result = acc / tl.where(total > 0, total, 1.0)[:, None]
            tl.store(parts + at[:, None] * HEAD_DIM + dims[None, :], result, mask=mask)
            tl.store(lse + at, top + tl.log2(total), mask=live)
            return
    tl.store(
        out + (row * out_stride_row + head * out_stride_head)[:, None] + dims[None, :],
        (acc / total[:, None]).to(out.dtype.element_ty),
        mask=mask,
    )


@triton.jit(
    do_not_specialize=["num_rows", "num_splits"],
    do_not_specialize_on_alignment=["tiles", "cu_seqlens_q", "kv_lens"],
)
def _merge_kernel(
    out,
    parts,
    lse,
    tiles,
    cu_seqlens_q,
    kv_lens,
    num_rows,
    num_splits,
    out_stride_row,
    out_stride_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Program (kv_head, tile, BLOCK_R of its rows): the mean of the splits of a tile with several, weighted by 2 ** lse."""
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    sequence = tl.load(tiles + 2 * tl.program_id(1))
    first = tl.load(tiles + 2 * tl.program_id(1) + 1)
    row0 = tl.load(cu_seqlens_q + sequence)
    q_len = tl.load(cu_seqlens_q + sequence + 1) - row0
    end = tl.load(kv_lens + sequence) - q_len + tl.minimum(first + TOKENS, q_len)
    num_parts = tl.cdiv(end, keys_of_a_split(end, num_splits, BLOCK_N, _MIN_BLOCKS))
    if num_parts <= 1:
        return
    m = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    token = first + m // GROUP
    head = tl.program_id(0) * GROUP + m % GROUP
    dims = tl.arange(0, BLOCK_D)
    live = (m < TOKENS * GROUP) & (token < q_len)
    mask = live[:, None] & (dims < HEAD_DIM)[None, :]
    row = (row0 + token).to(tl.int64)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    # the first split has keys for every row
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    for split in range(num_parts):
        at = (split * num_rows + row) * (tl.num_programs(0) * GROUP) + head
        sums = tl.load(lse + at, mask=live, other=0.0)
        values = tl.load(parts + at[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
        new_top = tl.maximum(top, sums)
        weights = tl.exp2(sums - new_top)
        fade = tl.exp2(top - new_top)
        acc = acc * fade[:, None] + values * weights[:, None]
        total = total * fade + weights
        top = new_top
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + (row * out_stride_row + head * out_stride_head)[:, None] + dims[None, :], result, mask=mask)


class Tile(NamedTuple):
    """Query rows and keys of a tile, and how it is compiled. Hopper's tensor cores take 64 rows for each four warps."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def _hopper(k_cache: Tensor) -> ModuleType | None:
    form = hopper_form("prefill_attention", k_cache)
    return form if form is not None and form.takes(k_cache) else None


def prefill_tile(k_cache: Tensor, num_rows: int) -> Tile:
    """The tile for chunks of num_rows query rows, heads counted, over such a cache; float32 is for tests.

    On an H200 the portable kernel is a fifth faster with large tiles once there are more of them than the device has multiprocessors.
    """
    if k_cache.element_size() != 2:
        return Tile(32, 16, 8, 2)
    return Tile(256, 64, 8, 3) if num_rows >= _MANY_ROWS and _hopper(k_cache) is None else Tile(128, 64, 8, 4)


def prefill_tiles(q_lens: Sequence[int], kv_lens: Sequence[int], *, group: int, tile: Tile) -> np.ndarray:
    """int32 [num_tiles, 2]: sequence and first token (from the chunk's start) of each tile, the longest walk first.

    Programs start in this order, so the short walks fill the gaps at the end. group: query heads for each key head.
    """
    assert group <= tile.block_m, f"{group} query heads for a key head do not fit a tile of {tile.block_m} rows"
    tokens = tile.block_m // group
    counts = [-(-n // tokens) for n in q_lens]
    sequence = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    first = np.concatenate([np.arange(0, n, tokens, dtype=np.int32) for n in q_lens] or [np.zeros(0, np.int32)])
    history = np.asarray(kv_lens, np.int32) - np.asarray(q_lens, np.int32)
    order = np.argsort(-(history[sequence] + first), kind="stable")
    return np.stack([sequence, first], axis=1)[order]


def prefill_splits(num_rows: int, num_heads: int, num_kv_heads: int, tile: Tile, multiprocessors: int) -> int:
    """Programs that share the keys of each tile, so that chunks of num_rows rows in all fill so many multiprocessors."""
    num_tiles = -(-num_rows // (tile.block_m // (num_heads // num_kv_heads)))
    return max(1, min(_MAX_SPLITS, multiprocessors // (num_tiles * num_kv_heads)))


def prefill_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    page_table: Tensor,
    tiles: Tensor,
    *,
    tile: Tile,
    out: Tensor | None = None,
    num_splits: int = 1,
) -> Tensor:
    """q [T, num_heads, head_dim] -> the same shape; row r of sequence i sees keys 0 .. kv_len - q_len + r.

    k_cache, v_cache: [num_pages, page_size, num_kv_heads, head_dim]. cu_seqlens_q: int32 [B + 1], offsets into q; kv_lens:
    int32 [B]; page_table: int32 [B, P]; tiles: `prefill_tiles` of the same lengths and `tile`, on the device. out: written
    instead of a new tensor, rows of no tile stay as they are. The last axis of every tensor must be contiguous. Scale is
    head_dim ** -0.5. num_splits: see `prefill_splits`.
    """
    num_rows, num_heads, head_dim = q.shape
    page_size, num_kv_heads = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if tiles.shape[0] == 0:
        return out
    assert k_cache.stride() == v_cache.stride()
    parts = lse = out
    if num_splits > 1:
        size = num_splits * num_rows * num_heads
        workspace = torch.empty(size * (head_dim + 1), dtype=torch.float32, device=q.device)
        parts, lse = workspace[: size * head_dim], workspace[size * head_dim :]
    block_d = triton.next_power_of_2(max(head_dim, 16))
    hopper = _hopper(k_cache)
    if hopper is not None and tile.block_m == hopper.BLOCK_M:
        hopper.prefill_attention_hopper(
            q, k_cache, v_cache, out, parts, lse, tiles, cu_seqlens_q, kv_lens, page_table, num_splits,
            unit=tile.block_n, min_units=_MIN_BLOCKS.value,
        )  # fmt: skip
    else:
        _prefill_kernel[(num_kv_heads, tiles.shape[0], num_splits)](
            q, k_cache, v_cache, out, parts, lse, tiles, cu_seqlens_q, kv_lens, page_table, head_dim**-0.5 * _LOG2_E,
            num_rows, num_splits, page_table.stride(0), *q.stride()[:2], *out.stride()[:2], *k_cache.stride()[:3],
            GROUP=group, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            PAGE_SIZE=page_size, SPLIT=num_splits > 1, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    if num_splits > 1:
        _merge_kernel[(num_kv_heads, tiles.shape[0], -(-tile.block_m // _MERGE_ROWS))](
            out, parts, lse, tiles, cu_seqlens_q, kv_lens, num_rows, num_splits, *out.stride()[:2],
            GROUP=group, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            BLOCK_R=_MERGE_ROWS, num_warps=4,
        )  # fmt: skip
    return out


def prefill_attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cu_seqlens_q: Tensor, kv_lens: Tensor, page_table: Tensor
) -> Tensor:
    """`prefill_attention` in torch, in float32 throughout; rounds once. A sequence without keys gives zeros."""
    page_size, num_kv_heads, head_dim = k_cache.shape[1:]
    out = torch.zeros_like(q)
    offsets = cu_seqlens_q.tolist()
    for i, kv_len in enumerate(kv_lens.tolist()):
        rows = slice(offsets[i], offsets[i + 1])
        q_len = offsets[i + 1] - offsets[i]
        if q_len == 0 or kv_len == 0:
            continue
        pages = page_table[i, : -(-kv_len // page_size)].long()
        keys, values = (c[pages].flatten(0, 1)[:kv_len].float() for c in (k_cache, v_cache))
        queries = q[rows].float().unflatten(1, (num_kv_heads, -1))
        scores = torch.einsum("qkgd,nkd->kgqn", queries, keys) * head_dim**-0.5
        hidden = torch.ones(q_len, kv_len, dtype=torch.bool, device=q.device).triu_(kv_len - q_len + 1)
        weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
        out[rows] = torch.einsum("kgqn,nkd->qkgd", weights, values).flatten(1, 2).to(q.dtype)
    return out
