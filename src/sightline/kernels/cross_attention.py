"""Attention of decode rows to the pictures that they see beside the text.

What a row sees changes from step to step, and each picture has keys and values of its own, wherever they were made. So the
kernel reads their addresses on the device, and the launch depends on shapes alone: it can be captured in a CUDA graph. Keys are
divided between programs as in `decode_attention`; an item may begin in one picture and end in the next.

Its equal in torch is `attention.cross.cross_attention`, which is told what each row sees on the host.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sightline.kernels.decode_attention import (
    DecodePlan,
    attend_block,
    decode_plan,
    finish_item,
    load_rows,
    start_item,
)

_LOG2_E = math.log2(math.e)


@triton.jit(
    do_not_specialize=["layer", "stride_picture"],
    do_not_specialize_on_alignment=["addresses", "ends"],
)
def _cross_kernel(
    q,
    out,
    parts,
    items,
    addresses,
    ends,
    layer,
    scale,
    stride_picture,
    q_stride_row,
    q_stride_head,
    out_stride_row,
    out_stride_head,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
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
    stride_key = tl.num_programs(0) * HEAD_DIM
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
            offsets = tl.minimum(positions, last - 1)[:, None] * stride_key + dims[None, :]
            keys = load_rows(k + offsets, dims, HEAD_DIM, BLOCK_D)
            values = load_rows(v + offsets, dims, HEAD_DIM, BLOCK_D)
            acc, top, total = attend_block(queries, keys, values, positions < last, scale, acc, top, total)
        begin = stop
        picture += 1

    finish_item(
        acc, top, total, out, parts, items, row, base, count, out_stride_row, out_stride_head, GROUP, BLOCK_G, HEAD_DIM
    )


def decode_cross_attention(
    q: Tensor, layer: int, addresses: Tensor, ends: Tensor, num_kv_heads: int, *, plan: DecodePlan | None = None
) -> Tensor:
    """q [B, num_heads, head_dim] -> the same shape, zeros for a row that sees nothing. Scale is head_dim ** -0.5.

    addresses: int64 [S, B], of the pictures that each row sees: contiguous tensors [layers, 2, tokens, num_kv_heads, head_dim] of
    q's type on q's device, at multiples of 16 bytes. ends: int32 [S, B], how many tokens the row's pictures up to this one
    have, so that the last of them is how many it sees; behind a row's last picture they stay, and no address is looked at. layer:
    whose keys and values. plan: `decode_plan` of ends[-1], made here unless given.
    """
    num_heads, head_dim = q.shape[1:]
    assert head_dim * q.element_size() % 16 == 0
    assert addresses.stride() == ends.stride()
    items, parts, capacity, how = plan or decode_plan(ends[-1], num_heads, num_kv_heads, head_dim, q.dtype)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    group = num_heads // num_kv_heads
    _cross_kernel[(num_kv_heads, capacity)](
        q,
        out,
        parts,
        items,
        addresses,
        ends,
        layer,
        head_dim**-0.5 * _LOG2_E,
        addresses.stride(0),
        *q.stride()[:2],
        *out.stride()[:2],
        GROUP=group,
        BLOCK_G=triton.next_power_of_2(group),
        BLOCK_H=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(max(head_dim, 16)),
        BLOCK_N=how.block_n,
        num_warps=how.num_warps,
        num_stages=how.num_stages,
    )
    return out
