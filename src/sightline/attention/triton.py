"""The NVIDIA backend: Triton kernels for decode rows and prompt chunks, both over the paged cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sightline.attention.backend import AttentionBackend, AttentionBatch, KVCache
from sightline.attention.cross import CrossAttentionBatch, CrossDecodeBatch
from sightline.kernels.common import multiprocessors
from sightline.kernels.cross_attention import decode_cross_attention
from sightline.kernels.decode_attention import DecodePlan, decode_attention, decode_plan
from sightline.kernels.prefill_attention import Tile, prefill_attention, prefill_splits, prefill_tile, prefill_tiles
from sightline.kernels.rope import rotate_and_write, write_kv


class TritonBackend(AttentionBackend):
    """Decode rows in one launch, all chunks of the step in another.

    What decode rows are divided into is planned on the device, once a step, so that the plan can be part of a CUDA graph; chunks
    are planned on the host. A padding row has kv_len 0 and slot -1; it gives zeros and writes nowhere.
    """

    capturable = True
    rotates = True

    def __init__(self) -> None:
        self._tiles: tuple[Tensor, Tile, int] | None = None
        self._decode: DecodePlan | None = None
        self._seen: DecodePlan | None = None

    def prepare(self, batch: AttentionBatch) -> None:
        """Plans depend on head counts: the first layer makes them, except for tiles that the batch brings."""
        self._tiles = self._decode = self._seen = None

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
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if decode:
            heads, kv_heads, dim = q.shape[1], keys.shape[2], keys.shape[3]
            self._decode = self._decode or decode_plan(batch.kv_lens[:decode], heads, kv_heads, dim, keys.dtype)
            decode_attention(
                q[:decode], keys, values, batch.page_table, batch.kv_lens, out=out[:decode], plan=self._decode
            )
        if decode == q.shape[0]:
            return out
        tiles, tile, splits = self._tiles = self._tiles or self._plan(q, keys, batch)
        cu_seqlens_q, kv_lens, page_table = batch.cu_seqlens_q, batch.kv_lens, batch.page_table
        return prefill_attention(
            q, keys, values, cu_seqlens_q, kv_lens, page_table, tiles, tile=tile, out=out, num_splits=splits
        )

    def cross_forward(self, q: Tensor, layer: int, cross: CrossAttentionBatch | CrossDecodeBatch) -> Tensor:
        """See `AttentionBackend.cross_forward`."""
        if isinstance(cross, CrossDecodeBatch):
            self._seen = self._seen or decode_plan(cross.ends[-1], q.shape[1], cross.num_kv_heads, q.shape[2], q.dtype)
            return decode_cross_attention(q, layer, cross.addresses, cross.ends, cross.num_kv_heads, plan=self._seen)
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
