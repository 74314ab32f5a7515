"""From scheduled rows to a plan, through the executors of all ranks, to sampled tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sightline.cache.vision_cache import VisionCache
from sightline.engine.core import Sampled
from sightline.engine.cuda_graph import HostStep
from sightline.engine.encode_queue import SLICE_SECONDS
from sightline.engine.executor import Executor, GraphSizes, PictureRows, SeenPictures, StepPlan
from sightline.engine.pictures import views
from sightline.engine.prompt_logprobs import ScoredRows, Scores, scorings
from sightline.engine.request import Request
from sightline.engine.sampler import Draw, Sampler, SamplingState
from sightline.engine.scheduler import ScheduledRow
from sightline.engine.workers import Workers
from sightline.models import Encoding
from sightline.types import ImageRef, Pixels, SamplingParams


@dataclass(eq=False)
class Step:
    """A launched step. sampling: whose next token it chooses, in the order of its logits."""

    sampling: list[Request]
    num_rows: int
    logits: Tensor | None = None
    draw: Draw | None = None
    scores: Scores | None = None


class ModelRunner:
    """What the core sees of the model: rank 0's executor, the sampler and, if there are more ranks, the others. Launches without
    waiting."""

    def __init__(
        self,
        executor: Executor,
        *,
        vision_cache: VisionCache,
        sampler: Sampler,
        eos_token_ids: Sequence[int],
        workers: Workers | None = None,
    ) -> None:
        self.executor = executor
        self.sampler = sampler
        self.eos_token_ids = tuple(eos_token_ids)
        self.workers = workers
        self.use(vision_cache)
        # the last step that sampled: its tokens on the device, and whose they are
        self._newest: Tensor | None = None
        self._places: dict[Request, int] = {}

    def use(self, vision_cache: VisionCache) -> None:
        """Take pictures from this cache."""
        self.vision_cache = vision_cache
        self.executor.features = vision_cache.get

    def new_state(self, sampling: SamplingParams, prompt_ids: np.ndarray, index: int) -> SamplingState:
        return self.sampler.new_state(sampling, prompt_ids, self.eos_token_ids, index)

    def new_pixels(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """See `Encoder.new_pixels`."""
        return self.executor.encoder.new_pixels(shape, dtype)

    def encoding(self, images: Sequence[ImageRef], pixels: Sequence[Pixels]) -> Encoding[list[Tensor]]:
        """Each `next` launches a part; the result is what the vision cache keeps of each picture."""
        encoder = self.executor.encoder
        if self.workers is not None:
            return (yield from self.workers.encoding(encoder, images, pixels))
        return encoder.kept((yield from encoder.encoding(images, pixels)))

    def slice_flops(self) -> float | None:
        """Of the encoder between two steps of decoding."""
        rate = self.executor.encoder.flops_per_second
        return None if rate is None else rate * SLICE_SECONDS

    def allocate(self, num_pages: int) -> None:
        """See `Executor.allocate`."""
        if self.workers is not None:
            self.workers.allocate(num_pages)
        self.executor.allocate(num_pages)

    def capture(self, sizes: GraphSizes, on_progress: Callable[[float], None]) -> None:
        """See `Executor.capture`."""
        if self.workers is not None:
            self.workers.capture(sizes)
        self.executor.capture(sizes, on_progress)

    def use_idle_time(self) -> bool:
        """Do a part of what was left for it; False when nothing is left."""
        graphs = self.executor.graphs
        return graphs is not None and graphs.capture_next()

    def num_features(self, image: ImageRef) -> int:
        """See `Encoder.num_features`."""
        return self.executor.encoder.num_features(image)

    def forward(self, rows: Sequence[ScheduledRow], num_decode: int) -> Step:
        """Launch the decoder over all rows packed; logits for the rows that reach their newest token."""
        asked = scorings(rows, num_decode)
        plan = self._plan(rows, num_decode, [each.rows for each in asked])
        with nullcontext() if self.workers is None else self.workers.step(plan):
            logits, scores = self.executor.run(plan, self._newest)
        step = Step([r.request for r in rows if r.sample], len(plan.host.ids), logits)
        step.scores = Scores(asked, scores, self.executor.device) if asked else None
        return step

    def sample(self, step: Step) -> None:
        """Launch the choice of the next tokens."""
        if step.logits is None:
            return
        with self.executor.threads(step.num_rows), torch.inference_mode():
            step.draw = self.sampler.launch(step.logits, [r.sampling_state for r in step.sampling])
        step.logits = None
        self._newest = step.draw.tokens
        self._places = {request: i for i, request in enumerate(step.sampling)}

    def collect(self, step: Step) -> list[Sampled]:
        """Wait for the tokens."""
        if step.scores is not None:
            step.scores.deliver()
        if step.draw is None:
            return []
        out = step.draw.result()
        return [Sampled(t, lp) for t, lp in zip(out.token_ids, out.logprobs, strict=True)]

    def close(self) -> None:
        """End the other ranks, if there are some."""
        if self.workers is not None:
            self.workers.close()

    # -- a step's numbers ----------------------------------------------------------------------------------------------

    def _plan(self, rows: Sequence[ScheduledRow], num_decode: int, scored: list[ScoredRows]) -> StepPlan:
        host = self._host_step(rows, num_decode)
        num_newest = 0
        if any(place >= 0 for place in host.places):
            assert self._newest is not None
            num_newest = len(self._newest)
        if self.executor.cross_attention:
            return StepPlan(host, num_newest, [], _seen(rows), scored)
        return StepPlan(host, num_newest, _pictures(rows, num_decode), [], scored)

    def _host_step(self, rows: Sequence[ScheduledRow], num_decode: int) -> HostStep:
        """A decode row is its request's newest token, behind every known position; in flight, its id is among `_newest`."""
        size = self.executor.cache.page_size
        ends = list(accumulate(row.q_len for row in rows))
        decode = rows[:num_decode]
        requests = [row.request for row in decode]
        newest = [0 if r.num_in_flight else r.output_ids[-1] for r in requests]
        at = np.asarray([row.start + row.request.position_delta for row in decode], dtype=np.int64)
        slots = [row.request.pages[row.start // size] * size + row.start % size for row in decode]
        page_table = _page_table(rows, size)
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


def _pictures(rows: Sequence[ScheduledRow], num_decode: int) -> list[PictureRows]:
    """The parts of pictures in the text that the chunks touch."""
    parts = []
    base = num_decode
    for row in rows[num_decode:]:
        end = row.start + row.q_len
        for image in row.request.images_in(row.start, end):
            first, last = max(image.offset, row.start), min(image.offset + image.num_tokens, end)
            parts.append(PictureRows(base + first - row.start, image.digest, first - image.offset, last - image.offset))
        base += row.q_len
    return parts


def _seen(rows: Sequence[ScheduledRow]) -> list[SeenPictures]:
    """Which packed rows see which pictures; rows of several requests that see the same ones share a group."""
    seeing: dict[tuple[bytes, ...], list[np.ndarray]] = {}
    base = 0
    for row in rows:
        for view in views(row.request.images, row.start, row.start + row.q_len):
            where = np.arange(view.start, view.end) - row.start + base
            seeing.setdefault(tuple(image.digest for image in view.images), []).append(where)
        base += row.q_len
    return [SeenPictures(digests, np.concatenate(parts)) for digests, parts in seeing.items()]


def _page_table(rows: Sequence[ScheduledRow], page_size: int) -> np.ndarray:
    """int32 [B, P], 0 where unused."""
    used = [-(-(r.start + r.q_len) // page_size) for r in rows]
    table = np.zeros((len(rows), max(used)), dtype=np.int32)
    for line, row, n in zip(table, rows, used, strict=True):
        line[:n] = row.request.pages[:n]
    return table


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
