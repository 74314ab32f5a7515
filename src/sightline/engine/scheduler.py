"""What runs in the next step. Plain Python over pages and digests: it knows no model family, no tensor and no clock.

One step mixes decode rows (one token each) with prefill chunks, under one token budget. Decode rows come first, then
chunks of admitted prompts in order of admission, then new admissions in order of arrival. A prompt gets all its pages at
admission, so only decoding can run out of pages; then the prefix cache is evicted and after that the newest request is
retracted: it gives its pages back, keeps its tokens, and prefills them again later.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from operator import attrgetter
from typing import NamedTuple

from sightline.cache.page_pool import PagePool
from sightline.cache.radix import RadixCache, page_keys
from sightline.cache.vision_cache import VisionCache
from sightline.engine.pictures import beside_text, in_text
from sightline.engine.request import Request
from sightline.types import FinishReason, ImageRef

# In how many steps that decode the prompts that wait are to be computed.
_MANY_STEPS = 16
# Prompts whose pictures may be encoded before their turn.
_AHEAD = 8


class ScheduledRow(NamedTuple):
    """Tokens start .. start + q_len of a request; `sample` when they reach its newest token."""

    request: Request
    start: int
    q_len: int
    sample: bool


@dataclass(slots=True)
class Batch:
    """One step. Decode rows stand first in `rows`; `encode` lists the pictures to be put into the vision cache, and `needed` the
    digests of those without which this step cannot run."""

    rows: list[ScheduledRow] = field(default_factory=list)
    encode: list[ImageRef] = field(default_factory=list)
    needed: set[bytes] = field(default_factory=set)
    num_decode: int = 0
    num_new_requests: int = 0
    num_new_tokens: int = 0
    num_cached_tokens: int = 0
    num_queried_tokens: int = 0


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """max_step_tokens: rows of one step; max_mixed_tokens: of one that also decodes, so that those who wait for their next
    token never wait long (None: the same); min_mixed_tokens: what such a step may have however few prompts wait (None: the same).
    max_encode_tokens: features encoded in one step (one picture always may).

    image_token_bytes: bytes of one feature, for the vision cache's budget. num_features: how many a picture has; one for
    each placeholder unless said otherwise. cross_attention: pictures stand beside the text, see `engine.pictures`.
    """

    page_size: int
    max_step_tokens: int
    max_running: int
    max_encode_tokens: int
    image_token_bytes: int
    max_mixed_tokens: int | None = None
    min_mixed_tokens: int | None = None
    num_features: Callable[[ImageRef], int] = attrgetter("num_tokens")
    cross_attention: bool = False


class Scheduler:
    """Owns the life of requests between `add` and `finish`, and every page and pin they hold.

    encode_beside: while others decode, a prompt waits for its pictures, which are encoded in slices between the steps, those of
    the next prompts ahead of their time.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: PagePool,
        radix: RadixCache | None,
        vision_cache: VisionCache,
        encode_beside: bool = False,
    ) -> None:
        self.config = config
        self.pool = pool
        self.radix = radix
        self.vision_cache = vision_cache
        self.encode_beside = encode_beside
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.pixels: dict[bytes, object] = {}
        self.never_ahead: set[bytes] = set()
        self.pixel_requests: list[tuple[Request, list[bytes]]] = []
        self.num_retractions = 0
        self.num_recomputed = 0
        self._wanted: Counter[bytes] = Counter()
        self._needs = beside_text if config.cross_attention else in_text

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    # -- life of a request ---------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        self.waiting.append(request)
        self._wanted.update(image.digest for image in request.images)

    def wants(self, digest: bytes) -> bool:
        """Whether a request that lives has this picture."""
        return digest in self._wanted

    def put_pixels(self, digest: bytes, pixels: object) -> None:
        """Keep a picture's pixels until it is encoded or nobody wants it any more."""
        if self.wants(digest) and not self.vision_cache.contains(digest):
            self.pixels[digest] = pixels
        for request in (*self.waiting, *self.running):
            request.asked_pixels.discard(digest)

    def not_encoded(self, digest: bytes, failed: bool) -> None:
        """A picture whose place is reserved has no features. One that failed is not tried again before its turn."""
        self.vision_cache.discard_unfilled(digest)
        if failed and self.wants(digest):
            self.never_ahead.add(digest)

    def flush(self) -> None:
        """Forget cached prefixes and encoded pictures that nobody uses now."""
        if self.radix is not None:
            self.radix.reset()
        self.vision_cache.clear()

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Take a request out, whatever its state; its full pages stay in the prefix cache."""
        request.finish_reason = reason
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self._release(request)
        for image in request.images:
            self._wanted[image.digest] -= 1
            if not self._wanted[image.digest]:
                del self._wanted[image.digest]
                self.pixels.pop(image.digest, None)
                self.never_ahead.discard(image.digest)

    def retract(self, request: Request) -> None:
        """Take a request's pages away and put it in front of the queue."""
        self.running.remove(request)
        self._release(request)
        request.num_retractions += 1
        self.num_retractions += 1
        self.num_recomputed += request.num_computed
        self.waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        for digest in request.pinned:
            self.vision_cache.unpin(digest)
        request.pinned.clear()
        if request.pages:
            self._share_pages(request)
            self.pool.free(request.pages[request.num_tree_pages :])
            if self.radix is not None and request.node is not None:
                self.radix.dec_lock(request.node)
        request.pages = []
        request.num_tree_pages = 0
        request.node = None
        request.num_computed = 0

    def _share_pages(self, request: Request) -> None:
        """Hand the request's full pages to the prefix cache, which may swap them for equal ones it already has."""
        num_full = request.num_computed // self.config.page_size
        if self.radix is None or num_full <= request.num_tree_pages:
            return
        keys = self._keys(request, num_full)
        result = self.radix.insert(request.cache_salt, keys, request.pages[:num_full])
        self.radix.inc_lock(result.node)
        if request.node is not None:
            self.radix.dec_lock(request.node)
        request.node = result.node
        request.pages[:num_full] = result.pages
        request.num_tree_pages = num_full

    def _keys(self, request: Request, num_pages: int) -> list[bytes]:
        size = self.config.page_size
        if request.prompt_keys is None:
            request.prompt_keys = page_keys(request.prompt_ids, request.images, size)
        if num_pages <= len(request.prompt_keys):
            return request.prompt_keys[:num_pages]
        start = len(request.prompt_keys) * size
        return request.prompt_keys + page_keys_tail(request, start, num_pages * size, size)

    # -- one step ------------------------------------------------------------------------------------------------------

    def schedule(self, prompt_share: float = 1.0) -> Batch | None:
        """The next step, or None when nothing can run. Pages for every row of it are allocated.

        prompt_share: if anybody decodes, of the rows that such a step may have; with 0 nobody does anything else.
        """
        batch = Batch()
        budget = self.config.max_step_tokens
        prefills = {r for r in self.running if r.in_prefill or self._lacks_features(r)}
        for request in list(self.running):
            # One without pages was retracted for an earlier row of this very step.
            if request in prefills or request.all_sampled or not request.pages or budget == 0:
                continue
            if self._grow(request):
                batch.rows.append(ScheduledRow(request, request.num_computed, 1, True))
                budget -= 1
        batch.num_decode = len(batch.rows)
        if batch.rows and not prompt_share:
            return batch
        if batch.rows and self.config.max_mixed_tokens is not None:
            rows = int(self._mixed_tokens(self.config.max_mixed_tokens) * prompt_share)
            budget = min(budget, max(rows - batch.num_decode, 0))
        for request in self.running:
            if request in prefills and budget > 0:
                budget -= self._schedule_chunk(batch, request, budget)
        self._admit(batch, budget)
        if self.encode_beside and batch.num_decode:
            self._encode_ahead(batch)
        return batch if batch.rows else None

    def _mixed_tokens(self, most: int) -> int:
        """Rows of a step that decodes: more, the more tokens of prompts wait, so that few prompts disturb little and many do not wait
        long. In steps of the sizes that CUDA graphs have."""
        least = self.config.min_mixed_tokens
        if least is None or least == most:
            return most
        waiting = 0
        for request in chain(self.running, self.waiting):
            waiting += request.remaining if request.in_prefill else 0
            if waiting >= _MANY_STEPS * most:
                return most
        return max(least, waiting // _MANY_STEPS // 256 * 256)

    def _lacks_features(self, request: Request) -> bool:
        """Beside the text, decoding needs pictures too: of a request that came back from a retraction with all tokens but
        the newest in the prefix cache they may not be encoded yet."""
        if not self.config.cross_attention or not request.images:
            return False
        groups = self._needs(request.images, request.num_computed, request.num_computed + 1)
        digests = {image.digest for group in groups for image in group}
        return not all(d in request.pinned and self.vision_cache.is_filled(d) for d in digests)

    def _grow(self, request: Request) -> bool:
        """Make room for one more token, retracting the newest requests if need be; False when it was retracted itself."""
        if request.num_computed < len(request.pages) * self.config.page_size:
            return True
        while True:
            pages = self._allocate(1)
            if pages is not None:
                request.pages += pages
                return True
            victim = self.running[-1]
            self.retract(victim)
            if victim is request:
                return False

    def _allocate(self, num_pages: int) -> list[int] | None:
        short = num_pages - self.pool.num_free
        if short > 0 and self.radix is not None:
            self.radix.evict(short)
        return self.pool.alloc(num_pages)

    def _admit(self, batch: Batch, budget: int) -> None:
        """Admit waiting requests while tokens, places and pages last; those that wait for pixels let others pass."""
        for request in list(self.waiting):
            if budget <= 0 or len(self.running) >= self.config.max_running:
                return
            if self._held_back(request):
                continue
            if not self._take_pages(request):
                return
            self.waiting.remove(request)
            self.running.append(request)
            batch.num_new_requests += 1
            batch.num_cached_tokens += request.num_computed
            batch.num_queried_tokens += request.num_tokens
            if not request.output_ids:
                request.num_cached = request.num_computed
            budget -= self._schedule_chunk(batch, request, budget)

    def _held_back(self, request: Request) -> bool:
        if request.num_in_flight or (request.matcher is not None and not request.matcher.started):
            return True
        leader = request.leader
        if leader is not None and self.radix is not None:
            if (
                not leader.finished
                and leader.num_computed < leader.prompt_len
                and leader.num_tokens == leader.prompt_len
            ):
                return True
            request.leader = None
        missing = self.missing_pixels(request)
        self._ask_pixels(request, missing)
        return bool(missing)

    def _ask_pixels(self, request: Request, digests: list[bytes]) -> None:
        new = [d for d in dict.fromkeys(digests) if d not in request.asked_pixels]
        if new:
            request.asked_pixels.update(new)
            self.pixel_requests.append((request, new))

    def missing_pixels(self, request: Request) -> list[bytes]:
        """Digests whose features the request will need and that nobody can make without pixels."""
        absent = {i.digest for i in request.images} - self.pixels.keys()
        absent = {digest for digest in absent if not self.vision_cache.contains(digest)}
        if not absent:
            return []
        cached = self._num_cached_pages(request) * self.config.page_size if self.radix is not None else 0
        needed = self._needs(request.images, cached, request.num_tokens)
        return [image.digest for group in needed for image in group if image.digest in absent]

    def _num_cached_pages(self, request: Request) -> int:
        assert self.radix is not None
        usable = request.num_reusable // self.config.page_size
        return len(self.radix.match(request.cache_salt, self._keys(request, usable)).pages)

    def _take_pages(self, request: Request) -> bool:
        """Lock the cached prefix and allocate the rest; False (and nothing taken) when memory is short."""
        size = self.config.page_size
        total = -(-request.num_tokens // size)
        if self.radix is not None:
            match = self.radix.match(request.cache_salt, self._keys(request, request.num_reusable // size))
            self.radix.inc_lock(match.node)
            cached, node = list(match.pages), match.node
        else:
            cached, node = [], None
        needed = total - len(cached)
        # One page for each running request is kept back, or the newcomer would soon be retracted again.
        reserve = len(self.running)
        available = self.pool.num_free + (self.radix.num_evictable if self.radix is not None else 0)
        pages = self._allocate(needed) if available >= needed + reserve else None
        if pages is None:
            if self.radix is not None and node is not None:
                self.radix.dec_lock(node)
            return False
        request.pages = cached + pages
        request.num_tree_pages = len(cached)
        request.node = node
        request.num_computed = len(cached) * size
        return True

    def _schedule_chunk(self, batch: Batch, request: Request, budget: int) -> int:
        """Append the next chunk of a prefill, cut where a picture cannot be had yet; returns its tokens."""
        start = request.num_computed
        end = start + min(budget, request.remaining)
        for group in self._needs(request.images, start, end):
            if not (self._hold_features(batch, request, group) and self._may_use(batch, group)):
                end = max(start, group[0].offset)
                break
            batch.needed.update(i.digest for i in group if not self.vision_cache.is_filled(i.digest))
        q_len = end - start
        if q_len == 0:
            return 0
        batch.rows.append(ScheduledRow(request, start, q_len, end == request.num_tokens))
        batch.num_new_tokens += q_len
        return q_len

    def _hold_features(self, batch: Batch, request: Request, group: Sequence[ImageRef]) -> bool:
        """Pin the features of pictures for this request, planning the encoding of those that nobody has.

        All or nothing: False when not all can be had in this step.
        """
        wanted = {image.digest: image for image in group if image.digest not in request.pinned}
        if not wanted:
            return True
        absent = [image for digest, image in wanted.items() if not self.vision_cache.contains(digest)]
        together = {image.digest for image in group}
        if absent and not self._can_encode(batch, request, absent, together):
            return False
        for digest in wanted:
            if self.vision_cache.contains(digest):
                self.vision_cache.pin(digest)
        for image in absent:
            reserved = self.vision_cache.reserve(image.digest, self._feature_bytes(image), together)
            assert reserved, "room for a picture that was there is gone"
            self.vision_cache.pin(image.digest)
        batch.encode += absent
        request.pinned.update(wanted)
        return True

    def _may_use(self, batch: Batch, group: Sequence[ImageRef]) -> bool:
        waits = self.encode_beside and batch.num_decode
        return not waits or all(self.vision_cache.is_filled(image.digest) for image in group)

    def _can_encode(self, batch: Batch, request: Request, absent: Sequence[ImageRef], group: Collection[bytes]) -> bool:
        """Whether pixels, this step's encoder budget and the vision cache allow to encode `absent`."""
        missing = [image.digest for image in absent if image.digest not in self.pixels]
        if missing:
            self._ask_pixels(request, missing)
            return False
        return self._has_room(batch, absent, group)

    def _has_room(self, batch: Batch, absent: Sequence[ImageRef], group: Collection[bytes], guest: bool = True) -> bool:
        """As far as this step's encoder budget and the vision cache go. group, guest: see `VisionCache.can_fit`."""
        num_features = self.config.num_features
        planned = sum(map(num_features, batch.encode))
        if planned and planned + sum(map(num_features, absent)) > self.config.max_encode_tokens:
            return False
        return self.vision_cache.can_fit(sum(map(self._feature_bytes, absent)), group, guest)

    def _encode_ahead(self, batch: Batch) -> None:
        """Plan the encoding of pictures that prompts need in the steps to come, soonest first: two steps' worth of features, and one
        picture always. They are not pinned, so that nobody waits for a picture whose time has not come."""
        left = 2 * self.config.max_encode_tokens
        soon: set[bytes] = set()
        for group in self._to_come():
            soon.update(image.digest for image in group)
            for image in group:
                if self.vision_cache.is_filled(image.digest):
                    # what makes room for the next must be older
                    self.vision_cache.get(image.digest)
                elif not self.vision_cache.contains(image.digest) and not self._plan_ahead(batch, image, soon):
                    return
            left -= sum(map(self.config.num_features, group))
            if left <= 0:
                return

    def _to_come(self) -> Iterator[Sequence[ImageRef]]:
        """Pictures that the next prompts need and do not hold yet, soonest first."""
        prompts = (r for r in chain(self.running, self.waiting) if r.images and r.in_prefill)
        for request in islice(prompts, _AHEAD):
            if not request.pages and self._held_back(request):
                continue
            for group in self._needs(request.images, self._first_uncached(request), request.num_tokens):
                if not all(image.digest in request.pinned for image in group):
                    yield group

    def _first_uncached(self, request: Request) -> int:
        """The first token that has no keys and values yet; of a waiting one, whose pictures are encoded, the first of all."""
        if request.pages or self.radix is None or all(self.vision_cache.contains(i.digest) for i in request.images):
            return request.num_computed
        return self._num_cached_pages(request) * self.config.page_size

    def _plan_ahead(self, batch: Batch, image: ImageRef, soon: Collection[bytes]) -> bool:
        """Reserve an absent picture's place and plan its encoding, if no picture of `soon` has to go for it."""
        if image.digest not in self.pixels or image.digest in self.never_ahead:
            return False
        if not self._has_room(batch, [image], soon, guest=False):
            return False
        self.vision_cache.reserve(image.digest, self._feature_bytes(image))
        batch.encode.append(image)
        return True

    def _feature_bytes(self, image: ImageRef) -> int:
        return self.config.num_features(image) * self.config.image_token_bytes

    def advance(self, row: ScheduledRow) -> None:
        """Account for a computed row: drop pins of pictures that are behind, share full pages after prefill."""
        request = row.request
        was_prefill = request.in_prefill
        request.num_computed = row.start + row.q_len
        if request.pinned:
            # Not the pictures further ahead: a prompt A B A must let go of A, or B may never find room.
            # A group that begins here is not kept either: holding one of its pictures while waiting for another could
            # wait for a request that does the same.
            groups = self._needs(request.images, request.num_computed, request.num_computed + 1)
            keep = {i.digest for group in groups if group[0].offset < request.num_computed for i in group}
            for digest in request.pinned - keep:
                self.vision_cache.unpin(digest)
            request.pinned &= keep
        if was_prefill:
            self._share_pages(request)

    def assert_idle(self) -> None:
        """free + cached + in use == total, with nothing in use and nothing locked or pinned, when no request lives."""
        assert self.idle
        cached = self.radix.num_pages if self.radix is not None else 0
        assert self.pool.num_free + cached == self.pool.num_total, (
            f"page leak: {self.pool.num_free} free + {cached} cached != {self.pool.num_total}"
        )
        assert self.radix is None or self.radix.num_locked == 0, "a prefix is locked by nobody"
        assert self.vision_cache.num_pinned == 0, "a picture is pinned by nobody"


def page_keys_tail(request: Request, start: int, end: int, page_size: int) -> list[bytes]:
    """Keys of the full pages start..end; the first may straddle the prompt's end, later ones hold generated ids."""
    shifted = tuple(
        ImageRef(digest=i.digest, offset=i.offset - start, num_tokens=i.num_tokens, grid=i.grid)
        for i in request.images_in(start, end)
    )
    return page_keys(request.ids(start, end), shifted, page_size)
