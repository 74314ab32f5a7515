"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864): float32 tables once a step, shared by all layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Rotary(NamedTuple):
    """Tables of T rows. cos, sin: float32 [T, 1, head_dim]; the first half of sin is negated, see `apply_rotary`."""

    cos: Tensor
    sin: Tensor


def inverse_frequencies(theta: float, dim: int) -> Tensor:
    """theta ** (-2 i / dim) for i < dim / 2: float32 [dim // 2] on the default device."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def tables(angles: Tensor) -> Rotary:
    """angles: float32 [T, head_dim // 2], by which the pairs (x[i], x[i + head_dim // 2]) are turned."""
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    return Rotary(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))


def apply_rotary(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn x [T, heads, head_dim] in float32; the result is contiguous and of x's dtype.

    With sin's sign in the table, rotate_half(x) * sin is x rolled by half its width times that table.
    """
    if x.dtype is not torch.float32:
        return apply_rotary(x.float(), rotary).to(x.dtype)
    return x.roll(x.shape[-1] // 2, -1).mul_(rotary.sin).addcmul_(x, rotary.cos)


def rotate_heads(qkv: Tensor, rotary: Rotary, num_heads: int) -> Tensor:
    """Turn the first heads of qkv [T, W], on a GPU in place -> [T, num_heads, head_dim]."""
    heads = qkv[:, : num_heads * rotary.cos.shape[-1]].unflatten(1, (num_heads, -1))
    if not qkv.is_cuda:
        return apply_rotary(heads, rotary)
    from sightline.kernels import rope

    rope.rotate_heads(qkv, rotary.cos, rotary.sin, num_heads)
    return heads


def _fused_tables(positions: Tensor, inv_freq: Tensor, axis: Tensor) -> Rotary:
    from sightline.kernels.rope import rotary_tables

    return Rotary(*rotary_tables(positions.contiguous(), inv_freq, axis))


class RotaryEmbedding(nn.Module):
    """Ordinary rotary embedding of positions [T]."""

    inv_freq: Tensor
    axis: Tensor

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inverse_frequencies(theta, head_dim), persistent=False)
        self.register_buffer("axis", torch.zeros(head_dim // 2, dtype=torch.int64), persistent=False)

    def forward(self, positions: Tensor) -> Rotary:
        """positions int64 [T]."""
        if positions.is_cuda:
            return _fused_tables(positions[None], self.inv_freq, self.axis)
        return tables(positions.unsqueeze(1) * self.inv_freq)


class MultimodalRotaryEmbedding(nn.Module):
    """M-RoPE of Qwen2-VL (arXiv:2409.12191, section 2.1): positions on three axes (time, height, width).

    sections: `mrope_section` of config.json; of the head_dim // 2 frequencies the first sections[0] turn by time, the next
    sections[1] by height, the rest by width.
    """

    inv_freq: Tensor
    axis: Tensor

    def __init__(self, head_dim: int, theta: float, sections: Sequence[int]) -> None:
        super().__init__()
        assert sum(sections) == head_dim // 2
        axis = [axis for axis, width in enumerate(sections) for _ in range(width)]
        self.register_buffer("inv_freq", inverse_frequencies(theta, head_dim).unsqueeze(1), persistent=False)
        self.register_buffer("axis", torch.tensor(axis), persistent=False)

    def forward(self, positions: Tensor) -> Rotary:
        """positions int64 [3, T]."""
        if positions.is_cuda:
            return _fused_tables(positions, self.inv_freq, self.axis)
        return tables((positions.index_select(0, self.axis) * self.inv_freq).t())
