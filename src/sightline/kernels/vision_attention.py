"""Attention of a vision tower: every patch of a picture sees all of that picture's.

The algorithm is FlashAttention-2's (Dao 2023, arXiv:2307.08691). Tensor cores want widths that are powers of two, and vision towers
have heads of 72 or 80: such a head is taken as two pieces, 64 and 16, instead of being padded to 128. Measured on an H200 for
5476 patches and 16 heads of 80: 0.42 ms, cuDNN 0.44 (behind 300 ms of planning for each new shape), FlashAttention-2 0.66. There
`kernels.vision_attention_hopper` is faster still.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sightline.kernels.common import dot, hopper_form

_LOG2_E = math.log2(math.e)
# Programs of 128 patches from which tiles of 64 would be slower: twice an H200's multiprocessors.
_MANY = 264


@triton.jit
def _block(
    acc, acc_rest, top, total, q, q_rest, k, v, start, num_patches, scale, stride,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Keys start .. start + BLOCK_N - 1, of which those from num_patches on do not exist (only if MASKED)."""
    dims = tl.arange(0, MAIN)
    rest = MAIN + tl.arange(0, REST)
    keys = start + tl.arange(0, BLOCK_N)
    present = keys < num_patches
    at = keys.to(tl.int64)[:, None] * stride
    # a tile without a mask is copied in larger pieces
    if MASKED or HEAD_DIM < MAIN:
        mask = present[:, None] & (dims < HEAD_DIM)[None, :]
        k_main = tl.load(k + at + dims[None, :], mask=mask, other=0.0)
        v_main = tl.load(v + at + dims[None, :], mask=mask, other=0.0)
    else:
        k_main = tl.load(k + at + dims[None, :])
        v_main = tl.load(v + at + dims[None, :])
    scores = dot(q, tl.trans(k_main), tl.zeros([q.shape[0], BLOCK_N], tl.float32))
    if HEAD_DIM > MAIN:
        if MASKED or HEAD_DIM < MAIN + REST:
            mask = present[:, None] & (rest < HEAD_DIM)[None, :]
            k_rest = tl.load(k + at + rest[None, :], mask=mask, other=0.0)
            v_rest = tl.load(v + at + rest[None, :], mask=mask, other=0.0)
        else:
            k_rest = tl.load(k + at + rest[None, :])
            v_rest = tl.load(v + at + rest[None, :])
        scores = dot(q_rest, tl.trans(k_rest), scores)
    if MASKED:
        scores = tl.where(present[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_top[:, None])
    fade = tl.exp2(top - new_top)
    total = total * fade + tl.sum(weights, 1)
    weights = weights.to(v_main.dtype)
    acc = dot(weights, v_main, acc * fade[:, None])
    if HEAD_DIM > MAIN:
        acc_rest = dot(weights, v_rest, acc_rest * fade[:, None])
    return acc, acc_rest, new_top, total


@triton.jit(do_not_specialize=["num_patches"])
def _vision_kernel(
    q, k, v, out, num_patches, scale, stride, stride_out,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (block of patches, head, picture)."""
    head = tl.program_id(1)
    first = tl.program_id(2).to(tl.int64) * num_patches
    patch = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, MAIN)
    rest = MAIN + tl.arange(0, REST)
    live = (patch < num_patches)[:, None]
    mask = live & (dims < HEAD_DIM)[None, :]
    mask_rest = live & (rest < HEAD_DIM)[None, :]
    lines = q + (first + patch)[:, None] * stride + head * HEAD_DIM
    queries = tl.load(lines + dims[None, :], mask=mask, other=0.0)
    queries_rest = tl.load(lines + rest[None, :], mask=mask_rest, other=0.0)
    acc = tl.zeros([BLOCK_M, MAIN], tl.float32)
    acc_rest = tl.zeros([BLOCK_M, REST], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    k += first * stride + head * HEAD_DIM
    v += first * stride + head * HEAD_DIM
    whole = num_patches // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        acc, acc_rest, top, total = _block(
            acc, acc_rest, top, total, queries, queries_rest, k, v, start, num_patches, scale, stride,
            False, HEAD_DIM, MAIN, REST, BLOCK_N,
        )  # fmt: skip
    if whole < num_patches:
        acc, acc_rest, top, total = _block(
            acc, acc_rest, top, total, queries, queries_rest, k, v, whole, num_patches, scale, stride,
            True, HEAD_DIM, MAIN, REST, BLOCK_N,
        )  # fmt: skip
    lines = out + (first + patch)[:, None] * stride_out + head * HEAD_DIM
    share = (1.0 / total)[:, None]
    tl.store(lines + dims[None, :], (acc * share).to(out.dtype.element_ty), mask=mask)
    if HEAD_DIM > MAIN:
        tl.store(lines + rest[None, :], (acc_rest * share).to(out.dtype.element_ty), mask=mask_rest)


def vision_attention(q: Tensor, k: Tensor, v: Tensor, num_pictures: int, out: Tensor | None = None) -> Tensor:
    """q, k, v: [num_pictures * P, num_heads, head_dim], P rows of each picture -> [num_pictures * P, num_heads * head_dim].

    The three have the same strides, and a row's heads lie side by side (as in a merged projection). out: contiguous, written
    instead of a new tensor. Scale is head_dim ** -0.5.
    """
    num_rows, num_heads, head_dim = q.shape
    assert q.stride() == k.stride() == v.stride()
    assert q.stride()[1:] == (head_dim, 1)
    if out is None:
        out = torch.empty(num_rows, num_heads * head_dim, dtype=q.dtype, device=q.device)
    if num_rows == 0:
        return out
    hopper = hopper_form("vision_attention", q)
    if hopper is not None and hopper.takes(q):
        hopper.vision_attention_hopper(q, k, v, num_pictures, out)
        return out
    num_patches = num_rows // num_pictures
    main = max(16, 1 << (head_dim.bit_length() - 1))
    if q.element_size() != 2:
        block_m, block_n, warps, stages = 32, 32, 4, 2
    elif triton.cdiv(num_patches, 128) * num_heads * num_pictures >= _MANY:
        block_m, block_n, warps, stages = 128, 64, 8, 3
    else:
        block_m, block_n, warps, stages = 64, 64, 4, 3
    _vision_kernel[(triton.cdiv(num_patches, block_m), num_heads, num_pictures)](
        q, k, v, out, num_patches, head_dim**-0.5 * _LOG2_E, q.stride(0), num_heads * head_dim,
        HEAD_DIM=head_dim, MAIN=main, REST=max(16, triton.next_power_of_2(max(head_dim - main, 1))),
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def vision_attention_reference(q: Tensor, k: Tensor, v: Tensor, num_pictures: int) -> Tensor:
    """`vision_attention` in torch."""
    pictures = (t.unflatten(0, (num_pictures, -1)).transpose(1, 2) for t in (q, k, v))
    out = scaled_dot_product_attention(*pictures).transpose(1, 2)
    return out.reshape(q.shape[0], -1)
