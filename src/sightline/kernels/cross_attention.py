"""Attention of decode rows to the pictures that they see beside the text.

What a row sees changes from step to step, and each picture has keys and values of its own, wherever they were made. So the
kernel reads their addresses on the device, and the launch depends on shapes alone: it can be captured in a CUDA graph. Keys are
split between programs as in `decode_attention`; a split may begin in one picture and end in the next.

Its equal in torch is `attention.cross.cross_attention`, which is told what each row sees on the host.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sightline.kernels.common import keys_of_a_split
from sightline.kernels.decode_attention import (
    attend_block,
    decode_split,
    decode_splits,
    decode_workspace,
    merge_splits,
)

_LOG2_E = math.log2(math.e)
# Keys for which a row alone gets as many programs as the device can run; splits beyond a row's keys end at once.
_MANY_KEYS = 1 << 16


@triton.jit(
    do_not_specialize=["layer", "num_splits", "stride_picture"],
    do_not_specialize_on_alignment=["addresses", "ends"],
)
def _cross_kernel(
    q,
    parts,
    lse,
    addresses,
    ends,
    layer,
    scale,
    num_splits,
    stride_picture,
    q_stride_row,
    q_stride_head,
    NUM_PICTURES: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (split, kv_head, row), for `merge_splits`."""
    split, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    num_keys = tl.load(ends + (NUM_PICTURES - 1) * stride_picture + row)
    length = keys_of_a_split(num_keys, num_splits, BLOCK_N, 1)
    first = split * length
    end = tl.minimum(first + length, num_keys)
    if first >= num_keys:
        return

    h = tl.arange(0, BLOCK_H)
    dims = tl.arange(0, BLOCK_D)
    columns = tl.arange(0, BLOCK_N)
    head = kv_head * GROUP + h
    mask = (h < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    queries = tl.load(q + row * q_stride_row + head[:, None] * q_stride_head + dims[None, :], mask=mask, other=0.0)
    stride_key = tl.num_programs(1) * HEAD_DIM
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    picture = 0
    begin = 0
    while begin < end:
        stop = tl.load(ends + picture * stride_picture + row)
        address = tl.load(addresses + picture * stride_picture + row)
        size = (stop - begin).to(tl.int64) * stride_key
        features = tl.multiple_of(address.to(tl.pointer_type(q.dtype.element_ty)), 16)
        k = features + 2 * layer * size + kv_head * HEAD_DIM
        v = k + size
        last = tl.minimum(end, stop) - begin
        for start in range(tl.maximum(first - begin, 0), last, BLOCK_N):
            positions = start + columns
            present = positions < last
            key_mask = present[:, None] & (dims < HEAD_DIM)[None, :]
            offsets = positions[:, None] * stride_key + dims[None, :]
            keys = tl.load(k + offsets, mask=key_mask, other=0.0)
            values = tl.load(v + offsets, mask=key_mask, other=0.0)
            acc, top, total = attend_block(queries, keys, values, present, scale, acc, top, total)
        begin = stop
        picture += 1

    at = (row * tl.num_programs(1) * GROUP + head) * num_splits + split
    tl.store(parts + at[:, None] * HEAD_DIM + dims[None, :], acc / total[:, None], mask=mask)
    tl.store(lse + at, top + tl.log2(total), mask=h < GROUP)


def decode_cross_attention(
    q: Tensor, layer: int, addresses: Tensor, ends: Tensor, num_kv_heads: int, *, num_splits: int | None = None
) -> Tensor:
    """q [B, num_heads, head_dim] -> the same shape, zeros for a row that sees nothing. Scale is head_dim ** -0.5.

    addresses: int64 [S, B], of the pictures that each row sees: contiguous tensors [layers, 2, tokens, num_kv_heads, head_dim] of
    q's type on q's device, at multiples of 16 bytes. ends: int32 [S, B], how many tokens the row's pictures up to this one
    have, so that the last of them is how many it sees; behind a row's last picture they stay, and no address is looked at. layer:
    whose keys and values. num_splits: `decode_splits` unless given.
    """
    batch, num_heads, head_dim = q.shape
    assert head_dim * q.element_size() % 16 == 0
    assert addresses.stride() == ends.stride()
    how = decode_split(q.dtype, batch)
    splits = num_splits or decode_splits(batch, num_kv_heads, _MANY_KEYS, how.block_n, q.device)
    workspace = decode_workspace(batch, num_heads, splits, head_dim, q.device)
    size = batch * num_heads * splits
    parts, lse = workspace[: size * head_dim], workspace[size * head_dim :]
    group = num_heads // num_kv_heads
    _cross_kernel[(splits, num_kv_heads, batch)](
        q,
        parts,
        lse,
        addresses,
        ends,
        layer,
        head_dim**-0.5 * _LOG2_E,
        splits,
        addresses.stride(0),
        *q.stride()[:2],
        NUM_PICTURES=addresses.shape[0],
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(max(head_dim, 16)),
        BLOCK_H=max(16, triton.next_power_of_2(group)),
        BLOCK_N=how.block_n,
        num_warps=how.num_warps,
        num_stages=how.num_stages,
    )
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    merge_splits(parts, lse, out, ends[-1], splits, how.block_n)
    return out
