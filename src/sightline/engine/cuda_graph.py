"""Whole decode steps as CUDA graphs: one launch instead of hundreds.

A graph replays with the addresses that it was captured with, so its inputs live in static tensors; it is captured for a few
batch sizes, and a smaller batch is padded with rows that read and write nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sightline.attention.backend import AttentionBackend, AttentionBatch, ForwardContext, KVCache

# Rows of `DecodeGraphs.run`'s fields, and those of a padding row, which has no keys and writes nothing.
_IDS, _POSITIONS, _SLOTS, _KV_LENS, _PLACES = range(5)
_PADDING = np.array([[0], [0], [-1], [0], [-1]], dtype=np.int32)


def batch_sizes(largest: int) -> list[int]:
    """1, 2, 4, then steps of 8, above 128 of 16; the largest always."""
    sizes = [1, 2, 4, *range(8, 128, 8), *range(128, largest, 16)]
    return [*(n for n in sizes if n < largest), largest]


class DecodeGraphs:
    """Graphs of embedding, decoder and output head for decode rows that see no picture beside the text.

    max_batch: rows of the largest graph. max_running: rows of any step. max_pages: of one sequence. Memory of all graphs comes from one pool: they never run at the same time.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: KVCache,
        backend: AttentionBackend,
        *,
        max_batch: int,
        max_running: int,
        max_pages: int,
        device: torch.device,
    ) -> None:
        self._model: Any = model
        self._cache = cache
        self._backend = backend
        self.sizes = batch_sizes(max_batch)
        self._inputs = torch.zeros(5 * max_batch, dtype=torch.int32, device=device)
        self._newest = torch.zeros(max_running, dtype=torch.int64, device=device)
        self._page_table = torch.zeros(max_batch, max_pages, dtype=torch.int32, device=device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @torch.inference_mode()
    def capture(self, on_progress: Callable[[float], None] = lambda fraction: None) -> None:
        """Largest first, so that the smaller ones fit into its memory."""
        pool = torch.cuda.graph_pool_handle()
        for i, size in enumerate(reversed(self.sizes)):
            padding = np.repeat(_PADDING, size, axis=1)
            self._inputs[: 5 * size].copy_(torch.from_numpy(padding).view(-1))
            # compiles kernels and fills caches, which a capture cannot do
            self._compute(size)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
                logits = self._compute(size)
            self._graphs[size] = graph, logits
            on_progress((i + 1) / len(self.sizes))

    def covers(self, num_rows: int) -> bool:
        """Whether a batch of this size can be run."""
        return num_rows <= self.sizes[-1]

    def run(self, fields: np.ndarray, page_table: np.ndarray, newest: Tensor | None) -> Tensor:
        """Logits float32 [n, V] of n decode rows, valid until the next call.

        fields: int32 [5, n]: id, rotary position, slot, kv_len, and the row of `newest` (the tokens of the step before, on
        the device) that holds the id instead, or -1. page_table: int32 [n, P].
        """
        n, width = page_table.shape
        size = self.sizes[bisect_left(self.sizes, n)]
        host = torch.empty(5, size, dtype=torch.int32, pin_memory=True)
        array = host.numpy()
        array[:, n:] = _PADDING
        array[:, :n] = fields
        self._inputs[: 5 * size].copy_(host.view(-1), non_blocking=True)
        self._page_table[:n, :width].copy_(torch.from_numpy(page_table).pin_memory(), non_blocking=True)
        if newest is not None:
            self._newest[: newest.shape[0]].copy_(newest)
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[:n]

    def _compute(self, size: int) -> Tensor:
        fields = self._inputs[: 5 * size].view(5, size)
        places = fields[_PLACES]
        ids = torch.where(places >= 0, self._newest[places.clamp(min=0)], fields[_IDS].long())
        positions = fields[_POSITIONS].long()
        batch = AttentionBatch(
            cu_seqlens_q=torch.arange(size + 1, dtype=torch.int32, device=ids.device),
            kv_lens=fields[_KV_LENS],
            page_table=self._page_table[:size],
            slot_mapping=fields[_SLOTS].long(),
            q_lens_cpu=[1] * size,
            kv_lens_cpu=[self._page_table.shape[1] * self._cache.page_size] * size,
            num_decode=size,
        )
        self._backend.prepare(batch)
        hidden = self._model.embed(ids, None, None)
        on_axes = positions.expand(3, size) if self._model.uses_mrope else positions
        hidden = self._model.forward(hidden, on_axes, ForwardContext(self._backend, self._cache, batch), None)
        logits: Tensor = self._model.logits(hidden)
        return logits
