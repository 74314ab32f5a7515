"""The one interface between a model's attention layers and the K/V cache.

A step's tokens are packed: sequence i owns rows cu_seqlens_q[i]:cu_seqlens_q[i+1] of every [T, ...] tensor, its newest
q_lens[i] tokens, whose keys and values are written to the cache before attention reads kv_lens[i] of them. Decode rows
(q_len 1) come first, so the first `num_decode` sequences are also the first `num_decode` rows.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sightline.attention.cross import CrossAttentionBatch, CrossDecodeBatch, cross_attention


@dataclass(frozen=True)
class KVCache:
    """Paged keys and values of every layer. k[l], v[l]: [num_pages, page_size, num_kv_heads, head_dim]."""

    k: list[Tensor]
    v: list[Tensor]
    page_size: int

    @classmethod
    def allocate(
        cls,
        *,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCache:
        """Zero-filled pages (never `empty`: masked garbage that is NaN would still poison a softmax).

        On a CPU the zeros come from the operating system page by page at first use, so that a large cache costs neither
        start-up time nor memory until it is needed.
        """
        shape = (num_pages, page_size, num_kv_heads, head_dim)

        def zeros() -> Tensor:
            if device.type == "cpu":
                size = math.prod(shape) * dtype.itemsize
                return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)
            return torch.zeros(shape, dtype=dtype, device=device)

        make = [zeros() for _ in range(2 * num_layers)]
        return cls(k=make[:num_layers], v=make[num_layers:], page_size=page_size)


@dataclass(frozen=True)
class AttentionBatch:
    """One step's layout, on the device. B sequences, T packed rows.

    cu_seqlens_q: int32 [B+1]. kv_lens: int32 [B], tokens in the cache after this step's write. page_table: int32
    [B, P], physical page of each logical page, 0 where unused. slot_mapping: int64 [T], page * page_size + offset where
    each row's K/V goes. tiles: `AttentionBackend.plan_tiles` on the device, for a backend that has it and was not given the
    lengths. q_lens_cpu, kv_lens_cpu: the same lengths as Python lists, so that no backend synchronises.
    """

    cu_seqlens_q: Tensor
    kv_lens: Tensor
    page_table: Tensor
    slot_mapping: Tensor
    q_lens_cpu: list[int]
    kv_lens_cpu: list[int]
    num_decode: int
    tiles: Tensor | None = None


class AttentionBackend(abc.ABC):
    """Causal self-attention over the paged cache. One instance serves all layers and steps.

    capturable: a step can be part of a CUDA graph, because launches depend on the tensors' shapes alone; then kv_len 0, slot
    -1 and tiles of empty sequences are padding, and the lengths on the host are not looked at. rotates: `rotate_and_forward`
    is there.
    """

    capturable = False
    rotates = False

    @abc.abstractmethod
    def prepare(self, batch: AttentionBatch) -> None:
        """Called once a step, before any layer; derive what all layers share (masks, gather indices, plans)."""

    @abc.abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer: int, cache: KVCache, batch: AttentionBatch) -> Tensor:
        """Write k, v [T, num_kv_heads, head_dim] at slot_mapping, then attend q [T, num_heads, head_dim].

        Scale is head_dim ** -0.5; row r of a sequence sees keys 0 .. kv_len - q_len + r. Returns [T, num_heads, head_dim].
        """

    def rotate_and_forward(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, layer: int, cache: KVCache, batch: AttentionBatch
    ) -> Tensor:
        """`forward` of the merged projection, with the rotation. qkv [T, (num_heads + 2 num_kv_heads) * head_dim] is
        overwritten; cos, sin: as in `layers.rotary.Rotary`. Returns [T, num_heads, head_dim]."""
        raise NotImplementedError

    def plan_tiles(
        self, q_lens: Sequence[int], kv_lens: Sequence[int], num_rows: int, num_heads: int, cache: KVCache
    ) -> np.ndarray:
        """int32 [N, 2], the work of the prompts of these lengths in a graph of num_rows rows, as `AttentionBatch.tiles` wants it;
        for a capturable backend. N depends on q_lens and num_rows alone."""
        raise NotImplementedError

    def cross_forward(self, q: Tensor, layer: int, cross: CrossAttentionBatch | CrossDecodeBatch) -> Tensor:
        """Attend q [R, num_heads, head_dim] to pictures -> the same shape. A capturable backend takes a `CrossDecodeBatch`, too."""
        assert isinstance(cross, CrossAttentionBatch)
        return cross_attention(q, layer, cross)


@dataclass(frozen=True)
class ForwardContext:
    """What a model's forward needs beside its tensors; an argument, never a global.

    cross: the pictures that rows attend to, for families with cross-attention; None when no row of the step sees one.
    """

    backend: AttentionBackend
    cache: KVCache
    batch: AttentionBatch
    cross: CrossAttentionBatch | CrossDecodeBatch | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """Causal attention of decoder layer `layer`; shapes as in `AttentionBackend.forward`."""
        return self.backend.forward(q, k, v, layer, self.cache, self.batch)
