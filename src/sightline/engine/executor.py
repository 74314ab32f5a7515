"""What every rank of an engine does alike: steps that are planned, through its share of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sightline.attention.backend import AttentionBackend, AttentionBatch, ForwardContext, KVCache
from sightline.attention.cross import CrossAttentionBatch, PictureGroup
from sightline.engine.cuda_graph import GraphKey, HostStep, StepGraphs
from sightline.engine.encoder import Encoder, has_cross_attention
from sightline.engine.memory import PAGE_SIZE
from sightline.engine.prompt_logprobs import ScoredRows, score
from sightline.engine.sampler import Logprobs
from sightline.engine.threads import ComputeThreads
from sightline.parallel import Group

# Multiply-adds of one MLP matrix below which a CPU step runs on one thread.
_SERIAL_BELOW = 1 << 21


class PictureRows(NamedTuple):
    """Packed rows from `row` on take the features start .. end of a picture."""

    row: int
    digest: bytes
    start: int
    end: int


class SeenPictures(NamedTuple):
    """The packed rows (int [R]) that see these pictures, beside the text."""

    digests: tuple[bytes, ...]
    rows: np.ndarray


class StepPlan(NamedTuple):
    """A step without its requests: all that a rank needs to compute it.

    num_newest: tokens that the step before sampled, which decode rows read on the device; 0 when none does. pictures: those in
    the text; seen: those beside it. scored: rows behind which a prompt's own tokens are asked for.
    """

    host: HostStep
    num_newest: int
    pictures: list[PictureRows]
    seen: list[SeenPictures]
    scored: list[ScoredRows]


class StepOutput(NamedTuple):
    """What a step launched. logits: [S, vocab] of the sampled rows, valid until the next step, or None without any. scores: those
    of the plan's `scored`, in parts."""

    logits: Tensor | None
    scores: list[list[Logprobs]]


class GraphSizes(NamedTuple):
    """See `StepGraphs`."""

    max_batch: int
    max_running: int
    max_mixed: int
    max_pages: int


class Executor:
    """This rank's share of the model, its K/V pages, attention backend, encoder and graphs. Launches without waiting.

    features: the encoded picture of a digest; KeyError when there is none. graphs: of the steps that have one.
    threads: those of a CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        group: Group,
        *,
        cache: KVCache,
        backend: AttentionBackend,
        encoder: Encoder,
        device: torch.device,
        features: Callable[[bytes], Tensor],
        threads: ComputeThreads | None,
    ) -> None:
        self.model: Any = model
        self.group = group
        self.cache = cache
        self.backend = backend
        self.encoder = encoder
        self.device = device
        self.features = features
        self._threads = threads
        self.graphs: StepGraphs | None = None
        self.cross_attention = has_cross_attention(model)
        config: Any = model.config
        self._serial_rows = _SERIAL_BELOW // (config.hidden_size * config.intermediate_size)

    def allocate(self, num_pages: int) -> None:
        """The K/V cache that steps use from here on. num_pages: the null page is one of them."""
        spec = self.model.kv_spec
        self.cache = KVCache.allocate(
            num_layers=spec.num_layers,
            num_pages=num_pages,
            page_size=PAGE_SIZE,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=self.cache.k[0].dtype,
            device=self.device,
        )

    def capture(self, sizes: GraphSizes, on_progress: Callable[[float], None] = lambda fraction: None) -> None:
        """Make graphs. Several ranks make all at once, because none may wait for another later."""
        graphs = self.new_graphs(sizes)
        graphs.capture(on_progress, whole=self.group.size > 1)
        self.graphs = graphs

    def new_graphs(self, sizes: GraphSizes) -> StepGraphs:
        """None is captured yet."""
        return StepGraphs(
            self.model,
            self.cache,
            self.backend,
            num_heads=self.model.config.num_attention_heads // self.group.size,
            device=self.device,
            **sizes._asdict(),
        )

    def threads(self, num_rows: int) -> AbstractContextManager[None]:
        """On a CPU, one thread for steps so small that waking a second one for each operation takes longer than they do."""
        if self._threads is None:
            return nullcontext()
        return self._threads.one() if num_rows <= self._serial_rows else self._threads.all()

    @torch.inference_mode()
    def run(self, plan: StepPlan, newest: Tensor | None) -> StepOutput:
        """Launch the decoder over all rows. newest: the tokens that the step before sampled, which only rank 0 knows."""
        host = plan.host
        with self.threads(len(host.ids)):
            if plan.num_newest and self.group.size > 1:
                if newest is None:
                    newest = torch.empty(plan.num_newest, dtype=torch.int64, device=self.device)
                newest = self.group.broadcast(newest)
            image_rows, features = self._image_rows(plan.pictures)
            key = self._graph(plan)
            if self.graphs is not None and key is not None:
                seen = [(group.rows, self._seen_features(group)) for group in plan.seen]
                logits = self.graphs.run(key, host, newest, image_rows, features, seen)
                return StepOutput(logits if host.sampled else None, [])
            return self._launch(plan, newest, image_rows, features)

    def _graph(self, plan: StepPlan) -> GraphKey | None:
        """The graph of such a step, unless a row is scored."""
        if self.graphs is None or plan.scored:
            return None
        host = plan.host
        num_seen = max((len(group.digests) for group in plan.seen), default=0)
        return self.graphs.key(len(host.ids), host.num_decode, len(host.q_lens), len(host.sampled), num_seen)

    def _launch(
        self, plan: StepPlan, newest: Tensor | None, image_rows: Tensor | None, features: Tensor | None
    ) -> StepOutput:
        """Kernel by kernel."""
        host = plan.host
        batch = AttentionBatch(
            cu_seqlens_q=self._to_device(np.cumsum([0, *host.q_lens]), torch.int32),
            kv_lens=self._to_device(np.asarray(host.kv_lens), torch.int32),
            page_table=self._to_device(host.page_table, torch.int32),
            slot_mapping=self._to_device(host.slots, torch.int64),
            q_lens_cpu=host.q_lens,
            kv_lens_cpu=host.kv_lens,
            num_decode=host.num_decode,
        )
        self.backend.prepare(batch)
        ctx = ForwardContext(self.backend, self.cache, batch, self._cross_attention_batch(plan.seen, len(host.ids)))
        wanted = None
        num_sampled = len(host.sampled)
        if plan.scored or num_sampled < len(host.ids):
            sampled = np.asarray(host.sampled, dtype=np.int64)
            wanted = self._to_device(np.concatenate([sampled, *(each.rows for each in plan.scored)]), torch.int64)
        positions = self._to_device(host.positions, torch.int64)
        hidden = self.model.embed(self._ids(host, newest), image_rows, features)
        hidden = self.model.forward(hidden, positions if self.model.uses_mrope else positions[0], ctx, wanted)
        logits = self.model.logits(hidden[:num_sampled]) if num_sampled else None
        return StepOutput(logits, score(self.model, hidden[num_sampled:], plan.scored))

    def _ids(self, host: HostStep, newest: Tensor | None) -> Tensor:
        ids = self._to_device(host.ids, torch.int64)
        if any(place >= 0 for place in host.places):
            assert newest is not None
            where = self._to_device(np.asarray(host.places), torch.int64)
            known = ids[: host.num_decode]
            known.copy_(torch.where(where >= 0, newest[where.clamp(min=0)], known))
        return ids

    def _image_rows(self, pictures: Sequence[PictureRows]) -> tuple[Tensor | None, Tensor | None]:
        """Packed rows that are placeholders, and their features."""
        if not pictures:
            return None, None
        where = np.concatenate([np.arange(part.end - part.start) + part.row for part in pictures])
        features = torch.cat([self.features(part.digest)[part.start : part.end] for part in pictures])
        return self._to_device(where, torch.int64), features

    def _cross_attention_batch(self, seen: Sequence[SeenPictures], num_rows: int) -> CrossAttentionBatch | None:
        """Rows that see the same pictures share a group."""
        if not seen:
            return None
        index = np.concatenate([group.rows for group in seen])
        groups = [PictureGroup(len(group.rows), self._seen_features(group)) for group in seen]
        in_order = len(index) == num_rows and bool((index == np.arange(num_rows)).all())
        return CrossAttentionBatch(None if in_order else self._to_device(index, torch.int64), groups)

    def _seen_features(self, group: SeenPictures) -> tuple[Tensor, ...]:
        return tuple(map(self.features, group.digests))

    def _to_device(self, array: np.ndarray, dtype: torch.dtype) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(dtype)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor
