"""The NVIDIA backend: Triton kernels for decode rows (split keys) and prompt chunks, both over the paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from sightline.attention.backend import AttentionBackend, AttentionBatch, KVCache
from sightline.kernels.decode_attention import decode_attention
from sightline.kernels.prefill_attention import packed_attention, prefill_attention, prefill_tile, prefill_tiles
from sightline.kernels.rope import rotate_and_write, write_kv


class TritonBackend(AttentionBackend):
    """Decode rows in one launch (two with few rows, to merge split keys), all chunks of the step in another.

    A step of decode rows alone can be captured in a CUDA graph: nothing there depends on lengths, and `prepare` is a no-op. A
    padding row has kv_len 0 and slot -1; it gives zeros and writes nowhere. Steps with chunks are planned on the host.

    packed_prefill: chunks without history, when the step has no others, go to torch's FlashAttention (16 bit only).
    """

    def __init__(self, packed_prefill: bool = False) -> None:
        self.packed_prefill = packed_prefill
        self._tiles: Tensor | None = None
        self._packed: tuple[Tensor, int] | None = None

    def prepare(self, batch: AttentionBatch) -> None:
        """The tiles of the step's chunks need head counts: the first layer makes them."""
        self._tiles = None
        self._packed = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer: int, cache: KVCache, batch: AttentionBatch) -> Tensor:
        """See `AttentionBackend.forward`."""
        write_kv(k, v, cache.k[layer], cache.v[layer], batch.slot_mapping)
        return self._attend(q, k, v, layer, cache, batch)

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
        heads = qkv.view(qkv.shape[0], -1, dim)
        q, k, v = heads.split((heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
        return self._attend(q, k, v, layer, cache, batch)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, cache: KVCache, batch: AttentionBatch) -> Tensor:
        """k and v are in the cache already."""
        keys, values, decode = cache.k[layer], cache.v[layer], batch.num_decode
        if decode == q.shape[0]:
            return decode_attention(q, keys, values, batch.page_table, batch.kv_lens)
        if self._tiles is None:
            self._plan(q, keys.shape[2], batch)
        assert self._tiles is not None
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if decode:
            decode_attention(q[:decode], keys, values, batch.page_table, batch.kv_lens, out=out[:decode])
        if self._packed is not None:
            offsets, longest = self._packed
            out[decode:] = packed_attention(q[decode:], k[decode:], v[decode:], offsets, longest)
            return out
        return prefill_attention(
            q,
            keys,
            values,
            batch.cu_seqlens_q,
            batch.kv_lens,
            batch.page_table,
            self._tiles,
            tile=prefill_tile(q.dtype),
            out=out,
        )

    def _plan(self, q: Tensor, num_kv_heads: int, batch: AttentionBatch) -> None:
        """Decode rows get no tiles."""
        first = batch.num_decode
        chunks = batch.q_lens_cpu[first:]
        if self.packed_prefill and q.is_cuda and q.dtype.itemsize == 2 and chunks == batch.kv_lens_cpu[first:]:
            self._packed = (batch.cu_seqlens_q[first:] - first, max(chunks))
        group = q.shape[1] // num_kv_heads
        q_lens = [0] * first + chunks
        tiles = torch.from_numpy(prefill_tiles(q_lens, batch.kv_lens_cpu, group=group, tile=prefill_tile(q.dtype)))
        self._tiles = tiles.pin_memory().to(q.device, non_blocking=True) if q.is_cuda else tiles
