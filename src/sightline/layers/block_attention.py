"""Attention inside blocks of rows, as in the vision towers: pictures, tiles or windows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


def block_attention(q: Tensor, k: Tensor, v: Tensor, groups: Sequence[tuple[int, int]]) -> Tensor:
    """q, k, v [N, num_heads, head_dim] -> [N, num_heads * head_dim]. groups: (count, rows) of consecutive blocks of equally many
    rows, N in all; each row sees its own block. Scale is head_dim ** -0.5."""
    if q.is_cuda:
        from sightline.kernels.vision_attention import vision_attention

        out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
        for count, rows in _slices(groups):
            vision_attention(q[rows], k[rows], v[rows], count, out[rows])
        return out
    outputs = []
    for count, rows in _slices(groups):
        blocks = (t[rows].unflatten(0, (count, -1)).transpose(1, 2) for t in (q, k, v))
        out = scaled_dot_product_attention(*blocks).transpose(1, 2)
        outputs.append(out.reshape(-1, q.shape[1] * q.shape[2]))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def block_flops(block: nn.Module, width: int, groups: Sequence[tuple[int, int]]) -> float:
    """Floating-point operations of a transformer block over such blocks of rows: two for each row and weight, and four for each
    pair of rows that see each other and each of the `width` columns of all heads."""
    weights = sum(parameter.numel() for parameter in block.parameters())
    return float(sum(count * rows * (2 * weights + 4 * rows * width) for count, rows in groups))


def _slices(groups: Sequence[tuple[int, int]]) -> list[tuple[int, slice]]:
    slices, first = [], 0
    for count, rows in groups:
        slices.append((count, slice(first, first + count * rows)))
        first += count * rows
    return slices
