"""From scheduled rows to tensors, through the model, to sampled tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sightline.attention.backend import AttentionBackend, AttentionBatch, ForwardContext, KVCache
from sightline.attention.cross import CrossAttentionBatch, PictureGroup
from sightline.cache.vision_cache import VisionCache
from sightline.engine.core import Sampled
from sightline.engine.pictures import views
from sightline.engine.sampler import Sampler, SamplingState
from sightline.engine.scheduler import ScheduledRow
from sightline.types import ImageRef, SamplingParams

# Multiply-adds of one MLP matrix below which a CPU step runs on one thread.
_SERIAL_BELOW = 1 << 21


class ModelRunner:
    """Owns the device side: model, K/V pages, attention backend, sampler. One step at a time."""

    def __init__(
        self,
        model: nn.Module,
        *,
        cache: KVCache,
        backend: AttentionBackend,
        vision_cache: VisionCache,
        sampler: Sampler,
        device: torch.device,
        eos_token_ids: Sequence[int],
    ) -> None:
        self.model: Any = model
        self.cache = cache
        self.backend = backend
        self.vision_cache = vision_cache
        self.sampler = sampler
        self.device = device
        self.eos_token_ids = tuple(eos_token_ids)
        self.cross_attention = has_cross_attention(model)
        config: Any = model.config
        self.serial_rows = _SERIAL_BELOW // (config.hidden_size * config.intermediate_size)

    def new_state(self, sampling: SamplingParams, prompt_ids: np.ndarray, index: int) -> SamplingState:
        return self.sampler.new_state(sampling, prompt_ids, self.eos_token_ids, index)

    @torch.inference_mode()
    def encode(self, images: Sequence[ImageRef], pixels: Sequence[np.ndarray]) -> list[Tensor]:
        """pixels: uint8, as the family's processor makes them. Returns the features of each picture: [num_tokens, hidden], or
        what cross-attention reads."""
        on_device = [torch.from_numpy(p).to(self.device, non_blocking=True) for p in pixels]
        features = self.model.encode_images(on_device, [image.grid for image in images])
        for image, rows in zip(images, features, strict=True):
            if not self.cross_attention and rows.shape[0] != image.num_tokens:
                raise ValueError(f"the encoder made {rows.shape[0]} rows for {image.num_tokens} placeholders")
        return [rows.contiguous() for rows in features]

    @torch.inference_mode()
    def execute(self, rows: Sequence[ScheduledRow], num_decode: int) -> list[Sampled]:
        """One forward over all rows packed; sampling for the rows that reached their newest token."""
        ends = list(accumulate(r.q_len for r in rows))
        if self.device.type == "cpu" and ends[-1] <= self.serial_rows:
            with _one_thread():
                return self._execute(rows, num_decode, ends)
        return self._execute(rows, num_decode, ends)

    def _execute(self, rows: Sequence[ScheduledRow], num_decode: int, ends: Sequence[int]) -> list[Sampled]:
        """ends: where each row's tokens end among the packed ones."""
        input_ids, positions = self._tokens(rows, num_decode)
        image_rows, features = (None, None) if self.cross_attention else self._image_rows(rows, num_decode)
        batch = self._attention_batch(rows, num_decode, ends)
        self.backend.prepare(batch)
        cross = self._cross_attention_batch(rows) if self.cross_attention else None
        ctx = ForwardContext(self.backend, self.cache, batch, cross)
        newest = [end - 1 for end, row in zip(ends, rows, strict=True) if row.sample]
        wanted = self._to_device(np.asarray(newest), torch.int64) if len(newest) < ends[-1] else None
        hidden = self.model.embed(input_ids, image_rows, features)
        hidden = self.model.forward(hidden, positions if self.model.uses_mrope else positions[0], ctx, wanted)
        if not newest:
            return []
        logits = self.model.logits(hidden)
        out = self.sampler.sample(logits, [row.request.sampling_state for row in rows if row.sample])
        return [Sampled(t, lp) for t, lp in zip(out.token_ids, out.logprobs, strict=True)]

    def _tokens(self, rows: Sequence[ScheduledRow], num_decode: int) -> tuple[Tensor, Tensor]:
        """Ids [T] and rotary positions [3, T]. A decode row is its request's newest token, behind every known position."""
        decode = rows[:num_decode]
        newest = np.fromiter((r.request.output_ids[-1] for r in decode), np.int64, num_decode)
        places = np.fromiter((r.start + r.request.position_delta for r in decode), np.int64, num_decode)
        ids, positions = [newest], [np.broadcast_to(places, (3, num_decode))]
        for row in rows[num_decode:]:
            ids.append(row.request.ids(row.start, row.start + row.q_len))
            positions.append(_positions(row))
        return (
            self._to_device(np.concatenate(ids), torch.int64),
            self._to_device(np.concatenate(positions, axis=1), torch.int64),
        )

    def _image_rows(self, rows: Sequence[ScheduledRow], num_decode: int) -> tuple[Tensor | None, Tensor | None]:
        """Packed rows that are placeholders, and their features, for the pictures that the chunks touch."""
        where: list[np.ndarray] = []
        features: list[Tensor] = []
        base = num_decode
        for row in rows[num_decode:]:
            if row.request.images:
                end = row.start + row.q_len
                for image in row.request.images_in(row.start, end):
                    first, last = max(image.offset, row.start), min(image.offset + image.num_tokens, end)
                    where.append(np.arange(first, last) - row.start + base)
                    value = self.vision_cache.get(image.digest)
                    features.append(value[first - image.offset : last - image.offset])
            base += row.q_len
        if not where:
            return None, None
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
        index = np.concatenate([part for parts in seeing.values() for part in parts])
        groups = [
            PictureGroup(sum(map(len, parts)), tuple(self.vision_cache.get(digest) for digest in digests))
            for digests, parts in seeing.items()
        ]
        in_order = len(index) == base and bool((index == np.arange(base)).all())
        return CrossAttentionBatch(None if in_order else self._to_device(index, torch.int64), groups)

    def _attention_batch(self, rows: Sequence[ScheduledRow], num_decode: int, ends: Sequence[int]) -> AttentionBatch:
        size = self.cache.page_size
        kv_lens = [r.start + r.q_len for r in rows]
        page_table = np.zeros((len(rows), -(-max(kv_lens) // size)), dtype=np.int32)
        for line, row, kv_len in zip(page_table, rows, kv_lens, strict=True):
            used = -(-kv_len // size)
            line[:used] = row.request.pages[:used]
        decode = rows[:num_decode]
        slots = [np.fromiter((r.request.pages[r.start // size] * size + r.start % size for r in decode), np.int64)]
        for line, row in zip(page_table[num_decode:], rows[num_decode:], strict=True):
            p = np.arange(row.start, row.start + row.q_len)
            slots.append(line[p // size].astype(np.int64) * size + p % size)
        return AttentionBatch(
            cu_seqlens_q=self._to_device(np.asarray([0, *ends]), torch.int32),
            kv_lens=self._to_device(np.asarray(kv_lens), torch.int32),
            page_table=self._to_device(page_table, torch.int32),
            slot_mapping=self._to_device(np.concatenate(slots), torch.int64),
            q_lens_cpu=[r.q_len for r in rows],
            kv_lens_cpu=kv_lens,
            num_decode=num_decode,
        )

    def _to_device(self, array: np.ndarray, dtype: torch.dtype) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(dtype)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor


@contextmanager
def _one_thread() -> Iterator[None]:
    """For steps so small that waking a second thread for each operation takes longer than the operations."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def has_cross_attention(model: nn.Module) -> bool:
    """Whether pictures stand beside the text, see `sightline.models`."""
    return bool(getattr(model, "cross_attention", False))


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
