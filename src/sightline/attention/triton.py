"""The NVIDIA backend: Triton kernels for decode rows (split keys) and prompt chunks, both over the paged cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sightline.attention.backend import AttentionBackend, AttentionBatch, KVCache
from sightline.attention.cross import CrossAttentionBatch, CrossDecodeBatch
from sightline.kernels.common import multiprocessors
from sightline.kernels.cross_attention import decode_cross_attention
from sightline.kernels.decode_attention import decode_attention
from sightline.kernels.prefill_attention import Tile, prefill_attention, prefill_splits, prefill_tile, prefill_tiles
from sightline.kernels.rope import rotate_and_write, write_kv


class TritonBackend(AttentionBackend):
    """Decode rows in one launch (two with few rows, to merge split keys), all chunks of the step in another.

    A step of decode rows alone can be captured in a CUDA graph: nothing there depends on lengths, and `prepare` is a no-op. A
    padding row has kv_len 0 and slot -1; it gives zeros and writes nowhere. Steps with chunks are planned on the host.
    """

    capturable = True
    rotates = True

    def __init__(self) -> None:
        self._tiles: tuple[Tensor, Tile, int] | None = None

    def prepare(self, batch: AttentionBatch) -> None:
        """What the step's chunks are divided into depends on head counts: the first layer plans it, unless the batch brings tiles."""
        self._tiles = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer: int, cache: KVCache, batch: AttentionBatch) -> Tensor:
        """See `AttentionBackend.forward`."""
        write_kv(k, v, cache.k[layer], cache.v[layer], batch.slot_mapping)
        return self._attend(q, layer, cache, batch)

    def rotate_and_forward(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, layer: int, cache: KVCache, batch: AttentionBatch
    ) -> Tensor:
        """`forward` of the merged projection with the rotation and the cache write in one launch. Queries and keys of qkv
        are turned in place.

        qkv [T, (num_heads + 2 num_kv_heads) * head_dim], rows contiguous; cos, sin: as in `layers.rotary.Rotary`.
        Returns [T, num_heads, head_dim].
        """
        rotate_and_write(qkv, cos, sin, cache.k[layer], cache.v[layer], batch.slot_mapping)
        kv_heads, dim = cache.k[layer].shape[2:]
        q = qkv.view(qkv.shape[0], -1, dim)[:, : -2 * kv_heads]
        return self._attend(q, layer, cache, batch)

    def _attend(self, q: Tensor, layer: int, cache: KVCache, batch: AttentionBatch) -> Tensor:
        """k and v are in the cache already."""
        keys, values, decode = cache.k[layer], cache.v[layer], batch.num_decode
        if decode == q.shape[0]:
            return decode_attention(q, keys, values, batch.page_table, batch.kv_lens)
        tiles, tile, splits = self._tiles = self._tiles or self._plan(q, keys, batch)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if decode:
            decode_attention(q[:decode], keys, values, batch.page_table, batch.kv_lens, out=out[:decode])
        cu_seqlens_q, kv_lens, page_table = batch.cu_seqlens_q, batch.kv_lens, batch.page_table
        return prefill_attention(
            q, keys, values, cu_seqlens_q, kv_lens, page_table, tiles, tile=tile, out=out, num_splits=splits
        )

    def cross_forward(self, q: Tensor, layer: int, cross: CrossAttentionBatch | CrossDecodeBatch) -> Tensor:
        """See `AttentionBackend.cross_forward`."""
        if isinstance(cross, CrossDecodeBatch):
            return decode_cross_attention(q, layer, cross.addresses, cross.ends, cross.num_kv_heads)
        return super().cross_forward(q, layer, cross)

    def plan_tiles(
        self, q_lens: Sequence[int], kv_lens: Sequence[int], num_rows: int, num_heads: int, cache: KVCache
    ) -> np.ndarray:
        """See `AttentionBackend.plan_tiles`."""
        k = cache.k[0]
        tile = prefill_tile(k, num_rows * num_heads)
        return prefill_tiles(q_lens, kv_lens, group=num_heads // k.shape[2], tile=tile)

    def _plan(self, q: Tensor, keys: Tensor, batch: AttentionBatch) -> tuple[Tensor, Tile, int]:
        """Tiles, how they are compiled, and splits of their keys. Decode rows get no tiles."""
        num_rows, num_heads = q.shape[:2]
        num_kv_heads = keys.shape[2]
        if batch.tiles is not None:
            tiles, tile = batch.tiles, prefill_tile(keys, num_rows * num_heads)
        else:
            q_lens = [0] * batch.num_decode + batch.q_lens_cpu[batch.num_decode :]
            tile = prefill_tile(keys, sum(q_lens) * num_heads)
            group = num_heads // num_kv_heads
            tiles = torch.from_numpy(prefill_tiles(q_lens, batch.kv_lens_cpu, group=group, tile=tile))
            tiles = tiles.pin_memory().to(q.device, non_blocking=True) if q.is_cuda else tiles
        return tiles, tile, prefill_splits(num_rows, num_heads, num_kv_heads, tile, multiprocessors(q.device))
