"""From scheduled rows to tensors, through the model, to sampled tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sightline.attention.backend import AttentionBackend, AttentionBatch, ForwardContext, KVCache
from sightline.attention.cross import CrossAttentionBatch, PictureGroup
from sightline.cache.vision_cache import VisionCache
from sightline.engine.core import Sampled
from sightline.engine.cuda_graph import HostStep, StepGraphs
from sightline.engine.encoder import Encoder, has_cross_attention
from sightline.engine.pictures import views
from sightline.engine.request import Request
from sightline.engine.sampler import Draw, Sampler, SamplingState
from sightline.engine.scheduler import ScheduledRow
from sightline.types import ImageRef, Pixels, SamplingParams

# Multiply-adds of one MLP matrix below which a CPU step runs on one thread.
_SERIAL_BELOW = 1 << 21


@dataclass(eq=False)
class Step:
    """A launched step. sampling: whose next token it chooses, in the order of its logits."""

    sampling: list[Request]
    logits: Tensor | None = None
    draw: Draw | None = None
    serial: bool = False


class ModelRunner:
    """Owns the device side: model, K/V pages, attention backend, encoder, sampler. Launches without waiting.

    graphs: of the steps that have one.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        cache: KVCache,
        backend: AttentionBackend,
        vision_cache: VisionCache,
        encoder: Encoder,
        sampler: Sampler,
        device: torch.device,
        eos_token_ids: Sequence[int],
        graphs: StepGraphs | None = None,
    ) -> None:
        self.model: Any = model
        self.cache = cache
        self.backend = backend
        self.vision_cache = vision_cache
        self.encoder = encoder
        self.sampler = sampler
        self.device = device
        self.eos_token_ids = tuple(eos_token_ids)
        self.graphs = graphs
        self.cross_attention = has_cross_attention(model)
        config: Any = model.config
        self.serial_rows = _SERIAL_BELOW // (config.hidden_size * config.intermediate_size)
        # the last step that sampled: its tokens on the device, and whose they are
        self._newest: Tensor | None = None
        self._places: dict[Request, int] = {}

    def new_state(self, sampling: SamplingParams, prompt_ids: np.ndarray, index: int) -> SamplingState:
        return self.sampler.new_state(sampling, prompt_ids, self.eos_token_ids, index)

    def new_pixels(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """See `Encoder.new_pixels`."""
        return self.encoder.new_pixels(shape, dtype)

    def encode(self, images: Sequence[ImageRef], pixels: Sequence[Pixels]) -> list[Tensor]:
        """See `Encoder.encode`."""
        return self.encoder.encode(images, pixels)

    def num_features(self, image: ImageRef) -> int:
        """Features that a picture has in the vision cache."""
        return self.model.num_features(image.grid) if self.cross_attention else image.num_tokens

    def features_ready(self, digest: bytes) -> bool:
        """For the scheduler: whether a step could use the picture without waiting for the encoder."""
        return self.vision_cache.is_filled(digest) and self.encoder.is_done(digest)

    def forward(self, rows: Sequence[ScheduledRow], num_decode: int) -> Step:
        """Launch the decoder over all rows packed; logits for the rows that reach their newest token."""
        ends = list(accumulate(r.q_len for r in rows))
        step = Step([r.request for r in rows if r.sample])
        step.serial = self.device.type == "cpu" and ends[-1] <= self.serial_rows
        with _threads(step.serial), torch.inference_mode():
            host = self._host_step(rows, num_decode, ends)
            key = self._graph(rows, host)
            if self.graphs is not None and key is not None:
                logits = self.graphs.run(key, host, self._newest, *self._image_rows(rows, num_decode))
                step.logits = logits if step.sampling else None
            else:
                step.logits = self._launch(rows, host)
        return step

    def sample(self, step: Step) -> None:
        """Launch the choice of the next tokens."""
        if step.logits is None:
            return
        with _threads(step.serial), torch.inference_mode():
            step.draw = self.sampler.launch(step.logits, [r.sampling_state for r in step.sampling])
        step.logits = None
        self._newest = step.draw.tokens
        self._places = {request: i for i, request in enumerate(step.sampling)}

    def collect(self, step: Step) -> list[Sampled]:
        """Wait for the tokens."""
        if step.draw is None:
            return []
        out = step.draw.result()
        return [Sampled(t, lp) for t, lp in zip(out.token_ids, out.logprobs, strict=True)]

    def _graph(self, rows: Sequence[ScheduledRow], host: HostStep) -> tuple[int, int] | None:
        if self.graphs is None or (self.cross_attention and any(row.request.images for row in rows)):
            return None
        return self.graphs.key(len(host.ids), host.num_decode, len(rows), len(host.sampled))

    def _launch(self, rows: Sequence[ScheduledRow], host: HostStep) -> Tensor | None:
        """Kernel by kernel."""
        image_rows, features = self._image_rows(rows, host.num_decode)
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
        cross = self._cross_attention_batch(rows) if self.cross_attention else None
        ctx = ForwardContext(self.backend, self.cache, batch, cross)
        wanted = None
        if len(host.sampled) < len(host.ids):
            wanted = self._to_device(np.asarray(host.sampled), torch.int64)
        positions = self._to_device(host.positions, torch.int64)
        hidden = self.model.embed(self._ids(host), image_rows, features)
        hidden = self.model.forward(hidden, positions if self.model.uses_mrope else positions[0], ctx, wanted)
        if not host.sampled:
            return None
        logits: Tensor = self.model.logits(hidden)
        return logits

    def _ids(self, host: HostStep) -> Tensor:
        ids = self._to_device(host.ids, torch.int64)
        if any(place >= 0 for place in host.places):
            assert self._newest is not None
            where = self._to_device(np.asarray(host.places), torch.int64)
            known = ids[: host.num_decode]
            known.copy_(torch.where(where >= 0, self._newest[where.clamp(min=0)], known))
        return ids

    # -- a step's numbers ----------------------------------------------------------------------------------------------

    def _host_step(self, rows: Sequence[ScheduledRow], num_decode: int, ends: Sequence[int]) -> HostStep:
        """ends: where each row's tokens end among the packed ones. A decode row is its request's newest token, behind every
        known position; in flight, its id is among `_newest`."""
        size = self.cache.page_size
        decode = rows[:num_decode]
        requests = [row.request for row in decode]
        newest = [0 if r.num_in_flight else r.output_ids[-1] for r in requests]
        at = np.asarray([row.start + row.request.position_delta for row in decode], dtype=np.int64)
        slots = [row.request.pages[row.start // size] * size + row.start % size for row in decode]
        page_table = self._page_table(rows)
        all_ids, all_slots = [np.asarray(newest, dtype=np.int64)], [np.asarray(slots, dtype=np.int64)]
        positions = [np.broadcast_to(at, (3, num_decode))]
        for line, row in zip(page_table[num_decode:], rows[num_decode:], strict=True):
            p = np.arange(row.start, row.start + row.q_len)
            all_ids.append(row.request.ids(row.start, row.start + row.q_len))
            all_slots.append(line[p // size].astype(np.int64) * size + p % size)
            positions.append(_positions(row))
        return HostStep(
            ids=np.concatenate(all_ids),
            places=[self._places[r] if r.num_in_flight else -1 for r in requests],
            positions=np.concatenate(positions, axis=1),
            slots=np.concatenate(all_slots),
            q_lens=[row.q_len for row in rows],
            kv_lens=[row.start + row.q_len for row in rows],
            page_table=page_table,
            sampled=[end - 1 for end, row in zip(ends, rows, strict=True) if row.sample],
        )

    def _image_rows(self, rows: Sequence[ScheduledRow], num_decode: int) -> tuple[Tensor | None, Tensor | None]:
        """Packed rows that are placeholders, and their features, for the pictures that the chunks touch."""
        if self.cross_attention:
            return None, None
        where: list[np.ndarray] = []
        features: list[Tensor] = []
        digests: set[bytes] = set()
        base = num_decode
        for row in rows[num_decode:]:
            if row.request.images:
                end = row.start + row.q_len
                for image in row.request.images_in(row.start, end):
                    first, last = max(image.offset, row.start), min(image.offset + image.num_tokens, end)
                    where.append(np.arange(first, last) - row.start + base)
                    value = self.vision_cache.get(image.digest)
                    digests.add(image.digest)
                    features.append(value[first - image.offset : last - image.offset])
            base += row.q_len
        if not where:
            return None, None
        self.encoder.wait_for(digests)
        return self._to_device(np.concatenate(where), torch.int64), torch.cat(features)

    def _cross_attention_batch(self, rows: Sequence[ScheduledRow]) -> CrossAttentionBatch | None:
        """Which packed rows see which pictures; rows of several requests that see the same ones share a group."""
        seeing: dict[tuple[bytes, ...], list[np.ndarray]] = {}
        base = 0
        for row in rows:
            for view in views(row.request.images, row.start, row.start + row.q_len):
                where = np.arange(view.start, view.end) - row.start + base
                seeing.setdefault(tuple(image.digest for image in view.images), []).append(where)
            base += row.q_len
        if not seeing:
            return None
        self.encoder.wait_for({digest for digests in seeing for digest in digests})
        index = np.concatenate([part for parts in seeing.values() for part in parts])
        groups = [
            PictureGroup(sum(map(len, parts)), tuple(self.vision_cache.get(digest) for digest in digests))
            for digests, parts in seeing.items()
        ]
        in_order = len(index) == base and bool((index == np.arange(base)).all())
        return CrossAttentionBatch(None if in_order else self._to_device(index, torch.int64), groups)

    def _page_table(self, rows: Sequence[ScheduledRow]) -> np.ndarray:
        """int32 [B, P], 0 where unused."""
        used = [-(-(r.start + r.q_len) // self.cache.page_size) for r in rows]
        table = np.zeros((len(rows), max(used)), dtype=np.int32)
        for line, row, n in zip(table, rows, used, strict=True):
            line[:n] = row.request.pages[:n]
        return table

    def _to_device(self, array: np.ndarray, dtype: torch.dtype) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(dtype)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor


@contextmanager
def _threads(serial: bool) -> Iterator[None]:
    """One thread, if asked, for steps so small that waking a second one for each operation takes longer than they do."""
    if not serial:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _positions(row: ScheduledRow) -> np.ndarray:
    """Rotary positions of a row's tokens, int [3, q_len]: the prompt's own, then index + delta on every axis."""
    request = row.request
    end = row.start + row.q_len
    known = request.positions.shape[1] if request.positions is not None else 0
    parts = []
    if row.start < known:
        assert request.positions is not None
        parts.append(request.positions[:, row.start : min(end, known)].astype(np.int64))
    if end > known:
        tail = np.arange(max(row.start, known), end, dtype=np.int64) + request.position_delta
        parts.append(np.broadcast_to(tail, (3, len(tail))))
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
