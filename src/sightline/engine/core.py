"""The engine: `add`, `abort`, `put_pixels`, `step`. One loop around it serves the server and the offline `Engine`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np

from sightline.engine.encode_queue import BESIDE_LARGE, EncodeQueue
from sightline.engine.grammar import GrammarCompiler, wait_for_any
from sightline.engine.request import Request
from sightline.engine.scheduler import Batch, ScheduledRow, Scheduler
from sightline.errors import EngineError, GrammarCostError, RankError, leaves_device_unusable
from sightline.types import (
    EngineRequest,
    EngineStats,
    FinishReason,
    ImageRef,
    NeedPixels,
    SamplingParams,
    Times,
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
    """What the core needs of a model; the simulation tests supply one whose tokens are hashes of their context.

    `forward` and `sample` only start work and return; `collect` waits for it. Between a step's `forward` and its `sample` the
    core collects the step before.
    """

    def new_state(self, sampling: SamplingParams, prompt_ids: np.ndarray, index: int) -> Any:
        """Sampling state of one choice."""

    def new_pixels(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Host memory from which `encoding` copies fast."""

    def encoding(self, images: Sequence[ImageRef], pixels: Sequence[Any]) -> Any:
        """A `sightline.models.Encoding` of pictures, whose features are to be kept in the vision cache."""

    def slice_flops(self) -> float | None:
        """See `PictureRunner`."""

    def use_idle_time(self) -> bool:
        """Do a part, of some hundredths of a second, of what can wait; False when nothing is left."""

    def forward(self, rows: Sequence[ScheduledRow], num_decode: int) -> Any:
        """Compute the rows and write their K/V; returns the step. A decode row's token may still be in flight."""

    def sample(self, step: Any) -> None:
        """Choose the next token of every row with `sample`."""

    def collect(self, step: Any) -> list[Sampled]:
        """Those tokens, in order."""

    def close(self) -> None:
        """End what belongs to it."""


class _Flight(NamedTuple):
    """A launched step whose tokens are not known yet."""

    batch: Batch
    step: Any


class EngineCore:
    """Requests in, token events out. Not thread-safe: one thread owns it.

    eos_token_ids end a choice unless it ignores them. context_length bounds prompt plus answer. overlap: prepare and
    launch a step before the tokens of the one before are known, for a device that computes on its own. grammars: compiles
    those of structured output.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        eos_token_ids: Iterable[int],
        context_length: int,
        overlap: bool = False,
        grammars: GrammarCompiler | None = None,
        decode_log_interval: int = 40,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.eos_token_ids = frozenset(eos_token_ids)
        self.context_length = context_length
        self.overlap = overlap
        self.grammars = grammars
        self.stats = EngineStats(pages_total=scheduler.pool.num_total)
        self.stalled = False
        self._pictures = EncodeQueue(runner, scheduler.wants)
        self._encoders_turn = False
        self._requests: dict[tuple[str, int], Request] = {}
        self._compiling: list[Request] = []
        self._flight: _Flight | None = None
        # takes tokens as soon as they are known; without it `step` returns them, when the next step has been sampled
        self.deliver: Callable[[list[TokenEvent]], None] | None = None
        self._clock = clock
        self._log = _StepLog(scheduler, decode_log_interval, clock)

    @property
    def idle(self) -> bool:
        """Nothing is waiting, running or in flight."""
        return self.scheduler.idle and self._flight is None

    # -- requests ------------------------------------------------------------------------------------------------------

    def add(self, message: EngineRequest) -> None:
        """Queue a validated request: one `Request` for each of its n choices, the first leading."""
        prompt_ids = ids_from_bytes(message.input_ids)
        if not 0 < len(prompt_ids) < self.context_length:
            raise ValueError(f"prompt of {len(prompt_ids)} tokens for a context of {self.context_length}")
        room = self.context_length - len(prompt_ids)
        sampling = message.sampling
        leader: Request | None = None
        now = self._clock()
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
                start_by=now + message.max_wait,
                arrived=now,
                times=Times(arrived=now) if message.timed and leader is None else None,
            )
            leader = leader or request
            self._requests[request.request_id, index] = request
            if sampling.grammar is not None:
                assert self.grammars is not None, "an engine without a tokenizer cannot follow grammars"
                request.matcher = self.grammars.matcher(sampling.grammar)
                request.sampling_state.mask = request.matcher.mask
                self._compiling.append(request)
            self.scheduler.add(request)
        self.stats.prompt_tokens += len(prompt_ids)
        self.stats.image_tokens += sum(image.num_tokens for image in message.images)

    def put_pixels(self, digest: bytes, pixels: Any) -> None:
        """Supply a picture; ignored when nobody wants it any more."""
        self.scheduler.put_pixels(digest, pixels)

    def abort(self, request_id: str, index: int | None = None) -> list[TokenEvent]:
        """End a request, or one choice of it, in whatever state it is. Unknown and finished ones are ignored."""
        keys = [k for k in self._requests if k[0] == request_id and index in (None, k[1])]
        return [self._finish(self._requests[key], FinishReason.ABORT) for key in keys]

    def expire(self) -> list[TokenEvent]:
        """End requests that have waited too long for their turn; one that was set back has had it."""
        now = self._clock()
        late = {
            r.request_id
            for r in self.scheduler.waiting
            if r.start_by < now and r.leader is None and not r.output_ids and not r.num_retractions
        }
        return [self._finish(r, FinishReason.TIMEOUT) for r in [*self._requests.values()] if r.request_id in late]

    def _finish(self, request: Request, reason: FinishReason, **fields: Any) -> TokenEvent:
        del self._requests[request.request_id, request.index]
        if reason is FinishReason.ABORT:
            self.stats.aborts += 1
            self.stats.aborts_waiting += not request.pages
            self.stats.aborts_prefill += bool(request.pages) and request.in_prefill
        else:
            self.stats.finished += 1
        self.scheduler.finish(request, reason)
        return TokenEvent(
            request_id=request.request_id,
            index=request.index,
            finish_reason=reason,
            num_cached_tokens=request.num_cached,
            times=request.times,
            **fields,
        )

    # -- one step ------------------------------------------------------------------------------------------------------

    def step(self) -> list[TokenEvent | NeedPixels]:
        """Launch one batch, and end the one before (or, without overlap, this one).

        Returns tokens, and what the engine needs to go on; empty when nothing could run.
        """
        events: list[TokenEvent | NeedPixels] = [*self._start_matchers()]
        share = (0.0 if self._encoders_turn else BESIDE_LARGE) if self._pictures.large else 1.0
        batch = self.scheduler.schedule(prompt_share=share)
        events += [
            NeedPixels(request.request_id, digests)
            for request, digests in self._drain_pixel_requests()
            if not request.finished
        ]
        if batch is None and self._pictures:
            # what is half encoded keeps others out of the vision cache
            batch = Batch()
        # Every request waits for pixels: only a message can change that.
        self.stalled = batch is None and self._flight is None and not self._compiling
        if batch is None and self._flight is None and self._compiling:
            wait_for_any((r.matcher for r in self._compiling if r.matcher is not None), timeout=0.005)
        if batch is None:
            return events + self._land()
        self.stats.steps += 1
        self.stats.cached_tokens += batch.num_cached_tokens
        self.stats.queried_tokens += batch.num_queried_tokens
        self._begin(batch)
        events += self._encode(batch)
        if not batch.rows:
            return events + self._land()
        try:
            step = self.runner.forward(batch.rows, batch.num_decode)
            events += self._land()
            events += self._fill_masks(batch.rows)
            self.runner.sample(step)
        except Exception as error:
            _reraise_if_fatal(error)
            logger.exception("a step of %d requests failed; they are tried in smaller groups", len(batch.rows))
            return events + self._land() + self._isolate(batch.rows, batch.num_decode)
        self._launched(batch.rows)
        self._flight = _Flight(batch, step)
        if not self.overlap:
            events += self._land()
        return events

    def _begin(self, batch: Batch) -> None:
        """Note whose first step this is."""
        if len(batch.rows) == batch.num_decode:
            return
        now = self._clock()
        for row in batch.rows[batch.num_decode :]:
            if row.request.begun is None:
                row.request.begun = now
                if row.request.times is not None:
                    row.request.times.begun = now
                self.stats.queue_seconds.observe(now - row.request.arrived)

    def _start_matchers(self) -> list[TokenEvent]:
        """Requests whose grammars have been compiled may be admitted; one whose grammar failed ends."""
        events = []
        waiting, self._compiling = self._compiling, []
        for request in waiting:
            if request.finished or request.matcher is None:
                continue
            if not request.matcher.ready:
                self._compiling.append(request)
                continue
            try:
                request.matcher.start()
            except Exception as error:
                events.append(self._fail(request, error))
        return events

    def _fill_masks(self, rows: Sequence[ScheduledRow]) -> list[TokenEvent]:
        """What the grammars allow next, once the tokens before are known. One that fails ends its request."""
        events = []
        for row in rows:
            request = row.request
            if row.sample and request.matcher is not None and not request.finished:
                try:
                    request.matcher.fill()
                except EngineError as error:
                    events.append(self._fail(request, error))
        return events

    def _drain_pixel_requests(self) -> list[tuple[Request, list[bytes]]]:
        asked, self.scheduler.pixel_requests = self.scheduler.pixel_requests, []
        return asked

    def _encode(self, batch: Batch) -> list[TokenEvent]:
        """Fill the vision cache. A picture that cannot be encoded ends the requests that hold it, and leaves the batch."""
        if batch.encode:
            self.stats.images_encoded += len(batch.encode)
            for times in self._times_of(image.digest for image in batch.encode):
                times.encode_began = times.encode_began or self._clock()
            self._pictures.add(batch.encode, [self.scheduler.pixels.pop(image.digest) for image in batch.encode])
        if not self._pictures:
            return []
        began = self._clock()
        events = []
        self._encoders_turn = batch.num_new_tokens > 0
        alone = not batch.rows
        slice = (alone or batch.num_decode > 0) and not (self._pictures.large and self._encoders_turn)
        for done in self._pictures.advance(batch.needed, slice):
            if done.features is not None:
                self.scheduler.vision_cache.fill(done.image.digest, done.features)
                for times in self._times_of([done.image.digest]):
                    times.encode_ended = self._clock()
                continue
            if done.error is not None:
                _reraise_if_fatal(done.error)
                holders = [r for r in self._requests.values() if done.image.digest in r.pinned]
                events += [self._fail(request, done.error) for request in holders]
            self.scheduler.not_encoded(done.image.digest, failed=done.error is not None)
        self.stats.encode_seconds.observe(self._clock() - began)
        if events:
            num_decode = sum(not row.request.finished for row in batch.rows[: batch.num_decode])
            batch.rows = [row for row in batch.rows if not row.request.finished]
            batch.num_decode = num_decode
        return events

    def _times_of(self, digests: Iterable[bytes]) -> list[Times]:
        """Of the requests that wait for one of these pictures and are timed."""
        timed = [r for r in self._requests.values() if r.times is not None and r.in_prefill]
        wanted = set(digests) if timed else set()
        return [r.times for r in timed if r.times is not None and any(i.digest in wanted for i in r.images)]

    def _launched(self, rows: Sequence[ScheduledRow]) -> None:
        for row in rows:
            if not row.request.finished:
                self.scheduler.advance(row)
            row.request.num_in_flight += row.sample

    def _land(self) -> list[TokenEvent]:
        """End the step in flight, if there is one. Tokens of requests that ended meanwhile are dropped."""
        flight, self._flight = self._flight, None
        if flight is None:
            return []
        sampled = self.runner.collect(flight.step)
        events = self._commit(flight.batch.rows, sampled)
        if self.deliver is not None and events:
            self.deliver(events)
            events = []
        self._log.step(flight.batch, len(sampled))
        return events

    def _commit(self, rows: Sequence[ScheduledRow], sampled: Sequence[Sampled]) -> list[TokenEvent]:
        events = []
        for row, token in zip((row for row in rows if row.sample), sampled, strict=True):
            row.request.num_in_flight -= 1
            if not row.request.finished:
                events.append(self._append(row.request, token))
        return events

    def _isolate(self, rows: Sequence[ScheduledRow], num_decode: int) -> list[TokenEvent]:
        """Run the rows of a failed step in halves of halves, so that only the request that breaks them fails."""
        decode = [row for row in rows[:num_decode] if not row.request.finished]
        rows = decode + [row for row in rows[num_decode:] if not row.request.finished]
        if not rows:
            return []
        events = self._fill_masks(rows)
        try:
            step = self.runner.forward(rows, len(decode))
            self.runner.sample(step)
            sampled = self.runner.collect(step)
        except Exception as error:
            _reraise_if_fatal(error)
            if len(rows) == 1:
                return events or [self._fail(rows[0].request, error)]
            half = len(rows) // 2
            return (
                events
                + self._isolate(rows[:half], min(half, len(decode)))
                + self._isolate(rows[half:], max(len(decode) - half, 0))
            )
        self._launched(rows)
        return events + self._commit(rows, sampled)

    def _fail(self, request: Request, error: Exception) -> TokenEvent:
        logger.error("request %s failed: %s: %s", request.request_id, type(error).__name__, error)
        cost = isinstance(error, GrammarCostError)
        return self._finish(request, FinishReason.ERROR, error=f"{type(error).__name__}: {error}", grammar_cost=cost)

    def _append(self, request: Request, sampled: Sampled) -> TokenEvent:
        request.output_ids.append(sampled.token_id)
        self.stats.generated_tokens += 1
        if len(request.output_ids) == 1 and request.begun is not None:
            now = self._clock()
            self.stats.prefill_seconds.observe(now - request.begun)
            if request.times is not None:
                request.times.first_token = now
        sampling = request.sampling
        fields: dict[str, Any] = {
            "token_ids": [sampled.token_id],
            "logprobs": None if sampled.logprob is None else [sampled.logprob],
        }
        if sampling.prompt_logprobs is not None and request.index == 0 and len(request.output_ids) == 1:
            fields["prompt_logprobs"] = request.prompt_logprobs
        # At its end a grammar allows nothing but the end of sequence.
        is_eos = sampled.token_id in self.eos_token_ids and not (sampling.ignore_eos and request.matcher is None)
        if is_eos or sampled.token_id in sampling.stop_token_ids:
            return self._finish(request, FinishReason.STOP, stop_token_id=sampled.token_id, **fields)
        if request.matcher is not None:
            try:
                request.matcher.accept(sampled.token_id)
            except EngineError as error:
                return self._fail(request, error)
            if request.matcher.ended:
                return self._finish(request, FinishReason.STOP, **fields)
        if len(request.output_ids) >= request.max_tokens:
            return self._finish(request, FinishReason.LENGTH, **fields)
        return TokenEvent(
            request_id=request.request_id,
            index=request.index,
            num_cached_tokens=request.num_cached,
            times=request.times if len(request.output_ids) == 1 else None,
            **fields,
        )

    def snapshot(self) -> EngineStats:
        """Counters and gauges as they stand."""
        scheduler = self.scheduler
        free = scheduler.pool.num_free
        cached = scheduler.radix.num_pages if scheduler.radix is not None else 0
        in_use = self.stats.pages_total - free - cached
        return msgspec.structs.replace(
            self.stats,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            pages_free=free,
            pages_cached=cached,
            pages_in_use=in_use,
            pages_lost=in_use - sum(len(r.pages) - r.num_tree_pages for r in scheduler.running),
            pages_locked=scheduler.radix.num_locked if scheduler.radix is not None else 0,
            waiting_tokens=sum(r.num_tokens for r in scheduler.waiting),
            vision_cache_hits=scheduler.vision_cache.hits,
            vision_cache_misses=scheduler.vision_cache.misses,
            vision_cache_evictions=scheduler.vision_cache.evictions,
            vision_cache_bytes=scheduler.vision_cache.num_bytes,
            vision_cache_capacity=scheduler.vision_cache.max_bytes,
            retractions=scheduler.num_retractions,
            recomputed_tokens=scheduler.num_recomputed,
        )


def _reraise_if_fatal(error: Exception) -> None:
    """A CUDA error leaves the context unusable, and ranks out of step wait for ever: the process must end."""
    if isinstance(error, RankError) or leaves_device_unusable(error):
        raise error


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
