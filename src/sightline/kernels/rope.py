"""Rotary positions: the step's tables in one launch, and for each layer one launch that turns queries and keys where they
lie in the merged projection and writes keys and values into the paged cache.

Tables are `layers.rotary.Rotary`'s: float32 [T, 1, head_dim], cos twice, sin with its first half negated. The rotation is in
float32, rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Heads turned by one program.
_HEADS = 8


@triton.jit(do_not_specialize=["stride_axis"], do_not_specialize_on_alignment=["positions"])
def _tables_kernel(positions, axis, inv_freq, cos, sin, stride_axis, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    mask = i < HALF
    position = tl.load(positions + tl.load(axis + i, mask=mask, other=0) * stride_axis + row, mask=mask, other=0)
    angle = position.to(tl.float32) * tl.load(inv_freq + i, mask=mask, other=0.0)
    c, s = tl.cos(angle), tl.sin(angle)
    at = row * 2 * HALF + i
    tl.store(cos + at, c, mask=mask)
    tl.store(cos + at + HALF, c, mask=mask)
    tl.store(sin + at, -s, mask=mask)
    tl.store(sin + at + HALF, s, mask=mask)


def rotary_tables(positions: Tensor, inv_freq: Tensor, axis: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [T, 1, head_dim] each, sin's first half negated.

    positions: int64 [A, T], contiguous rows (A is 1 for ordinary rotary: `positions[None]`). inv_freq: float32,
    head_dim // 2 frequencies in any shape. axis: int64 [head_dim // 2], the row of `positions` that turns each frequency.
    """
    rows, half = positions.shape[1], inv_freq.numel()
    cos, sin = (torch.empty((rows, 1, 2 * half), dtype=torch.float32, device=positions.device) for _ in range(2))
    if rows:
        block = triton.next_power_of_2(half)
        _tables_kernel[(rows,)](
            positions, axis, inv_freq, cos, sin, positions.stride(0), HALF=half, BLOCK=block, num_warps=1
        )
    return cos, sin


@triton.jit(do_not_specialize_on_alignment=["slot_mapping"])
def _rotate_kernel(
    qkv,
    cos,
    sin,
    k_cache,
    v_cache,
    slot_mapping,
    stride_row,
    k_stride_slot,
    k_stride_head,
    v_stride_slot,
    v_stride_head,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    WRITE: tl.constexpr,
):
    """Program (row, block of heads); heads are numbered over queries, keys and, with WRITE, values."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    i = tl.arange(0, BLOCK)
    turned = head < NUM_HEADS + NUM_KV_HEADS
    inside = (i < HALF)[None, :]
    at = row * stride_row + head[:, None] * (2 * HALF) + i[None, :]
    if WRITE:
        exists = (head < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & inside
    else:
        exists = turned[:, None] & inside
    x = tl.load(qkv + at, mask=exists, other=0.0)
    y = tl.load(qkv + at + HALF, mask=exists, other=0.0)
    c = tl.load(cos + row * 2 * HALF + i, mask=i < HALF, other=0.0)[None, :]
    s = tl.load(sin + row * 2 * HALF + HALF + i, mask=i < HALF, other=0.0)[None, :]
    new_x = (x.to(tl.float32) * c - y.to(tl.float32) * s).to(x.dtype)
    new_y = (y.to(tl.float32) * c + x.to(tl.float32) * s).to(x.dtype)
    tl.store(qkv + at, new_x, mask=turned[:, None] & inside)
    tl.store(qkv + at + HALF, new_y, mask=turned[:, None] & inside)
    if WRITE:
        slot = tl.load(slot_mapping + row)
        if slot >= 0:
            key = head - NUM_HEADS
            mask = ((key >= 0) & (key < NUM_KV_HEADS))[:, None] & inside
            to = k_cache + slot * k_stride_slot + key[:, None] * k_stride_head + i[None, :]
            tl.store(to, new_x, mask=mask)
            tl.store(to + HALF, new_y, mask=mask)
            value = key - NUM_KV_HEADS
            mask = ((value >= 0) & (value < NUM_KV_HEADS))[:, None] & inside
            to = v_cache + slot * v_stride_slot + value[:, None] * v_stride_head + i[None, :]
            tl.store(to, x, mask=mask)
            tl.store(to + HALF, y, mask=mask)


def rotate_and_write(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Turn queries and keys of qkv in place and write keys and values into the cache.

    qkv [T, (num_heads + 2 num_kv_heads) * head_dim], rows contiguous: queries, keys, values. cos, sin: `rotary_tables`.
    k_cache, v_cache: [num_pages, page_size, num_kv_heads, head_dim], contiguous. slot_mapping: int64 [T], page * page_size +
    offset; a negative slot (padding) writes nothing.
    """
    num_kv_heads, head_dim = k_cache.shape[2:]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    _rotate(qkv, cos, sin, (k_cache, v_cache, slot_mapping), num_heads, num_kv_heads)


def rotate_heads(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> None:
    """Turn the first `num_heads` heads of each row of qkv [T, W] (rows contiguous, head_dim as the tables') in place.

    For the vision towers, whose queries and keys stand in front of the values: num_heads counts both.
    """
    _rotate(qkv, cos, sin, None, num_heads, 0)


def _rotate(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: tuple[Tensor, Tensor, Tensor] | None,
    num_heads: int,
    num_kv_heads: int,
) -> None:
    half = cos.shape[-1] // 2
    k, v, slots = cache if cache is not None else (qkv, qkv, qkv)
    strides = (0, 0, 0, 0) if cache is None else (*k.stride()[1:3], *v.stride()[1:3])
    if qkv.shape[0] == 0:
        return
    _rotate_kernel[(qkv.shape[0], triton.cdiv(num_heads + 2 * num_kv_heads, _HEADS))](
        qkv,
        cos,
        sin,
        k,
        v,
        slots,
        qkv.stride(0),
        *strides,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=half,
        BLOCK=triton.next_power_of_2(half),
        HEADS=_HEADS,
        WRITE=cache is not None,
        num_warps=4,
    )


@triton.jit(do_not_specialize_on_alignment=["slot_mapping"])
def _write_kernel(
    k,
    v,
    k_cache,
    v_cache,
    slot_mapping,
    k_stride_row,
    k_stride_head,
    v_stride_row,
    v_stride_head,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row). The cache is contiguous."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + row)
    if slot >= 0:
        i = tl.arange(0, BLOCK)
        mask = i < NUM_KV_HEADS * HEAD_DIM
        head, dim = i // HEAD_DIM, i % HEAD_DIM
        to = slot * (NUM_KV_HEADS * HEAD_DIM) + i
        tl.store(k_cache + to, tl.load(k + row * k_stride_row + head * k_stride_head + dim, mask=mask), mask=mask)
        tl.store(v_cache + to, tl.load(v + row * v_stride_row + head * v_stride_head + dim, mask=mask), mask=mask)


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write k, v [T, num_kv_heads, head_dim] (last axis contiguous) at their slots; a negative slot writes nothing."""
    rows, num_kv_heads, head_dim = k.shape
    assert k_cache.is_contiguous()
    assert v_cache.is_contiguous()
    if rows == 0:
        return
    _write_kernel[(rows,)](
        k,
        v,
        k_cache,
        v_cache,
        slot_mapping,
        *k.stride()[:2],
        *v.stride()[:2],
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK=triton.next_power_of_2(num_kv_heads * head_dim),
        num_warps=4,
    )


def rotary_tables_reference(positions: Tensor, inv_freq: Tensor, axis: Tensor) -> tuple[Tensor, Tensor]:
    """`rotary_tables` in torch."""
    angles = (positions.index_select(0, axis) * inv_freq.reshape(-1, 1)).t().unsqueeze(1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate_heads_reference(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> None:
    """`rotate_heads` in torch."""
    dim = cos.shape[-1]
    part = qkv[:, : num_heads * dim]
    x = part.unflatten(1, (num_heads, dim)).float()
    part.copy_((x * cos + x.roll(dim // 2, -1) * sin).flatten(1).to(qkv.dtype))


def rotate_and_write_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """`rotate_and_write` in torch."""
    num_kv_heads, dim = k_cache.shape[2:]
    num_heads = qkv.shape[1] // dim - 2 * num_kv_heads
    rotate_heads_reference(qkv, cos, sin, num_heads + num_kv_heads)
    heads = qkv.unflatten(1, (-1, dim))
    k, v = heads[:, num_heads : num_heads + num_kv_heads], heads[:, num_heads + num_kv_heads :]
    write_kv_reference(k, v, k_cache, v_cache, slot_mapping)


def write_kv_reference(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """`write_kv` in torch."""
    real = slot_mapping >= 0
    slots = slot_mapping[real]
    k_cache.view(-1, *k_cache.shape[2:]).index_copy_(0, slots, k[real])
    v_cache.view(-1, *v_cache.shape[2:]).index_copy_(0, slots, v[real])
