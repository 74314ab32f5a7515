"""Features under a byte budget."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sightline.cache.vision_cache import VisionCache
from tests.cache.depth import DEPTH, deep

NAMES = [bytes([i]) * 32 for i in range(8)]
A, B, C = NAMES[:3]


def put(cache: VisionCache, digest: bytes, nbytes: int) -> bool:
    if not cache.reserve(digest, nbytes):
        return False
    cache.fill(digest, ("features", digest))
    return True


def test_the_least_recently_used_goes_first():
    cache = VisionCache(100)
    assert put(cache, A, 40)
    assert put(cache, B, 40)
    assert cache.get(A) == ("features", A)
    assert put(cache, C, 40)
    assert [cache.contains(d) for d in (A, B, C)] == [True, False, True]
    assert (cache.num_bytes, cache.evictions, cache.misses) == (80, 1, 3)


def test_pinned_and_unfilled_entries_stay():
    cache = VisionCache(100)
    put(cache, A, 60)
    cache.pin(A)
    assert not cache.reserve(B, 60)
    assert cache.reserve(B, 40)
    assert not cache.can_fit(1)
    with pytest.raises(KeyError):
        cache.get(B)
    cache.unpin(A)
    assert cache.can_fit(60)
    assert not cache.can_fit(61)
    cache.fill(B, "b")
    assert cache.can_fit(100)


def test_an_item_larger_than_the_budget_is_a_guest():
    cache = VisionCache(100)
    put(cache, A, 10)
    cache.pin(A)
    assert not cache.reserve(B, 500)
    cache.unpin(A)
    assert cache.reserve(B, 500)
    assert not cache.contains(A)
    cache.pin(B)
    cache.fill(B, "b")
    assert not cache.reserve(C, 1)
    cache.unpin(B)
    assert not cache.contains(B)
    assert cache.num_bytes == 0


def test_a_guest_whose_user_left_while_it_was_encoded_goes_when_it_is_filled():
    cache = VisionCache(100)
    assert cache.reserve(B, 500)
    cache.pin(B)
    cache.unpin(B)
    assert cache.contains(B)
    cache.fill(B, "b")
    assert not cache.contains(B)


def test_a_group_larger_than_the_budget_is_a_guest_together():
    cache = VisionCache(100)
    together = {A, B}
    assert cache.reserve(C, 30)
    assert cache.can_fit(70, together)
    assert not cache.can_fit(80, together)
    cache.fill(C, "c")
    assert cache.reserve(A, 80, together)
    cache.pin(A)
    assert not cache.contains(C)
    assert not cache.can_fit(80)
    assert cache.reserve(B, 80, together)
    cache.pin(B)
    cache.check_integrity()
    cache.fill(A, "a")
    cache.fill(B, "b")
    cache.unpin(A)
    assert (cache.contains(A), cache.num_bytes) == (False, 80)
    cache.unpin(B)
    assert cache.contains(B)


def test_what_is_no_guest_displaces_none_of_its_group_and_nothing_larger_than_all_room():
    cache = VisionCache(100)
    put(cache, A, 60)
    put(cache, B, 30)
    assert cache.can_fit(40, {B}, guest=False)
    assert not cache.can_fit(41, {A}, guest=False)
    assert cache.can_fit(41, {A})
    assert not cache.can_fit(101, guest=False)
    assert cache.can_fit(101)


def test_room_for_a_group_counts_those_of_it_that_are_here():
    cache = VisionCache(100)
    put(cache, C, 10)
    cache.pin(C)
    put(cache, A, 60)
    assert cache.can_fit(40)
    assert not cache.can_fit(40, {A, B})
    assert cache.can_fit(30, {A, B})


def test_a_hit_is_a_use_that_needed_no_encoder():
    cache = VisionCache(100)
    put(cache, A, 10)
    cache.pin(A)
    assert (cache.hits, cache.misses) == (0, 1)
    cache.pin(A)
    cache.unpin(A)
    cache.unpin(A)
    cache.pin(A)
    assert (cache.hits, cache.misses) == (2, 1)


def test_a_pin_is_a_use():
    cache = VisionCache(100)
    put(cache, A, 50)
    put(cache, B, 50)
    cache.pin(A)
    cache.unpin(A)
    put(cache, C, 50)
    assert [cache.contains(d) for d in (A, B, C)] == [True, False, True]


def test_a_failed_encoding_gives_its_place_back():
    cache = VisionCache(100)
    cache.reserve(A, 70)
    cache.pin(A)
    with pytest.raises(AssertionError):
        cache.discard_unfilled(A)
    cache.unpin(A)
    cache.discard_unfilled(A)
    cache.discard_unfilled(A)
    assert (cache.num_bytes, len(cache)) == (0, 0)
    put(cache, A, 70)
    cache.discard_unfilled(A)
    assert cache.contains(A)


def test_misuse_raises():
    cache = VisionCache(100)
    put(cache, A, 10)
    with pytest.raises(AssertionError):
        cache.unpin(A)
    with pytest.raises(AssertionError):
        cache.reserve(A, 10)
    with pytest.raises(AssertionError):
        cache.fill(A, "again")
    with pytest.raises(KeyError):
        cache.get(B)
    assert cache.clear() == 1
    assert len(cache) == 0


class VisionMachine(RuleBasedStateMachine):
    """Against a list in order of use."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = VisionCache(100)
        self.order: list[bytes] = []
        self.sizes: dict[bytes, int] = {}
        self.pins: dict[bytes, int] = {}
        self.filled: set[bytes] = set()

    def stays(self, digest: bytes) -> bool:
        return self.pins[digest] > 0 or digest not in self.filled

    def forget(self, digest: bytes) -> None:
        self.order.remove(digest)
        self.filled.discard(digest)
        del self.sizes[digest], self.pins[digest]

    def shrink(self, nbytes: int) -> None:
        for digest in list(self.order):
            if sum(self.sizes.values()) <= nbytes:
                return
            if not self.stays(digest):
                self.forget(digest)

    @rule(digest=st.sampled_from(NAMES), nbytes=st.sampled_from([0, 1, 30, 50, 100, 150]))
    def reserve(self, digest: bytes, nbytes: int) -> None:
        if digest in self.sizes:
            return
        kept = [self.sizes[d] for d in self.order if self.stays(d)]
        expected = sum(kept) + nbytes <= 100 or not kept
        assert self.cache.can_fit(nbytes) == expected
        assert self.cache.reserve(digest, nbytes) == expected
        if expected:
            self.shrink(100 - nbytes)
            self.order.append(digest)
            self.sizes[digest], self.pins[digest] = nbytes, 0

    @precondition(lambda self: len(self.filled) < len(self.sizes))
    @rule(data=st.data(), fail=st.booleans())
    def fill_or_discard(self, data: st.DataObject, fail: bool) -> None:
        digest = data.draw(st.sampled_from(sorted(set(self.sizes) - self.filled)))
        if fail and not self.pins[digest]:
            self.cache.discard_unfilled(digest)
            self.forget(digest)
        else:
            self.cache.fill(digest, ("features", digest))
            self.filled.add(digest)
            self.shrink(100)

    @precondition(lambda self: self.filled)
    @rule(data=st.data())
    def get(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.filled)))
        assert self.cache.get(digest) == ("features", digest)
        self.order.remove(digest)
        self.order.append(digest)

    @precondition(lambda self: self.sizes)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.sizes)))
        self.cache.pin(digest)
        self.pins[digest] += 1
        self.order.remove(digest)
        self.order.append(digest)

    @precondition(lambda self: any(self.pins.values()))
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(d for d, n in self.pins.items() if n)))
        self.cache.unpin(digest)
        self.pins[digest] -= 1
        self.shrink(100)

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.cache.check_integrity()
        assert [d for d in NAMES if self.cache.contains(d)] == sorted(self.sizes)
        assert list(self.cache._entries) == self.order
        assert self.cache.num_bytes == sum(self.sizes.values())
        assert self.cache.num_pinned == sum(n > 0 for n in self.pins.values())


TestVisionMachine = VisionMachine.TestCase
TestVisionMachine.settings = deep(80)
TestVisionMachine.pytestmark = [pytest.mark.check(21, cases=DEPTH * 80 * 50)]
