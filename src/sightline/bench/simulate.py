"""A simulated cluster: the engine's own scheduler, caches and router over a model that only takes time.

Each replica is an `EngineCore` with its page pool, prefix cache and vision cache; the one thing that is made up is how long a
step takes: a constant, and something for each row, token, key and picture in it. `bench.calibrate` measures these for a server.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np

from sightline.bench.report import Summary, summarize
from sightline.bench.serving import repeats
from sightline.cache.page_pool import PagePool
from sightline.cache.radix import RadixCache
from sightline.cache.vision_cache import VisionCache
from sightline.engine.core import EngineCore, Sampled
from sightline.engine.routing import Footprint, Method, Router, footprint, load
from sightline.engine.scheduler import ScheduledRow, Scheduler, SchedulerConfig
from sightline.models import Encoding
from sightline.types import EngineRequest, ImageRef, NeedPixels, SamplingParams, TokenEvent, ids_to_bytes, summed

# Layers of a vision tower.
_PARTS = 32


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of work.

    Of the engine: step, and on top of it row for each request in the step, token for each prompt token computed, kv_token for each
    token of K/V read; a picture of n placeholders takes feature * n + feature_pair * n * n to encode.
    Of the HTTP process, one thing after the other: request and answer_token; picture for each placeholder, on a thread of its own.
    """

    step: float
    row: float = 0.0
    token: float = 0.0
    kv_token: float = 0.0
    feature: float = 0.0
    feature_pair: float = 0.0
    request: float = 0.0
    answer_token: float = 0.0
    picture: float = 0.0


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """A server: costs, and the sizes that its engine chose. source: where the figures come from.

    cores: processors that the engines, the HTTP process and the client of one machine share; None where an engine has a device
    of its own. picture_tokens: placeholders whose features fit into the vision cache. slice_seconds: of the encoder's work between
    two steps that decode, None where pictures are encoded inside the steps.
    """

    source: str
    costs: Costs
    num_pages: int
    picture_tokens: int
    max_running: int
    max_step_tokens: int
    max_mixed_tokens: int | None
    max_encode_tokens: int
    page_size: int = 16
    cores: int | None = None
    slice_seconds: float | None = None


class Traffic(msgspec.Struct, frozen=True, kw_only=True):
    """What comes, for each replica: `clients` that wait for their answers, or `rate` requests a second at random times.

    A prompt is a system prompt that all share, a picture, and a question of its own; `reuse` of them, 0 to 1, ask about a picture
    that an earlier one brought. All sizes in tokens; answers have between 1 - vary and 1 + vary times as many as `answer` says.
    """

    clients: int = 16
    rate: float | None = None
    num_requests: int = 64
    system: int = 32
    picture: int = 324
    question: int = 32
    answer: int = 64
    vary: float = 0.0
    reuse: float = 0.3
    seed: int = 0


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """What the simulated clients saw; rates are of the whole cluster.

    requests_per_second: of the whole run; steady: of its middle half, when all clients are there. prefix_hit_rate: of the prompt
    tokens, those found in the prefix cache. found: of the requests about a known picture, those that found all of it there.
    busy: part of the time that the engines computed.
    """

    replicas: int
    method: str
    seconds: float
    requests_per_second: float
    steady: float
    time_to_first_token_ms: Summary | None
    request_latency_ms: Summary | None
    prefix_hit_rate: float
    found: float | None
    busy: float


def simulate(
    profile: Profile, traffic: Traffic, num_replicas: int, method: Method = "cache_aware", *, dp_size: int = 8
) -> Forecast:
    """Run the traffic through a cluster. dp_size: replicas that share one HTTP process."""
    return _Cluster(profile, traffic, num_replicas, method, dp_size).run()


class _Time:
    """The injected clock. Pieces of work go on at once and share the processors evenly; timers do not need any."""

    def __init__(self, cores: float) -> None:
        self.now = 0.0
        self._cores = cores
        # Work is done when `_done`, which advances as fast as each piece does, reaches its mark: no piece is touched in between.
        self._done = 0.0
        self._work: list[tuple[float, int, Callable[[], None]]] = []
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = itertools.count()

    def work(self, seconds: float, then: Callable[[], None]) -> None:
        heapq.heappush(self._work, (self._done + seconds, next(self._serial), then))

    def at(self, moment: float, then: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (moment, next(self._serial), then))

    def run(self) -> None:
        while self._work or self._timers:
            speed = min(1.0, self._cores / max(len(self._work), 1))
            due = self.now + (self._work[0][0] - self._done) / speed if self._work else math.inf
            if self._timers and self._timers[0][0] <= due:
                moment, _, then = heapq.heappop(self._timers)
                self._done += (moment - self.now) * speed
                self.now = moment
            else:
                self._done, _, then = heapq.heappop(self._work)
                self.now = due
            then()


class _Host:
    """An HTTP process: one thing after the other."""

    def __init__(self, time: _Time) -> None:
        self._time = time
        self._queue: deque[tuple[float, Callable[[], None]]] = deque()
        self._busy = False

    def do(self, seconds: float, then: Callable[[], None]) -> None:
        self._queue.append((seconds, then))
        if not self._busy:
            self._next()

    def _next(self) -> None:
        self._busy = bool(self._queue)
        if not self._queue:
            return
        seconds, then = self._queue.popleft()

        def done() -> None:
            then()
            self._next()

        self._time.work(seconds, done)


class TimedModel:
    """`Runner` without a model: it adds up what a step costs, and every token is 1. slice: seconds of the encoder beside
    decoding, None for all."""

    def __init__(self, costs: Costs, slice: float | None = None) -> None:
        self._costs = costs
        self._slice = slice
        self._spent = 0.0

    def take_spent(self) -> float:
        """Seconds since the last call."""
        spent, self._spent = self._spent, 0.0
        return spent

    def new_state(self, sampling: SamplingParams, prompt_ids: np.ndarray, index: int) -> None:
        return None

    def new_pixels(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.zeros(shape, dtype)

    def encoding(self, images: Sequence[ImageRef], pixels: Sequence[Any]) -> Encoding[list[bool]]:
        c = self._costs
        seconds = sum(c.feature * i.num_tokens + c.feature_pair * i.num_tokens**2 for i in images)
        for _ in range(_PARTS):
            self._spent += seconds / _PARTS
            yield seconds / _PARTS
        return [True] * len(images)

    def use_idle_time(self) -> bool:
        return False

    def slice_flops(self) -> float | None:
        """Seconds, as what `encoding` yields."""
        return self._slice

    def forward(self, rows: Sequence[ScheduledRow], num_decode: int) -> int:
        c = self._costs
        tokens = sum(r.q_len for r in rows[num_decode:])
        keys = sum(r.start + r.q_len for r in rows)
        self._spent += c.step + c.row * len(rows) + c.token * tokens + c.kv_token * keys
        return sum(r.sample for r in rows)

    def sample(self, step: int) -> None:
        pass

    def collect(self, step: int) -> list[Sampled]:
        return [Sampled(1)] * step

    def close(self) -> None:
        """Holds nothing."""


class _Replica:
    """An engine, and what its HTTP process knows of it."""

    def __init__(self, profile: Profile, num_pages: int, host: _Host, time: _Time) -> None:
        pool = PagePool(num_pages + 1)
        config = SchedulerConfig(
            page_size=profile.page_size,
            max_step_tokens=profile.max_step_tokens,
            max_running=profile.max_running,
            max_encode_tokens=profile.max_encode_tokens,
            image_token_bytes=1,
            max_mixed_tokens=profile.max_mixed_tokens,
        )
        radix = RadixCache(pool, profile.page_size)
        self.model = TimedModel(profile.costs, profile.slice_seconds)
        self.core = EngineCore(
            Scheduler(
                config,
                pool,
                radix,
                VisionCache(profile.picture_tokens),
                encode_beside=profile.slice_seconds is not None,
            ),
            self.model,
            eos_token_ids=(),
            context_length=1 << 30,
            decode_log_interval=1 << 30,
            clock=lambda: time.now,
        )
        self.host = host
        self.known: set[bytes] = set()
        self.num_in_flight = 0
        self.num_begun = 0
        self.busy = False
        self.busy_seconds = 0.0


class _Seen(msgspec.Struct):
    """One request, as its client saw it."""

    began: float
    first: float = 0.0
    ended: float = 0.0
    num_cached: int = 0


class _Cluster:
    def __init__(self, profile: Profile, traffic: Traffic, num_replicas: int, method: Method, dp_size: int) -> None:
        self.traffic, self.costs = traffic, profile.costs
        self.total = traffic.num_requests * num_replicas
        self.pictures = repeats(self.total, traffic.reuse, traffic.seed)
        num_hosts = -(-num_replicas // dp_size)
        self.time = _Time(math.inf if profile.cores is None else profile.cores * num_hosts)
        hosts = [_Host(self.time) for _ in range(num_hosts)]
        length = traffic.system + traffic.picture + traffic.question + traffic.answer
        # No more than can be filled: thrice a replica's part of the traffic. A thousand whole pools would not fit into memory.
        num_pages = min(profile.num_pages, 3 * (traffic.num_requests + 1) * -(-length // profile.page_size))
        self.replicas = [_Replica(profile, num_pages, hosts[i // dp_size], self.time) for i in range(num_replicas)]
        self.router: Router[int] = Router(
            method,
            prefix_tokens=profile.num_pages * profile.page_size,
            picture_tokens=profile.picture_tokens,
        )
        self.seen: dict[int, _Seen] = {}
        self.waiting = iter(range(self.total))

    def run(self) -> Forecast:
        traffic, num_replicas = self.traffic, len(self.replicas)
        if traffic.rate is None:
            for _ in range(min(traffic.clients * num_replicas, self.total)):
                self._arrive(next(self.waiting))
        else:
            rng = random.Random(f"{traffic.seed}-arrivals")
            gaps = (rng.expovariate(traffic.rate * num_replicas) for _ in range(self.total))
            for i, moment in enumerate(itertools.accumulate(gaps)):
                self.time.at(moment, partial(self._arrive, i))
        self.time.run()
        return self._forecast()

    def _arrive(self, i: int) -> None:
        """Route a request, as its HTTP process does; then it is parsed, its picture decoded, and the engine gets it."""
        self.seen[i] = _Seen(self.time.now)
        message = self._message(i)
        mark = footprint(np.frombuffer(message.input_ids, dtype="<i4"), message.images)
        replica = self._choose(mark)

        def parsed() -> None:
            new = [image for image in message.images if image.digest not in replica.known]
            replica.known.update(image.digest for image in new)
            self.time.work(self.costs.picture * sum(image.num_tokens for image in new), partial(decoded, new))

        def decoded(new: list[ImageRef]) -> None:
            replica.core.add(message)
            for image in new:
                replica.core.put_pixels(image.digest, True)
            self._step(replica)

        replica.host.do(self.costs.request, parsed)

    def _choose(self, mark: Footprint) -> _Replica:
        chosen = self.router.choose(mark, {i: load(r.num_in_flight, r.num_begun) for i, r in enumerate(self.replicas)})
        self.router.record(mark, chosen)
        self.replicas[chosen].num_in_flight += 1
        return self.replicas[chosen]

    def _message(self, i: int) -> EngineRequest:
        t = self.traffic
        ids = np.concatenate([np.arange(t.system), np.zeros(t.picture), np.full(t.question, 1000 + i)])
        digest = self.pictures[i].to_bytes(32, "little")
        length = 1 + t.vary * random.Random(f"{t.seed}-{i}").uniform(-1, 1)
        return EngineRequest(
            request_id=str(i),
            input_ids=ids_to_bytes(ids.astype(np.int32)),
            sampling=SamplingParams(max_tokens=max(1, round(t.answer * length)), ignore_eos=True),
            images=(ImageRef(digest, t.system, t.picture, (1, 1, t.picture)),) if t.picture else (),
        )

    def _step(self, replica: _Replica) -> None:
        """Begin a step unless one is under way; what it made is there when its time is over."""
        if replica.busy or replica.core.idle:
            return
        events = replica.core.step()
        spent = replica.model.take_spent()
        replica.busy = True
        began = self.time.now

        def done() -> None:
            replica.busy = False
            replica.busy_seconds += self.time.now - began
            tokens = [event for event in events if isinstance(event, TokenEvent)]
            replica.host.do(self.costs.answer_token * len(tokens), partial(self._answer, replica, tokens))
            for event in events:
                if isinstance(event, NeedPixels):
                    self._supply(replica, event)
            if not replica.core.stalled:
                self._step(replica)

        self.time.work(spent, done)

    def _supply(self, replica: _Replica, event: NeedPixels) -> None:
        """The engine has dropped a picture that it was believed to have."""

        def decoded() -> None:
            for digest in event.digests:
                replica.core.put_pixels(digest, True)
            self._step(replica)

        self.time.work(self.costs.picture * self.traffic.picture * len(event.digests), decoded)

    def _answer(self, replica: _Replica, events: Sequence[TokenEvent]) -> None:
        for event in events:
            seen = self.seen[int(event.request_id)]
            if not seen.first:
                seen.first = self.time.now
                replica.num_begun += 1
            seen.num_cached = event.num_cached_tokens
            if event.finish_reason is not None:
                seen.ended = self.time.now
                replica.num_in_flight -= 1
                replica.num_begun -= 1
                if self.traffic.rate is None and (following := next(self.waiting, None)) is not None:
                    self._arrive(following)

    def _forecast(self) -> Forecast:
        t, seen = self.traffic, self.seen
        assert len(seen) == self.total
        assert all(s.ended for s in seen.values())
        stats = summed(replica.core.snapshot() for replica in self.replicas)
        again = [i for i, picture in enumerate(self.pictures) if picture != i] if t.picture else []
        found = sum(seen[i].num_cached >= t.system + t.picture - self._partial_page() for i in again)
        ends = sorted(s.ended for s in seen.values())
        quarter, three = len(ends) // 4, 3 * len(ends) // 4
        seconds, middle = ends[-1], ends[three] - ends[quarter]
        return Forecast(
            replicas=len(self.replicas),
            method=self.router.method,
            seconds=seconds,
            requests_per_second=self.total / seconds,
            steady=(three - quarter) / middle if middle else self.total / seconds,
            time_to_first_token_ms=summarize([1e3 * (s.first - s.began) for s in seen.values()]),
            request_latency_ms=summarize([1e3 * (s.ended - s.began) for s in seen.values()]),
            prefix_hit_rate=stats.prefix_hit_rate,
            found=found / len(again) if again else None,
            busy=sum(replica.busy_seconds for replica in self.replicas) / seconds / len(self.replicas),
        )

    def _partial_page(self) -> int:
        """Tokens of the picture that share their page with the question, which is another one."""
        size = self.replicas[0].core.scheduler.config.page_size
        return (self.traffic.system + self.traffic.picture) % size
