"""Whole steps as CUDA graphs: one launch instead of hundreds, which a processor is too slow to make in time.

A graph replays with the addresses that it was captured with, so its inputs live in static tensors; it is captured for a few
sizes, and a smaller step is padded with rows that read and write nothing. A start waits for some of the graphs; the others are
captured when the engine is idle, or behind the first step of their size.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sightline.attention.backend import AttentionBackend, AttentionBatch, ForwardContext, KVCache
from sightline.attention.cross import CrossDecodeBatch
from sightline.engine.encoder import has_cross_attention

# Prompts of one mixed step, at most.
_MAX_PROMPTS = 32
# Rows of a mixed step, up to the scheduler's bound, and of these how many decode or are sampled. Beyond, padding would cost more than
# the launches, for which the device is busy long enough.
_TOKENS = (32, 64, 128, 192, 256, 384, 512, 640, 768, 1024, 1280, 1536, 1792, 2048)
_SAMPLED = (16, 64, 128, 256)
# Pictures beside the text that a row of a decode step may see.
_MAX_SEEN = 8


class GraphKey(NamedTuple):
    """Which steps a graph runs: of up to `tokens` rows, all of which decode (sampled is 0), or mixed ones of which up to `sampled`
    are sampled. sees: decode steps in which rows see pictures beside the text."""

    tokens: int
    sampled: int = 0
    sees: bool = False


class HostStep(NamedTuple):
    """A step's layout as the host knows it: T packed rows of B sequences, decode rows first, S of them sampled.

    ids: int [T], 0 where only the device knows. places: int [num_decode], where among the tokens of the step before the id of
    a decode row stands, or -1. positions: int [3, T]. slots: int [T]. q_lens, kv_lens: B lengths. page_table: int32 [B, P].
    sampled: the S rows whose logits are wanted.
    """

    ids: np.ndarray
    places: list[int]
    positions: np.ndarray
    slots: np.ndarray
    q_lens: list[int]
    kv_lens: list[int]
    page_table: np.ndarray
    sampled: list[int]

    @property
    def num_decode(self) -> int:
        """Sequences of one row that decode."""
        return len(self.places)


class _Inputs:
    """Every number of a step, in one int32 buffer that one copy fills."""

    def __init__(
        self, num_rows: int, num_sequences: int, num_tiles: int, num_pictures: int, device: torch.device
    ) -> None:
        sizes = {
            # first, because they are int64
            "addresses": 2 * num_pictures,
            "ends": num_pictures,
            "ids": num_rows,
            "places": num_rows,
            "positions": 3 * num_rows,
            "slots": num_rows,
            "sampled": num_rows,
            "kv_lens": num_sequences,
            "cu_seqlens": num_sequences + 1,
            "tiles": 2 * num_tiles,
        }
        self._ends = np.cumsum(list(sizes.values())).tolist()
        self._names = list(sizes)
        self._buffer = torch.zeros(self._ends[-1], dtype=torch.int32, device=device)
        self.views = self._split(self._buffer)

    def _split(self, flat: Any) -> dict[str, Any]:
        starts = [0, *self._ends]
        return {name: flat[a:b] for name, a, b in zip(self._names, starts, self._ends, strict=False)}

    def host(self) -> tuple[Tensor, dict[str, np.ndarray]]:
        """New memory of the same layout, pinned for a GPU, and its parts; what is not written is arbitrary."""
        memory = torch.empty(self._ends[-1], dtype=torch.int32, pin_memory=self._buffer.is_cuda)
        return memory, self._split(memory.numpy())

    def upload(self, memory: Tensor) -> None:
        """Replace all."""
        self._buffer.copy_(memory, non_blocking=True)


class StepGraphs:
    """Of decode steps the embedding, decoder and head; of mixed ones the decoder and head, because what pictures put into the
    embedding has no fixed shape. Of mixed steps in which a row sees a picture beside the text there is none.

    max_batch: rows of the largest decode graph. max_running: rows that a step may sample. max_mixed: rows of a mixed step.
    max_pages: of one sequence. num_heads: query heads. Memory of all graphs comes from one pool: they never run at the same
    time.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: KVCache,
        backend: AttentionBackend,
        *,
        max_batch: int,
        max_running: int,
        max_mixed: int,
        max_pages: int,
        num_heads: int,
        device: torch.device,
    ) -> None:
        self._model: Any = model
        config: Any = model.config
        self._cache = cache
        self._backend = backend
        self._num_heads = num_heads
        decode = [n for n in (1, 2, 4, *range(8, 128, 8), *range(128, max_batch, 16)) if n < max_batch]
        self.decode_sizes = [*decode, max_batch]
        largest = min(max_mixed, _TOKENS[-1])
        self.token_sizes = [n for n in _TOKENS if n < largest] + [largest]
        self.sampled_sizes = [n for n in _SAMPLED if n < max_running] + [max_running]
        sequences = max_running + _MAX_PROMPTS + 1
        self._num_tiles = {
            n: len(self._plan_tiles(lens := [n // _MAX_PROMPTS] * _MAX_PROMPTS + [n], lens, n))
            for n in self.token_sizes
        }
        most = max(max_batch, max_running, self.token_sizes[-1])
        self._max_seen = _MAX_SEEN if has_cross_attention(model) else 0
        num_pictures = self._max_seen * max_batch
        self._inputs = _Inputs(most, sequences, max(self._num_tiles.values()), num_pictures, device)
        self._newest = torch.zeros(max_running, dtype=torch.int64, device=device)
        self._page_table = torch.zeros(sequences, max_pages, dtype=torch.int32, device=device)
        self._hidden = torch.zeros(self.token_sizes[-1], config.hidden_size, dtype=cache.k[0].dtype, device=device)
        self._logits = torch.zeros(max(max_batch, max_running), config.vocab_size, dtype=torch.float32, device=device)
        keys = [GraphKey(tokens, n) for tokens in self.token_sizes for n in self.sampled_sizes if n <= tokens]
        keys += [GraphKey(size) for size in self.decode_sizes]
        if self._max_seen:
            keys += [GraphKey(size, sees=True) for size in self.decode_sizes]
        # of all graphs, the largest first, so that the smaller ones fit into its memory
        self.planned = sorted(keys, reverse=True)
        self._graphs: dict[GraphKey, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def _plan_tiles(self, q_lens: Sequence[int], kv_lens: Sequence[int], num_rows: int) -> np.ndarray:
        return self._backend.plan_tiles(q_lens, kv_lens, num_rows, self._num_heads, self._cache)

    # -- capture -------------------------------------------------------------------------------------------------------

    def capture(self, on_progress: Callable[[float], None] = lambda fraction: None, whole: bool = False) -> None:
        """Graphs of the largest steps, whose memory the others share, and of decode steps of 1, 2, 4, 8 ... rows that see nothing.
        whole: all."""
        first = {GraphKey(n) for n in self.decode_sizes if n.bit_count() == 1 or n == self.decode_sizes[-1]}
        keys = [key for key in self.planned if whole or key.tokens == self.token_sizes[-1] or key in first]
        for i, key in enumerate(keys):
            self._prepare(key)
            on_progress((i + 1) / len(keys))

    def capture_next(self) -> bool:
        """Capture one that is missing; False when there is none."""
        key = next((key for key in self.planned if key not in self._graphs), None)
        if key is not None:
            self._prepare(key)
        return key is not None

    @torch.inference_mode()
    def _prepare(self, key: GraphKey) -> None:
        """Run a step of nothing but padding, and capture it."""
        memory, parts = self._inputs.host()
        self._pad(parts, 0, 0)
        self._inputs.upload(memory)
        self.compute(key)
        self._capture(key)

    def _capture(self, key: GraphKey) -> None:
        """Behind a run of it, which compiles kernels and fills caches, as a capture cannot do."""
        graph = torch.cuda.CUDAGraph()
        # NCCL's thread asks after its events meanwhile
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self.compute(key)
        graph.capture_end()
        self._graphs[key] = graph

    def compute(self, key: GraphKey) -> None:
        """The first `sampled` logits of a mixed step, or `tokens` of a decode step."""
        tokens, sampled, sees = key
        views = self._inputs.views
        sequences = sampled + _MAX_PROMPTS + 1 if sampled else tokens
        batch = AttentionBatch(
            cu_seqlens_q=views["cu_seqlens"][: sequences + 1],
            kv_lens=views["kv_lens"][:sequences],
            page_table=self._page_table[:sequences],
            slot_mapping=views["slots"][:tokens].long(),
            q_lens_cpu=[],
            kv_lens_cpu=[],
            num_decode=sampled or tokens,
            tiles=views["tiles"].view(-1, 2)[: self._num_tiles[tokens]] if sampled else None,
        )
        self._backend.prepare(batch)
        hidden = self._hidden[:tokens] if sampled else self._model.embed(self._ids(tokens), None, None)
        positions = views["positions"].view(3, -1)[:, :tokens].long()
        rows = views["sampled"][:sampled].long() if sampled else None
        ctx = ForwardContext(self._backend, self._cache, batch, self._seen(tokens) if sees else None)
        hidden = self._model.forward(hidden, positions if self._model.uses_mrope else positions[0], ctx, rows)
        # one place for all graphs: an output of their own would cost each its size
        self._logits[: hidden.shape[0]].copy_(self._model.logits(hidden))

    def _seen(self, tokens: int) -> CrossDecodeBatch:
        views = self._inputs.views
        addresses = views["addresses"].view(torch.int64).view(self._max_seen, -1)
        ends = views["ends"].view(self._max_seen, -1)
        return CrossDecodeBatch(addresses[:, :tokens], ends[:, :tokens], self._cache.k[0].shape[2])

    def _ids(self, tokens: int) -> Tensor:
        places = self._inputs.views["places"][:tokens]
        known = self._inputs.views["ids"][:tokens].long()
        return torch.where(places >= 0, self._newest[places.clamp(min=0)], known)

    # -- replay --------------------------------------------------------------------------------------------------------

    def key(
        self, num_rows: int, num_decode: int, num_sequences: int, num_sampled: int, num_seen: int = 0
    ) -> GraphKey | None:
        """Which graph runs such a step; None when there is none. num_seen: the most pictures beside the text that a row sees."""
        if num_rows == num_decode and num_rows <= self.decode_sizes[-1] and num_seen <= self._max_seen:
            return GraphKey(self.decode_sizes[bisect_left(self.decode_sizes, num_rows)], sees=num_seen > 0)
        if num_seen:
            return None
        sampled = max(num_decode, num_sampled)
        if num_sequences - num_decode > _MAX_PROMPTS or sampled > self.sampled_sizes[-1]:
            return None
        if num_rows > self.token_sizes[-1]:
            return None
        size = self.sampled_sizes[bisect_left(self.sampled_sizes, sampled)]
        needed = max(num_rows, min(size, self.token_sizes[-1]))
        tokens = self.token_sizes[bisect_left(self.token_sizes, needed)]
        key = GraphKey(tokens, size)
        return key if key in self.planned else None

    def run(
        self,
        key: GraphKey,
        step: HostStep,
        newest: Tensor | None,
        image_rows: Tensor | None = None,
        features: Tensor | None = None,
        seen: Sequence[tuple[np.ndarray, tuple[Tensor, ...]]] = (),
    ) -> Tensor:
        """Logits float32 [S, V], valid until the next call. newest: tokens of the step before, on the device; image_rows,
        features: as for the model's `embed`; seen: rows, and the pictures beside the text that they see."""
        tokens, sampled, _ = key
        first_prompt = sampled or tokens
        memory, parts = self._inputs.host()
        self._fill(parts, step)
        if sampled:
            self._fill_prompts(parts, step, first_prompt, tokens)
        if seen:
            self._fill_seen(parts, seen)
        self._inputs.upload(memory)
        self._upload_pages(step, first_prompt)
        if newest is not None:
            self._newest[: newest.shape[0]].copy_(newest)
        if sampled:
            self._hidden[:tokens].copy_(self._model.embed(self._ids(tokens), image_rows, features))
        if key in self._graphs:
            self._graphs[key].replay()
        else:
            self.compute(key)
            self._capture(key)
        return self._logits[: len(step.sampled)]

    @staticmethod
    def _pad(parts: dict[str, np.ndarray], num_rows: int, num_sequences: int) -> None:
        parts["addresses"][:] = 0
        parts["ends"][:] = 0
        parts["ids"][num_rows:] = 0
        parts["places"][:] = -1
        parts["positions"][:] = 0
        parts["slots"][num_rows:] = -1
        parts["sampled"][:] = 0
        parts["kv_lens"][num_sequences:] = 0
        parts["cu_seqlens"][:] = 0
        # the last sequence, which nobody has
        parts["tiles"][0::2] = len(parts["kv_lens"]) - 1
        parts["tiles"][1::2] = 0

    def _fill(self, parts: dict[str, np.ndarray], step: HostStep) -> None:
        num_rows, num_decode = len(step.ids), step.num_decode
        self._pad(parts, num_rows, num_decode)
        parts["ids"][:num_rows] = step.ids
        parts["places"][:num_decode] = step.places
        parts["positions"].reshape(3, -1)[:, :num_rows] = step.positions
        parts["slots"][:num_rows] = step.slots
        parts["kv_lens"][:num_decode] = step.kv_lens[:num_decode]
        parts["sampled"][: len(step.sampled)] = step.sampled

    def _fill_prompts(self, parts: dict[str, np.ndarray], step: HostStep, first_prompt: int, tokens: int) -> None:
        """Prompts stand behind the places of `first_prompt` decode rows, in a graph of `tokens` rows."""
        num_decode = step.num_decode
        q_lens, kv_lens = step.q_lens[num_decode:], step.kv_lens[num_decode:]
        end = first_prompt + len(q_lens)
        parts["kv_lens"][first_prompt:end] = kv_lens
        offsets = num_decode + np.cumsum([0, *q_lens])
        parts["cu_seqlens"][first_prompt : end + 1] = offsets
        parts["cu_seqlens"][end + 1 :] = offsets[-1]
        tiles = self._plan_tiles(q_lens, kv_lens, tokens)
        tiles[:, 0] += first_prompt
        parts["tiles"][: tiles.size] = tiles.reshape(-1)
        # padding: the sequence behind the prompts, of this graph's own size
        parts["tiles"][tiles.size :: 2] = first_prompt + _MAX_PROMPTS

    def _fill_seen(self, parts: dict[str, np.ndarray], seen: Sequence[tuple[np.ndarray, tuple[Tensor, ...]]]) -> None:
        """A picture may be dropped while the step is in flight: what takes its memory runs behind it, on the same stream."""
        addresses = parts["addresses"].view(np.int64).reshape(self._max_seen, -1)
        ends = parts["ends"].reshape(self._max_seen, -1)
        for rows, pictures in seen:
            for i, picture in enumerate(pictures):
                assert picture.is_contiguous()
                addresses[i, rows] = picture.data_ptr()
                ends[i:, rows] += picture.shape[2]

    def _upload_pages(self, step: HostStep, first_prompt: int) -> None:
        num_decode, table = step.num_decode, step.page_table
        if len(table) > num_decode:
            between = np.zeros((first_prompt - num_decode, table.shape[1]), dtype=np.int32)
            table = np.concatenate([table[:num_decode], between, table[num_decode:]])
        pages = torch.from_numpy(table)
        if self._page_table.is_cuda:
            pages = pages.pin_memory()
        self._page_table[: table.shape[0], : table.shape[1]].copy_(pages, non_blocking=True)
