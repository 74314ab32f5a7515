"""Attention from text to pictures, for families that keep pictures beside the text instead of inside it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class PictureGroup(NamedTuple):
    """Pictures that are seen together, and by how many rows.

    features: one tensor [layers, 2, tokens, num_kv_heads, head_dim] for each picture, keys at 0 and values at 1.
    """

    num_rows: int
    features: tuple[Tensor, ...]


@dataclass(frozen=True)
class CrossAttentionBatch:
    """What each packed row of a step sees.

    rows: int64 [R] on the device, the rows that see a picture, those of each group together; None when they are all rows of
    the step in their order. groups: in the order of `rows`; their num_rows sum to R. Rows of no group see nothing.
    """

    rows: Tensor | None
    groups: Sequence[PictureGroup]

    def gather(self, x: Tensor) -> Tensor:
        """[T, ...] -> [R, ...]."""
        return x if self.rows is None else x.index_select(0, self.rows)

    def scatter(self, x: Tensor, new: Tensor) -> Tensor:
        """x [T, ...] with `new` [R, ...] in place of the rows that see something."""
        return new if self.rows is None else x.index_copy(0, self.rows, new)


@dataclass(frozen=True)
class CrossDecodeBatch:
    """What each row of a decode step sees, in tensors whose shapes do not depend on it, for a CUDA graph. All rows take part, and
    who sees nothing gets its input back.

    addresses: int64 [S, T], ends: int32 [S, T], both on the device: of up to S pictures of each row, see
    `kernels.cross_attention`. num_kv_heads: that they have.
    """

    addresses: Tensor
    ends: Tensor
    num_kv_heads: int

    @functools.cached_property
    def _sees(self) -> Tensor:
        return (self.ends[-1] > 0)[:, None]

    def gather(self, x: Tensor) -> Tensor:
        """[T, ...] as it is."""
        return x

    def scatter(self, x: Tensor, new: Tensor) -> Tensor:
        """`new` [T, hidden] in the rows that see something, x in the others."""
        return torch.where(self._sees, new, x)


def cross_attention(q: Tensor, layer: int, batch: CrossAttentionBatch) -> Tensor:
    """q [R, num_heads, head_dim] -> the same shape: every row attends to all tokens of its group's pictures.

    layer counts cross-attention layers. Scale is head_dim ** -0.5; there is no mask and no order. Heads that share a key
    head become its rows, so that keys are neither repeated nor read twice.
    """
    outputs = []
    first = 0
    for group in batch.groups:
        rows = q[first : first + group.num_rows]
        first += group.num_rows
        parts = [features[layer] for features in group.features]
        k, v = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        num_rows, num_heads, dim = rows.shape
        num_kv_heads = k.shape[1]
        grouped = rows.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, dim).transpose(0, 1)
        out = scaled_dot_product_attention(
            grouped.reshape(1, num_kv_heads, -1, dim), k.transpose(0, 1)[None], v.transpose(0, 1)[None]
        )
        out = out.view(num_kv_heads, num_rows, num_heads // num_kv_heads, dim).transpose(0, 1)
        outputs.append(out.reshape(num_rows, num_heads, dim))
    assert first == q.shape[0], f"groups of {first} rows for {q.shape[0]} queries"
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
