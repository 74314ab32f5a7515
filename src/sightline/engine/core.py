"""The engine: `add`, `abort`, `put_pixels`, `step`. One loop around it serves the server and the offline `Engine`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np

from sightline.engine.request import Request
from sightline.engine.scheduler import Batch, ScheduledRow, Scheduler
from sightline.types import (
    EngineRequest,
    EngineStats,
    FinishReason,
    ImageRef,
    NeedPixels,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
    ids_from_bytes,
)

logger = logging.getLogger("sightline.engine")


class Sampled(NamedTuple):
    """The next token of one row, with its log-probabilities if the request asked for them."""

    token_id: int
    logprob: TokenLogprob | None = None


class Runner(Protocol):
    """What the core needs of a model; the simulation tests supply one whose tokens are hashes of their context."""

    def new_state(self, sampling: SamplingParams, prompt_ids: np.ndarray, index: int) -> Any:
        """Sampling state of one choice."""

    def encode(self, images: Sequence[ImageRef], pixels: Sequence[Any]) -> list[Any]:
        """Features of each picture, to be kept in the vision cache."""

    def execute(self, rows: Sequence[ScheduledRow], num_decode: int) -> list[Sampled]:
        """Compute the rows, write their K/V, and sample for those with `sample`, in order."""


class EngineCore:
    """Requests in, token events out. Not thread-safe: one thread owns it.

    eos_token_ids end a choice unless it ignores them. context_length bounds prompt plus answer.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        eos_token_ids: Iterable[int],
        context_length: int,
        decode_log_interval: int = 40,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.eos_token_ids = frozenset(eos_token_ids)
        self.context_length = context_length
        self.stats = EngineStats(pages_total=scheduler.pool.num_total)
        self.stalled = False
        self._requests: dict[tuple[str, int], Request] = {}
        self._log = _StepLog(scheduler, decode_log_interval, clock)

    @property
    def idle(self) -> bool:
        """Nothing is waiting or running."""
        return self.scheduler.idle

    # -- requests ------------------------------------------------------------------------------------------------------

    def add(self, message: EngineRequest) -> None:
        """Queue a validated request: one `Request` for each of its n choices, the first leading."""
        prompt_ids = ids_from_bytes(message.input_ids)
        if not 0 < len(prompt_ids) < self.context_length:
            raise ValueError(f"prompt of {len(prompt_ids)} tokens for a context of {self.context_length}")
        room = self.context_length - len(prompt_ids)
        sampling = message.sampling
        leader: Request | None = None
        for index in range(sampling.n):
            request = Request(
                request_id=message.request_id,
                index=index,
                prompt_ids=prompt_ids,
                sampling=sampling,
                max_tokens=room if sampling.max_tokens is None else min(room, sampling.max_tokens),
                sampling_state=self.runner.new_state(sampling, prompt_ids, index),
                positions=ids_from_bytes(message.positions).reshape(3, -1) if message.positions else None,
                position_delta=message.position_delta,
                images=message.images,
                cache_salt=message.cache_salt,
                leader=leader,
            )
            leader = leader or request
            self._requests[request.request_id, index] = request
            self.scheduler.add(request)
        self.stats.prompt_tokens += len(prompt_ids)

    def put_pixels(self, digest: bytes, pixels: Any) -> None:
        """Supply a picture; ignored when nobody wants it any more."""
        self.scheduler.put_pixels(digest, pixels)

    def abort(self, request_id: str, index: int | None = None) -> list[TokenEvent]:
        """End a request, or one choice of it, in whatever state it is. Unknown and finished ones are ignored."""
        keys = [k for k in self._requests if k[0] == request_id and index in (None, k[1])]
        return [self._finish(self._requests[key], FinishReason.ABORT) for key in keys]

    def _finish(self, request: Request, reason: FinishReason, **fields: Any) -> TokenEvent:
        del self._requests[request.request_id, request.index]
        self.scheduler.finish(request, reason)
        if reason is FinishReason.ABORT:
            self.stats.aborts += 1
        else:
            self.stats.finished += 1
        return TokenEvent(
            request_id=request.request_id,
            index=request.index,
            finish_reason=reason,
            num_cached_tokens=request.num_cached,
            **fields,
        )

    # -- one step ------------------------------------------------------------------------------------------------------

    def step(self) -> list[TokenEvent | NeedPixels]:
        """Run one batch. Returns its tokens, and what the engine needs to go on; empty when nothing could run."""
        batch = self.scheduler.schedule()
        events: list[TokenEvent | NeedPixels] = [
            NeedPixels(request.request_id, digests)
            for request, digests in self._drain_pixel_requests()
            if not request.finished
        ]
        # Every request waits for pixels: only a message can change that.
        self.stalled = batch is None
        if batch is None:
            return events
        try:
            self._encode(batch)
            sampled = self.runner.execute(batch.rows, batch.num_decode)
        except Exception as error:
            if _is_fatal(error):
                raise
            logger.exception("a step failed; its %d requests end with an error", len(batch.rows))
            return events + self._fail(batch, error)
        self.stats.steps += 1
        events += self._commit(batch, sampled)
        self._log.step(batch, len(sampled))
        return events

    def _drain_pixel_requests(self) -> list[tuple[Request, list[bytes]]]:
        asked, self.scheduler.pixel_requests = self.scheduler.pixel_requests, []
        return asked

    def _encode(self, batch: Batch) -> None:
        if not batch.encode:
            return
        pixels = [self.scheduler.pixels[image.digest] for image in batch.encode]
        for image, features in zip(batch.encode, self.runner.encode(batch.encode, pixels), strict=True):
            self.scheduler.vision_cache.fill(image.digest, features)
            del self.scheduler.pixels[image.digest]
        self.stats.images_encoded += len(batch.encode)

    def _commit(self, batch: Batch, sampled: list[Sampled]) -> list[TokenEvent]:
        tokens = iter(sampled)
        events = []
        for row in batch.rows:
            self.scheduler.advance(row)
            if row.sample:
                events.append(self._append(row.request, next(tokens)))
        self.stats.cached_tokens += batch.num_cached_tokens
        return events

    def _append(self, request: Request, sampled: Sampled) -> TokenEvent:
        request.output_ids.append(sampled.token_id)
        self.stats.generated_tokens += 1
        fields: dict[str, Any] = {
            "token_ids": [sampled.token_id],
            "logprobs": None if sampled.logprob is None else [sampled.logprob],
        }
        sampling = request.sampling
        is_eos = sampled.token_id in self.eos_token_ids and not sampling.ignore_eos
        if is_eos or sampled.token_id in sampling.stop_token_ids:
            return self._finish(request, FinishReason.STOP, stop_token_id=sampled.token_id, **fields)
        if len(request.output_ids) >= request.max_tokens:
            return self._finish(request, FinishReason.LENGTH, **fields)
        return TokenEvent(
            request_id=request.request_id, index=request.index, num_cached_tokens=request.num_cached, **fields
        )

    def _fail(self, batch: Batch, error: Exception) -> list[TokenEvent]:
        reason = f"{type(error).__name__}: {error}"
        events = [self._finish(row.request, FinishReason.ERROR, error=reason) for row in batch.rows]
        for image in batch.encode:
            self.scheduler.vision_cache.discard_unfilled(image.digest)
        return events

    def snapshot(self) -> EngineStats:
        """Counters and gauges as they stand."""
        scheduler = self.scheduler
        free = scheduler.pool.num_free
        cached = scheduler.radix.num_pages if scheduler.radix is not None else 0
        return msgspec.structs.replace(
            self.stats,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            pages_free=free,
            pages_cached=cached,
            pages_in_use=self.stats.pages_total - free - cached,
            vision_cache_hits=scheduler.vision_cache.hits,
            vision_cache_bytes=scheduler.vision_cache.num_bytes,
            retractions=scheduler.num_retractions,
        )


def _is_fatal(error: Exception) -> bool:
    """A CUDA error leaves the context unusable: the process must end."""
    return "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError"


class _StepLog:
    """The operator's view of batches: every prefill, and decoding every `interval` steps."""

    def __init__(self, scheduler: Scheduler, interval: int, clock: Callable[[], float]) -> None:
        self._scheduler = scheduler
        self._interval = interval
        self._clock = clock
        self._since = clock()
        self._decode_steps = 0
        self._generated = 0

    def step(self, batch: Batch, num_sampled: int) -> None:
        """Called after each step."""
        scheduler = self._scheduler
        self._generated += num_sampled
        if batch.num_new_tokens:
            logger.info(
                "Prefill batch. #new-seq: %d, #new-token: %d, #cached-token: %d, #image: %d, token usage: %.2f, "
                "#running-req: %d, #queue-req: %d",
                batch.num_new_requests,
                batch.num_new_tokens,
                batch.num_cached_tokens,
                len(batch.encode),
                self._usage(),
                len(scheduler.running),
                len(scheduler.waiting),
            )
        if not batch.num_decode:
            return
        self._decode_steps += 1
        if self._decode_steps % self._interval == 0:
            now = self._clock()
            logger.info(
                "Decode batch. #running-req: %d, #token: %d, token usage: %.2f, gen throughput (token/s): %.2f, "
                "#queue-req: %d",
                len(scheduler.running),
                sum(r.num_tokens for r in scheduler.running),
                self._usage(),
                self._generated / max(now - self._since, 1e-9),
                len(scheduler.waiting),
            )
            self._since, self._generated = now, 0

    def _usage(self) -> float:
        pool, radix = self._scheduler.pool, self._scheduler.radix
        free = pool.num_free + (radix.num_evictable if radix is not None else 0)
        return 1.0 - free / pool.num_total
