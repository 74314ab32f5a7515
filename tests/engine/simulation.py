"""The engine over a model whose token is a hash of everything that it can see, driven by a seeded, hostile workload.

The fake model keeps, for each slot of a K/V page, a hash chained from the slot before it, read through the page table.
A page given to two requests, a stale prefix, another tenant's or picture's page, a chunk computed twice or not at all, a
lost draw: each changes every later token. So any run is compared with what each request answers alone, for which no
engine is needed. Between steps, every page, lock and pin is counted.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from sightline.cache.page_pool import PagePool
from sightline.cache.radix import RadixCache
from sightline.cache.vision_cache import VisionCache
from sightline.engine.core import EngineCore, Sampled
from sightline.engine.encode_queue import EncodeQueue
from sightline.engine.request import Request
from sightline.engine.scheduler import ScheduledRow, Scheduler, SchedulerConfig
from sightline.models import Encoding
from sightline.types import EngineRequest, FinishReason, ImageRef, NeedPixels, SamplingParams, TokenEvent, ids_to_bytes

VOCAB = 40
EOS = 0
PAD = VOCAB
STOP = 5


def chain(*parts: bytes) -> bytes:
    """16 bytes that depend on all parts and their borders."""
    h = hashlib.blake2b(digest_size=16)
    for part in parts:
        h.update(len(part).to_bytes(4, "little") + part)
    return h.digest()


def pixels_of(digest: bytes) -> bytes:
    """The only right pixels of a picture."""
    return chain(b"pixels", digest)


def feature(pixels: bytes, index: int) -> bytes:
    """Row `index` of the features made of pixels."""
    return chain(b"feature", pixels, index.to_bytes(4, "little"))


def slot_hash(before: bytes, token: int, position: int, seen: bytes) -> bytes:
    """What the fake model writes to a slot."""
    return chain(before, token.to_bytes(4, "little"), position.to_bytes(4, "little"), seen)


def draw(slots: bytes, index: int, num_drawn: int) -> int:
    """The next token: of all slots in view, of the choice, and of how often that choice drew before."""
    digest = chain(slots, index.to_bytes(4, "little"), num_drawn.to_bytes(4, "little"))
    return int.from_bytes(digest[:8], "little") % VOCAB


def visible(images: Sequence[ImageRef], position: int) -> list[ImageRef]:
    """Beside the text: the pictures that a token sees, the last one so far and those that adjoin it."""
    group: list[ImageRef] = []
    for image in reversed([i for i in images if i.offset <= position]):
        if group and image.offset + image.num_tokens != group[0].offset:
            break
        group.insert(0, image)
    return group


def seen_by(images: Sequence[ImageRef], position: int, beside_text: bool, features: Callable[[bytes], bytes]) -> bytes:
    """What a token sees of the pictures, given each one's features."""
    if beside_text:
        return b"".join(feature(features(i.digest), 0) for i in visible(images, position))
    here = [i for i in images if i.offset <= position < i.offset + i.num_tokens]
    return b"".join(feature(features(i.digest), position - i.offset) for i in here)


def alone(message: EngineRequest, index: int, max_tokens: int, beside_text: bool) -> list[int]:
    """The answer of one choice, from the prompt itself: no engine, no pages."""
    tokens = np.frombuffer(message.input_ids, dtype="<i4").tolist()
    before, slots, output = chain(b"start", message.cache_salt), b"", []
    sampling = message.sampling
    while True:
        for position in range(len(slots) // 16, len(tokens)):
            seen = seen_by(message.images, position, beside_text, pixels_of)
            before = slot_hash(before, tokens[position], position, seen)
            slots += before
        token = draw(slots, index, len(output))
        tokens.append(token)
        output.append(token)
        stopped = (token == EOS and not sampling.ignore_eos) or token in sampling.stop_token_ids
        if stopped or len(output) >= max_tokens:
            return output


class PlannedError(RuntimeError):
    """A fault that the workload injects."""


@dataclass
class State:
    """The fake sampler's memory of one choice."""

    index: int
    num_drawn: int = 0


@dataclass
class Step:
    """A launched step of the fake device: what its samples see, and then the tokens, until the core collects them."""

    rows: list[ScheduledRow]
    slots: list[bytes]
    tokens: list[int] | None = None


class HashRunner:
    """`Runner` over slots of 16 bytes. Asserts what a real device would silently corrupt.

    The newest token of a request is known to the device alone until its step is collected. poisoned: (request id, index) of
    choices that break any step they are part of; bad_pictures: digests that cannot be encoded.
    """

    def __init__(self, pool: PagePool, vision_cache: VisionCache, work: Workload) -> None:
        self.page_size = work.page_size
        self.pool = pool
        self.vision_cache = vision_cache
        self.work = work
        self.slots = np.zeros(((pool.num_total + 1) * work.page_size, 16), dtype=np.uint8)
        self.fail_next = ""
        self.poisoned: dict[tuple[str, int], str] = {}
        self.bad_pictures: set[bytes] = set()
        self.num_steps = 0
        self._newest: dict[int, int] = {}

    def new_state(self, sampling: SamplingParams, prompt_ids: np.ndarray, index: int) -> State:
        return State(index)

    def encoding(self, images: Sequence[ImageRef], pixels: Sequence[bytes]) -> Encoding[list[bytes]]:
        digests = {i.digest for i in images}
        assert len(digests) == len(images), "a picture is encoded twice in one step"
        for _ in range(self.work.encoder_parts):
            yield 1.0
        self._fail_if_planned("encode", bool(digests & self.bad_pictures))
        return list(pixels)

    def use_idle_time(self) -> bool:
        return False

    def slice_flops(self) -> float | None:
        return self.work.encoder_slice

    def forward(self, rows: Sequence[ScheduledRow], num_decode: int) -> Step:
        self.num_steps += 1
        assert rows, "an empty step"
        assert len({id(r.request) for r in rows}) == len(rows), "a request twice in one step"
        num_tokens = sum(r.q_len for r in rows)
        assert num_tokens <= self.work.max_step_tokens, "more tokens than a step may have"
        assert not num_decode or num_tokens <= max(num_decode, self.work.max_mixed_tokens or num_tokens)
        assert all(r.q_len == 1 and r.sample for r in rows[:num_decode]), "a decode row of another length"
        assert all(r.start == r.request.num_computed and r.q_len > 0 for r in rows)
        self._fail_if_planned("forward", self._poison("forward", rows))
        self._check_writes(rows)
        for row in rows:
            self._write(row)
        sampling = [row for row in rows if row.sample]
        for row in sampling:
            assert row.start + row.q_len == row.request.num_tokens, "a sample before the newest token"
            assert len(row.request.output_ids) + row.request.num_in_flight < row.request.max_tokens
        slots = [self.slots[self._slots(r.request, r.request.num_tokens)].tobytes() for r in sampling]
        return Step(sampling, slots)

    def sample(self, step: Step) -> None:
        assert step.tokens is None, "sampled twice"
        self._fail_if_planned("sample", self._poison("sample", step.rows))
        step.tokens = []
        for row, slots in zip(step.rows, step.slots, strict=True):
            state: State = row.request.sampling_state
            step.tokens.append(draw(slots, state.index, state.num_drawn))
            state.num_drawn += 1
            self._newest[id(row.request)] = step.tokens[-1]

    def collect(self, step: Step) -> list[Sampled]:
        assert step.tokens is not None, "collected before it was sampled"
        tokens, step.tokens = step.tokens, None
        return [Sampled(token) for token in tokens]

    def _poison(self, where: str, rows: Sequence[ScheduledRow]) -> bool:
        return any(self.poisoned.get((r.request.request_id, r.request.index)) == where for r in rows)

    def _fail_if_planned(self, where: str, always: bool) -> None:
        if not always and self.fail_next != where:
            return
        # One passing fault a step: a second one, while the requests are tried one by one, would rightly end its request.
        self.fail_next = ""
        raise PlannedError(where if always else "passing")

    def _check_writes(self, rows: Sequence[ScheduledRow]) -> None:
        written: list[int] = []
        for row in rows:
            pages = {p // self.page_size for p in range(row.start, row.start + row.q_len)}
            assert min(pages) >= row.request.num_tree_pages, "a write to a page of the prefix cache"
            written += [row.request.pages[p] for p in pages]
        assert len(set(written)) == len(written), "two rows write to one page"
        assert not any(self.pool.is_free(p) for p in written), "a write to a free page"
        assert 0 not in written

    def _slots(self, request: Request, end: int) -> np.ndarray:
        positions = np.arange(end)
        pages = np.asarray(request.pages[: -(-end // self.page_size)])
        return pages[positions // self.page_size] * self.page_size + positions % self.page_size

    def _write(self, row: ScheduledRow) -> None:
        request, end = row.request, row.start + row.q_len
        where = self._slots(request, end)
        before = self.slots[where[row.start - 1]].tobytes() if row.start else chain(b"start", request.cache_salt)
        if request.num_in_flight:
            assert row.q_len == 1, "a prefill of a token that is in flight"
            ids = [self._newest[id(request)]]
        else:
            ids = request.ids(row.start, end).tolist()
        for position, token in enumerate(ids, row.start):
            seen = seen_by(request.images, position, self.beside_text, self.vision_cache.get)
            assert self.beside_text or (token == PAD) == bool(seen), "a placeholder without features, or the reverse"
            before = slot_hash(before, token, position, seen)
            self.slots[where[position]] = np.frombuffer(before, dtype=np.uint8)

    @property
    def beside_text(self) -> bool:
        return self.work.beside_text


@dataclass
class Choice:
    """What the client has seen of one choice."""

    message: EngineRequest
    index: int
    expected: list[int]
    start_by: float
    tokens: list[int] = field(default_factory=list)
    reason: FinishReason | None = None
    aborted: bool = False


@dataclass
class Workload:
    """Everything that one seed decides. Sizes are small so that every limit is met often."""

    rng: random.Random
    page_size: int
    context_length: int
    num_pages: int
    max_step_tokens: int
    max_mixed_tokens: int | None
    min_mixed_tokens: int | None
    max_running: int
    max_encode_tokens: int
    vision_bytes: int
    use_radix: bool
    overlap: bool
    encoder_parts: int
    encoder_slice: float | None
    encode_beside: bool
    more_is_large: int
    beside_text: bool
    num_requests: int
    fault_rate: float
    abort_rate: float
    retract_rate: float
    pixel_delay: int
    duplicate_rate: float
    clock_steps: list[float]
    max_waits: list[float]
    segments: list[list[int] | int]
    picture_tokens: list[int]

    @classmethod
    def of_seed(cls, seed: int) -> Workload:
        rng = random.Random(seed)
        page_size = rng.choice([1, 2, 4, 4, 8])
        context_length = rng.randint(12, 64)
        minimum = -(-context_length // page_size)
        picture_tokens = [rng.randint(1, 14) for _ in range(5)]
        return cls(
            rng=rng,
            page_size=page_size,
            context_length=context_length,
            num_pages=minimum + rng.choice([0, 0, 1, 2, minimum, 4 * minimum]),
            max_step_tokens=rng.choice([1, 2, 3, 5, 8, 16, 64]),
            max_mixed_tokens=rng.choice([None, None, 1, 4, 9]),
            min_mixed_tokens=rng.choice([None, 1]),
            max_running=rng.choice([1, 2, 3, 8, 16]),
            max_encode_tokens=rng.choice([1, 10, 30]),
            vision_bytes=rng.choice([0, 8, 14, 20, 40, 1000]),
            use_radix=rng.random() < 0.8,
            overlap=rng.random() < 0.6,
            encoder_parts=rng.choice([0, 1, 4]),
            encoder_slice=rng.choice([None, 1.0, 3.0]),
            encode_beside=rng.random() < 0.5,
            more_is_large=rng.choice([0, 8, 100]),
            beside_text=rng.random() < 0.3,
            num_requests=rng.randint(3, 24),
            fault_rate=rng.choice([0.0, 0.0, 0.05]),
            abort_rate=rng.choice([0.0, 0.05, 0.2]),
            retract_rate=rng.choice([0.0, 0.0, 0.02, 0.1]),
            pixel_delay=rng.choice([0, 3, 20]),
            duplicate_rate=rng.choice([0.0, 0.0, 0.3]),
            # Seconds between steps: even ones, or with jumps as of a machine that slept.
            clock_steps=rng.choice([[0.0], [0.1], [0.1] * 30 + [1000.0]]),
            max_waits=rng.choice([[float("inf")], [0.0, 0.5, 5.0, float("inf")]]),
            # Text of one to ten tokens, or the number of a picture; repeated, so that prefixes are shared.
            segments=[
                rng.randrange(5) if rng.random() < 0.4 else [rng.randrange(VOCAB) for _ in range(rng.randint(1, 10))]
                for _ in range(5)
            ],
            picture_tokens=picture_tokens,
        )

    def request(self, number: int, previous: list[list[list[int] | int]]) -> EngineRequest:
        """A prompt made of known segments, often one that an earlier prompt began with."""
        rng = self.rng
        salt = rng.choice([b"", b"", b"", b"tenant"])
        parts = list(rng.choice(previous)[: rng.randint(0, 4)]) if previous and rng.random() < 0.6 else []
        parts += rng.choices(self.segments, k=rng.randint(1, 4))
        ids: list[int] = []
        images: list[ImageRef] = []
        used: list[list[int] | int] = []
        for part in parts:
            new = [PAD] * (1 if self.beside_text else self.picture_tokens[part]) if isinstance(part, int) else part
            if len(ids) + len(new) >= self.context_length:
                continue
            if isinstance(part, int):
                # A tenant's salt is part of the digest, as in the server.
                digest = hashlib.blake2b(bytes([part]) + salt, digest_size=32).digest()
                images.append(ImageRef(digest, len(ids), len(new), (1, 1, self.picture_tokens[part])))
            ids += new
            used.append(part)
        previous.append(used)
        return EngineRequest(
            request_id=f"r{number}",
            input_ids=ids_to_bytes(ids or [1]),
            sampling=SamplingParams(
                n=rng.choice([1, 1, 1, 2, 3]),
                max_tokens=rng.choice([None, 1, 2, 5, 20]),
                ignore_eos=rng.random() < 0.5,
                stop_token_ids=rng.choice([(), (), (STOP,)]),
            ),
            images=tuple(images),
            cache_salt=salt,
            max_wait=rng.choice(self.max_waits),
        )


class Simulation:
    """One seed. `run` raises AssertionError on the first thing that is wrong."""

    def __init__(self, seed: int) -> None:
        self.work = work = Workload.of_seed(seed)
        self.rng = work.rng
        self.now = 0.0
        self.pool = PagePool(work.num_pages + 1)
        self.vision_cache = VisionCache(work.vision_bytes)
        self.radix = RadixCache(self.pool, work.page_size) if work.use_radix else None
        self.runner = HashRunner(self.pool, self.vision_cache, work)
        config = SchedulerConfig(
            page_size=work.page_size,
            max_step_tokens=work.max_step_tokens,
            max_mixed_tokens=work.max_mixed_tokens,
            min_mixed_tokens=work.min_mixed_tokens,
            max_running=work.max_running,
            max_encode_tokens=work.max_encode_tokens,
            image_token_bytes=1,
            num_features=lambda image: image.grid[2],
            cross_attention=work.beside_text,
        )
        self.scheduler = Scheduler(config, self.pool, self.radix, self.vision_cache, work.encode_beside)
        self.core = EngineCore(
            self.scheduler,
            self.runner,
            eos_token_ids=[EOS],
            context_length=work.context_length,
            overlap=work.overlap,
            clock=lambda: self.now,
        )
        self.delivered: list[TokenEvent] = []
        if work.overlap:
            self.core.deliver = self.delivered.extend
        self.core._pictures = EncodeQueue(self.runner, self.scheduler.wants, work.more_is_large)
        self.choices: dict[tuple[str, int], Choice] = {}
        self.previous: list[list[list[int] | int]] = []
        self.pixels_due: list[tuple[int, bytes, str]] = []
        self.ever_bad: set[bytes] = set()
        self.tick = 0
        self.added = 0
        self.met: Counter[str] = Counter()
        self.trace = hashlib.sha256()

    def run(self) -> None:
        """Until every request has ended."""
        while self.added < self.work.num_requests or not self.core.idle:
            self.tick += 1
            assert self.tick < 20_000, f"no end in sight: {len(self.scheduler.waiting)} waiting"
            self._act()
            if self.core.idle:
                self._check_idle()
                continue
            self._step()
            self._check_step()
        self._check_idle()
        for choice in self.choices.values():
            assert choice.reason is not None, "a choice never ended"
        if self.radix is not None:
            self.radix.reset()
            assert self.pool.num_free == self.pool.num_total

    # -- the clients ---------------------------------------------------------------------------------------------------

    def _act(self) -> None:
        rng, work = self.rng, self.work
        self.now += rng.choice(work.clock_steps)
        self._receive(self.core.expire())
        while self.added < work.num_requests and rng.random() < (0.9 if self.core.idle else 0.25):
            self._add()
        due = [entry for entry in self.pixels_due if entry[0] <= self.tick]
        self.pixels_due = [entry for entry in self.pixels_due if entry[0] > self.tick]
        for _, digest, request_id in due:
            if rng.random() < work.duplicate_rate:
                self.pixels_due.append((self.tick + rng.randint(1, 20), digest, request_id))
                self.met["pixels twice"] += 1
            # A client that is gone may or may not have answered before.
            if self._is_live(request_id) or rng.random() < 0.5:
                self.core.put_pixels(digest, pixels_of(digest))
        live = [c for c in self.choices.values() if c.reason is None]
        if live and rng.random() < work.abort_rate:
            self._abort(rng.choice(live))
        if self.scheduler.running and rng.random() < work.retract_rate and self.scheduler.num_retractions < 100:
            # As if memory had run out, which by itself seldom meets a prefill. Not for ever: one token a step and no
            # prefix cache might never get anywhere.
            self.scheduler.retract(rng.choice(self.scheduler.running))
        if rng.random() < work.fault_rate:
            self.runner.fail_next = rng.choice(["encode", "forward", "sample"])
        if live and rng.random() < work.fault_rate:
            choice = rng.choice(live)
            self.runner.poisoned[choice.message.request_id, choice.index] = rng.choice(["forward", "sample"])
        if rng.random() < work.fault_rate:
            pictures = [image.digest for c in live for image in c.message.images]
            self.runner.bad_pictures = {rng.choice(pictures)} if pictures else set()
            self.ever_bad |= self.runner.bad_pictures

    def _add(self) -> None:
        message = self._continued(self.work.request(self.added, self.previous))
        self.added += 1
        prompt_len = len(message.input_ids) // 4
        room = self.work.context_length - prompt_len
        limit = min(room, message.sampling.max_tokens or room)
        for index in range(message.sampling.n):
            self.choices[message.request_id, index] = Choice(
                message, index, alone(message, index, limit, self.work.beside_text), self.now + message.max_wait
            )
        self.core.add(message)
        # Some pictures come with the request, as from a client that thinks them unknown.
        for image in message.images:
            if self.rng.random() < 0.5:
                self.core.put_pixels(image.digest, pixels_of(image.digest))

    def _continued(self, message: EngineRequest) -> EngineRequest:
        """Sometimes another turn of a conversation: an earlier prompt, its answer, and the new prompt's text."""
        earlier = [c for c in self.choices.values() if c.reason is not None]
        if not earlier or self.rng.random() < 0.7:
            return message
        choice = self.rng.choice(earlier)
        ids = np.frombuffer(choice.message.input_ids + ids_to_bytes(choice.tokens), dtype="<i4")
        more = [t for t in np.frombuffer(message.input_ids, dtype="<i4").tolist() if t != PAD]
        ids = np.concatenate([ids, more])[: self.work.context_length - 1]
        if any(i.offset + i.num_tokens > len(ids) for i in choice.message.images):
            return message
        return msgspec.structs.replace(
            choice.message, request_id=message.request_id, input_ids=ids_to_bytes(ids), sampling=message.sampling
        )

    def _abort(self, choice: Choice) -> None:
        request = self.core._requests[choice.message.request_id, choice.index]
        state = "waiting" if not request.pages else "prefill" if request.in_prefill else "decode"
        self.met[f"abort {state}{' after retraction' if request.num_retractions else ''}"] += 1
        if request.asked_pixels:
            self.met["abort while asking for pixels"] += 1
        whole = self.rng.random() < 0.5
        for other in self.choices.values():
            if other.message is choice.message and (whole or other is choice) and other.reason is None:
                other.aborted = True
        self._receive(self.core.abort(choice.message.request_id, None if whole else choice.index))
        assert choice.reason is FinishReason.ABORT, "the abort had no effect"
        assert not self.core.abort(choice.message.request_id, choice.index), "aborted twice"
        assert not self.core.abort("nobody")

    def _step(self) -> None:
        before, in_flight = self.runner.num_steps, self.core._flight is not None
        encodes = bool(self.core._pictures)
        events = self.core.step()
        events = [*self.delivered, *events]
        self.delivered.clear()
        self._receive(events)
        # A loop that believes a stalled engine busy would spin; the reverse would sleep for ever.
        tried = in_flight or encodes or self.runner.num_steps > before or any(isinstance(e, TokenEvent) for e in events)
        assert self.core.stalled == (not tried)
        if self.core.stalled:
            assert any(self._is_live(r) for _, _, r in self.pixels_due), (
                "nothing can run, and nobody was asked for anything"
            )
            self.met["stalled"] += 1

    def _is_live(self, request_id: str) -> bool:
        return any(c.reason is None for (r, _), c in self.choices.items() if r == request_id)

    def _receive(self, events: Sequence[Any]) -> None:
        for event in events:
            self.trace.update(repr(event).encode())
            if isinstance(event, NeedPixels):
                self.met["pixels asked for"] += 1
                assert event.digests
                assert self._is_live(event.request_id), "a question to a client that is gone"
                for digest in event.digests:
                    due = self.tick + 1 + self.rng.randint(0, self.work.pixel_delay)
                    self.pixels_due.append((due, digest, event.request_id))
            else:
                self._receive_tokens(event)

    def _receive_tokens(self, event: TokenEvent) -> None:
        choice = self.choices[event.request_id, event.index]
        assert choice.reason is None, "an event after the end"
        choice.tokens += event.token_ids
        choice.reason = reason = event.finish_reason
        assert choice.tokens == choice.expected[: len(choice.tokens)], "another answer than alone"
        if event.num_cached_tokens:
            self.met["prefix hit"] += 1
            assert event.num_cached_tokens < len(choice.message.input_ids) // 4
        if reason is FinishReason.ABORT:
            assert choice.aborted, "aborted by nobody"
        elif reason is FinishReason.ERROR:
            # A fault that passes ends nobody, and a lasting one only the request that brings it.
            poisoned = (event.request_id, event.index) in self.runner.poisoned
            bad = any(image.digest in self.ever_bad for image in choice.message.images)
            where = (event.error or "").split()[-1]
            assert bad if where == "encode" else poisoned and where in ("forward", "sample"), event.error
            self.met[f"error in {(event.error or '').split()[-1]}"] += 1
        elif reason is FinishReason.TIMEOUT:
            assert choice.start_by < self.now, "it could still have waited"
            self.met["waited too long"] += 1
        elif reason is not None:
            assert choice.tokens == choice.expected, "it ended early"
            last = choice.tokens[-1]
            stops = {*choice.message.sampling.stop_token_ids, *(() if choice.message.sampling.ignore_eos else (EOS,))}
            assert (reason is FinishReason.STOP) == (last in stops)
            assert event.stop_token_id == (last if last in stops else None)

    # -- the books -----------------------------------------------------------------------------------------------------

    def _check_step(self) -> None:
        scheduler, radix = self.scheduler, self.radix
        tree = radix.pages() if radix is not None else []
        own = [page for r in scheduler.running for page in r.pages[r.num_tree_pages :]]
        owners = Counter(tree) + Counter(own)
        assert not [page for page, n in owners.items() if n > 1], "a page with two owners"
        assert self.pool.num_free + len(tree) + len(own) == self.pool.num_total, "a page without an owner"
        assert self.core.snapshot().pages_lost == 0
        self.pool.check_integrity()
        self.vision_cache.check_integrity()
        if radix is not None:
            radix.check_integrity()
            in_use = {page for r in scheduler.running for page in r.pages[: r.num_tree_pages]}
            assert in_use <= set(tree), "a request uses a page that the tree gave away"
            assert radix.num_locked == len(in_use), "locked pages are not those in use"
        assert not any(r.pages or r.pinned or r.node for r in scheduler.waiting), "a waiting request holds something"
        pinned = {digest for r in scheduler.running for digest in r.pinned}
        assert self.vision_cache.num_pinned == len(pinned), "pins and their holders differ"
        assert len(scheduler.running) <= self.work.max_running
        live = [c for c in self.choices.values() if c.reason is None]
        assert len(live) == len(scheduler.running) + len(scheduler.waiting) == len(self.core._requests)
        wanted = {image.digest for choice in live for image in choice.message.images}
        assert scheduler.pixels.keys() <= wanted, "pixels that nobody wants are kept"
        assert not any(map(self.vision_cache.contains, scheduler.pixels)), "pixels of an encoded picture are kept"
        retracted = [r.num_retractions > 0 for r in scheduler.waiting]
        assert retracted == sorted(retracted, reverse=True), "a newcomer stands before a retracted request"

    def _check_idle(self) -> None:
        self.scheduler.assert_idle()
        self._check_step()
        self.met["retraction"] = self.scheduler.num_retractions
        self.met["picture evicted"] = self.vision_cache.evictions
        self.met["picture reused"] = self.vision_cache.hits
        snapshot = self.core.snapshot()
        assert snapshot.pages_in_use == 0
        assert min(snapshot.aborts_waiting, snapshot.aborts_prefill, snapshot.aborts_decode) >= 0
        assert snapshot.finished + snapshot.aborts == sum(c.reason is not None for c in self.choices.values())
