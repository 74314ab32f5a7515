"""Qwen2.5-VL (arXiv:2502.13923): Qwen2-VL with windows in most of the tower's attention, RMSNorm and a gated MLP.

Pictures, positions and the decoder are Qwen2-VL's. Patches stand in the order of their windows while the blocks run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor, nn

from sightline.layers.activation import silu_and_mul
from sightline.layers.block_attention import block_flops
from sightline.layers.linear import Linear, MergedLinear
from sightline.layers.norm import RMSNorm
from sightline.layers.rotary import Rotary
from sightline.models import Encoding
from sightline.models.config import Fields
from sightline.models.qwen2_vl import (
    Grid,
    PatchMerger,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLVisionConfig,
    VisionBlock,
    VisionTower,
)


@dataclass(frozen=True)
class Qwen2_5_VLVisionConfig(Qwen2VLVisionConfig):
    """window_size: side of an attention window in pixels. full_attention: indices of the blocks without windows."""

    window_size: int
    full_attention: frozenset[int]

    @classmethod
    def from_fields(cls, fields_: Fields, preprocessor: Fields) -> Qwen2_5_VLVisionConfig:
        """Here `hidden_size` is the inner width and `out_hidden_size` the decoder's; other defaults are transformers'."""
        fields_.one_of(str, "hidden_act", allowed=["silu"], default="silu")
        inner = fields_.positive("hidden_size", default=3584)
        names = {
            "embed_dim": inner,
            "hidden_size": fields_.positive("out_hidden_size", default=3584),
            "hidden_act": "silu",
        }
        base = Qwen2VLVisionConfig.from_fields(Fields({**fields_.values, **names}, fields_.where), preprocessor)
        values = {field.name: getattr(base, field.name) for field in fields(base)}
        values["intermediate_size"] = fields_.positive("intermediate_size", default=3420)
        window = fields_.positive("window_size", default=112)
        cell = base.patch_size * base.spatial_merge_size
        if window % cell:
            raise fields_.error("window_size", f"is {window}, where a multiple of {cell} is expected")
        full = fields_.get(list, "fullatt_block_indexes", default=[7, 15, 23, 31])
        if not all(isinstance(i, int) and 0 <= i < base.depth for i in full):
            raise fields_.error("fullatt_block_indexes", f"is {full!r}, with {base.depth} blocks")
        return cls(**values, window_size=window, full_attention=frozenset(full))


@dataclass(frozen=True)
class Qwen2_5_VLConfig(Qwen2VLConfig):
    """Both halves."""

    vision_class: ClassVar[type[Qwen2VLVisionConfig]] = Qwen2_5_VLVisionConfig


class GatedVisionMLP(nn.Module):
    """down(silu(gate x) * up x), with biases."""

    def __init__(self, config: Qwen2VLVisionConfig) -> None:
        super().__init__()
        width = config.intermediate_size
        self.gate_up_proj = MergedLinear(config.embed_dim, {"gate_proj": width, "up_proj": width}, bias=True)
        self.down_proj = Linear(width, config.embed_dim, bias=True)

    @property
    def output(self) -> Linear:
        """The last product."""
        return self.down_proj

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x, residual [N, E] -> residual + mlp(x), all but the bias of `output`."""
        return self.down_proj.add_product_to(residual, silu_and_mul(self.gate_up_proj(x)))


class WindowBlock(VisionBlock):
    """A block; whether it attends in windows is for its caller to say."""

    norm_class = RMSNorm
    mlp_class = GatedVisionMLP


class RMSPatchMerger(PatchMerger):
    """`PatchMerger` with the other norm."""

    norm_class = RMSNorm


class WindowTower(VisionTower):
    """Cells (merged patches) are regrouped by window, windows of equal size together, and put back after the merger."""

    block_class = WindowBlock
    merger_class = RMSPatchMerger

    def __init__(self, config: Qwen2_5_VLVisionConfig) -> None:
        super().__init__(config)
        self.window = config.window_size // (config.patch_size * config.spatial_merge_size)
        self.full_attention = config.full_attention

    def _encode(
        self, x: Tensor, rotary: Rotary, grids: Sequence[Grid], groups: Sequence[tuple[int, int]]
    ) -> Encoding[Tensor]:
        """See `VisionTower._encode`."""
        order, windows = self._windows(grids)
        cell = self.merge**2
        rows = (order[:, None] * cell + torch.arange(cell)).flatten().to(x.device)
        x = x.index_select(0, rows)
        rotary = Rotary(rotary.cos.index_select(0, rows), rotary.sin.index_select(0, rows))
        pending = None
        for i, block in enumerate(self.blocks):
            attended = groups if i in self.full_attention else windows
            x, pending = block(x, pending, rotary, attended)
            yield block_flops(block, x.shape[1], attended)
        return self.merger(x, pending).index_select(0, order.argsort().to(x.device))

    def _windows(self, grids: Sequence[Grid]) -> tuple[Tensor, list[tuple[int, int]]]:
        """(order of all cells, int64 [N / merge^2]; (count, patches) of consecutive windows with equally many patches)."""
        orders: list[Tensor] = []
        groups: list[tuple[int, int]] = []
        first = 0
        for _, h, w in grids:
            height, width = h // self.merge, w // self.merge
            across = -(-width // self.window)
            rows, columns = torch.arange(height) // self.window, torch.arange(width) // self.window
            window = (rows[:, None] * across + columns).flatten()
            sizes = window.bincount()
            # by size, then by window, then row by row; pictures stay apart for the blocks without windows
            orders.append(first + (sizes[window] * len(sizes) + window).argsort(stable=True))
            values, counts = sizes.unique(return_counts=True)
            groups += [(n, size * self.merge**2) for size, n in zip(values.tolist(), counts.tolist(), strict=True)]
            first += height * width
        return torch.cat(orders), groups


class Qwen2_5_VLForConditionalGeneration(Qwen2VLForConditionalGeneration):
    """See the contract in `sightline.models`."""

    config_class = Qwen2_5_VLConfig
    # the order of windows is made on the host
    static_encoder = False
    tower_class = WindowTower
