"""Page keys, and the prefix cache against a dictionary of prefixes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sightline.cache.page_pool import PagePool
from sightline.cache.radix import InsertResult, Node, RadixCache, page_keys
from sightline.types import ImageRef
from tests.cache.depth import DEPTH, deep

PAD = 7


def image(name: int, offset: int, num_tokens: int) -> ImageRef:
    return ImageRef(digest=bytes([name]) * 32, offset=offset, num_tokens=num_tokens, grid=(1, 1, num_tokens))


def ids(*values: int) -> np.ndarray:
    return np.asarray(values, dtype=np.int32)


# -- keys ------------------------------------------------------------------------------------------------------------------


def test_only_full_pages_have_keys():
    assert page_keys(ids(), [], 4) == []
    assert page_keys(ids(1, 2, 3), [], 4) == []
    keys = page_keys(ids(1, 2, 3, 4, 5, 6, 7, 8, 9), [], 4)
    assert keys == [ids(1, 2, 3, 4).tobytes(), ids(5, 6, 7, 8).tobytes()]


def test_pictures_are_told_apart_by_content_only_where_they_lie():
    tokens = ids(1, 2, 3, PAD, PAD, PAD, PAD, PAD, PAD, 4, 5, 6, 1, 2, 3, 4)
    one = page_keys(tokens, [image(1, 3, 6)], 4)
    two = page_keys(tokens, [image(2, 3, 6)], 4)
    assert [a == b for a, b in zip(one, two, strict=True)] == [False, False, False, True]
    assert one[3] == page_keys(ids(1, 2, 3, 4), [], 4)[0]


def test_the_place_inside_a_picture_matters():
    tokens = ids(*[PAD] * 12)
    keys = page_keys(tokens, [image(1, 0, 12)], 4)
    assert len(set(keys)) == 3
    # The same placeholders, the same picture, shifted by one.
    assert page_keys(ids(*[PAD] * 4), [image(1, -1, 12)], 4)[0] not in keys
    assert page_keys(ids(*[PAD] * 4), [image(1, -4, 12)], 4)[0] == keys[1]


def test_the_order_of_pictures_matters():
    tokens = ids(*[PAD] * 4)
    assert page_keys(tokens, [image(1, 0, 2), image(2, 2, 2)], 4) != page_keys(
        tokens, [image(2, 0, 2), image(1, 2, 2)], 4
    )


@given(st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_keys_are_equal_exactly_when_what_every_token_sees_is_equal(data: st.DataObject):
    """Against a list of (id, picture, place inside the picture) for every token."""

    def draw() -> tuple[np.ndarray, list[ImageRef], list[tuple]]:
        tokens, images, seen = [], [], []
        for part in data.draw(st.lists(st.integers(0, 4), max_size=6)):
            if part < 2:
                images.append(image(part, len(tokens), 3 + 2 * part))
                seen += [(PAD, part, i) for i in range(3 + 2 * part)]
                tokens += [PAD] * (3 + 2 * part)
            else:
                tokens.append(part)
                seen.append((part, None, 0))
        return ids(*tokens), images, seen

    (ids_a, images_a, seen_a), (ids_b, images_b, seen_b) = draw(), draw()
    keys_a, keys_b = page_keys(ids_a, images_a, 4), page_keys(ids_b, images_b, 4)
    for i, key_a in enumerate(keys_a):
        for j, key_b in enumerate(keys_b):
            same = seen_a[4 * i : 4 * i + 4] == seen_b[4 * j : 4 * j + 4]
            assert (key_a == key_b) == same


# -- the tree --------------------------------------------------------------------------------------------------------------


def tree(num_pages: int = 10) -> tuple[PagePool, RadixCache]:
    pool = PagePool(num_pages + 1)
    return pool, RadixCache(pool, 4)


def add(pool: PagePool, cache: RadixCache, keys: list[bytes], salt: bytes = b"") -> InsertResult:
    pages = pool.alloc(len(keys))
    assert pages is not None
    return cache.insert(salt, keys, pages)


def test_the_longest_prefix_is_found():
    pool, cache = tree()
    node, pages, num_new = add(pool, cache, [b"a", b"b", b"c"])
    assert num_new == 3
    assert cache.match(b"", [b"a", b"b", b"x"]).pages == pages[:2]
    assert cache.match(b"", [b"a", b"b", b"c", b"d"]) == (node, pages)
    assert cache.match(b"", [b"x"]).pages == []
    assert cache.match(b"", []).pages == []
    assert cache.match(b"", [b"b"]).pages == []


def test_tenants_share_nothing():
    pool, cache = tree()
    add(pool, cache, [b"a"], b"one")
    assert cache.match(b"two", [b"a"]).pages == []
    add(pool, cache, [b"a"], b"two")
    assert cache.num_pages == 2
    assert cache.match(b"one", [b"a"]).pages != cache.match(b"two", [b"a"]).pages


def test_a_duplicate_is_freed_and_replaced():
    pool, cache = tree()
    first = add(pool, cache, [b"a", b"b"])
    second = add(pool, cache, [b"a", b"b", b"c"])
    assert second.pages[:2] == first.pages
    assert second.num_new == 1
    assert pool.num_free == 7
    # The tree's own pages given back to it are no duplicates.
    third = cache.insert(b"", [b"a", b"b", b"c"], second.pages)
    assert third == (second.node, second.pages, 0)
    assert pool.num_free == 7
    cache.check_integrity()


def test_a_locked_path_stays():
    pool, cache = tree()
    deep_node, pages, _ = add(pool, cache, [b"a", b"b"])
    add(pool, cache, [b"a", b"b", b"c", b"d"])
    cache.inc_lock(deep_node)
    cache.inc_lock(deep_node)
    assert (cache.num_locked, cache.num_evictable) == (2, 2)
    assert cache.evict(10) == 2
    assert cache.match(b"", [b"a", b"b", b"c"]).pages == pages
    cache.dec_lock(deep_node)
    assert cache.num_evictable == 0
    cache.dec_lock(deep_node)
    with pytest.raises(AssertionError):
        cache.dec_lock(deep_node)
    assert cache.evict(1) == 1
    assert cache.match(b"", [b"a", b"b"]).pages == pages[:1]
    assert cache.reset() == 1
    assert pool.num_free == pool.num_total
    cache.check_integrity()


def test_the_least_recently_used_leaf_goes_first():
    pool, cache = tree()
    for name in (b"a", b"b", b"c"):
        add(pool, cache, [name, name + b"2"])
    cache.match(b"", [b"a", b"a2"])
    assert cache.evict(2) == 2
    assert [len(cache.match(b"", [n, n + b"2"]).pages) for n in (b"a", b"b", b"c")] == [2, 0, 2]
    # A parent goes after its children, and a match of the parent alone does not make a child younger.
    cache.match(b"", [b"a", b"a2"])
    cache.match(b"", [b"c"])
    assert cache.evict(1) == 1
    assert [len(cache.match(b"", [n, n + b"2"]).pages) for n in (b"a", b"b", b"c")] == [2, 0, 1]


def test_a_lock_on_nothing_is_harmless():
    pool, cache = tree()
    empty = cache.match(b"t", [b"a"]).node
    cache.inc_lock(empty)
    full = add(pool, cache, [b"a"], b"t").node
    cache.inc_lock(full)
    cache.dec_lock(empty)
    cache.dec_lock(full)
    assert cache.num_locked == 0
    cache.reset()
    cache.check_integrity()


def test_the_heap_does_not_grow_with_use():
    pool, cache = tree()
    node = add(pool, cache, [b"a", b"b"]).node
    for _ in range(100):
        cache.match(b"", [b"a", b"b"])
        cache.inc_lock(node)
        cache.dec_lock(node)
    assert len(cache._heap) <= cache.num_pages
    cache.check_integrity()


Prefix = tuple[bytes, ...]


class RadixMachine(RuleBasedStateMachine):
    """Requests that match, lock, extend, insert and end, against a dictionary prefix -> (page, time of last use)."""

    NUM_PAGES = 14

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.cache = tree(self.NUM_PAGES)
        self.model: dict[Prefix, list[int]] = {}
        self.time = 0
        # name -> (prefix in the tree, node, pages of the whole prefix, own pages beyond it with their keys)
        self.requests: dict[int, tuple[Prefix, Node, list[int], list[bytes], list[int]]] = {}

    def longest(self, prefix: Prefix) -> Prefix:
        return next(p for n in range(len(prefix), -1, -1) if (p := prefix[:n]) in self.model or n <= 1)

    def touch(self, prefix: Prefix) -> None:
        self.time += 1
        for n in range(2, len(prefix) + 1):
            if prefix[:n] in self.model:
                self.model[prefix[:n]][1] = self.time

    def locked(self) -> Counter[Prefix]:
        return Counter(r[0][:n] for r in self.requests.values() for n in range(2, len(r[0]) + 1))

    # The first element of a prefix is the tenant's salt, so the empty prefix of a tenant has length 1.
    keys = st.lists(st.sampled_from([b"a", b"b"]), max_size=5)
    salts = st.sampled_from([b"s", b"t"])

    @rule(salt=salts, keys=keys)
    def match(self, salt: bytes, keys: list[bytes]) -> None:
        found = self.longest((salt, *keys))
        expected = [self.model[found[:n]][0] for n in range(2, len(found) + 1)]
        assert self.cache.match(salt, keys).pages == expected
        self.touch(found)

    @precondition(lambda self: len(self.requests) < 4)
    @rule(name=st.integers(0, 99), salt=salts, keys=keys)
    def admit(self, name: int, salt: bytes, keys: list[bytes]) -> None:
        if name in self.requests:
            return
        found = self.longest((salt, *keys))
        match = self.cache.match(salt, keys)
        self.touch(found)
        assert len(match.pages) == len(found) - 1
        self.cache.inc_lock(match.node)
        rest = keys[len(match.pages) :]
        missing = len(rest) - self.pool.num_free
        if missing > 0:
            self.evict(missing)
        pages = self.pool.alloc(len(rest))
        if pages is None:
            self.cache.dec_lock(match.node)
            return
        self.requests[name] = (found, match.node, match.pages, rest, pages)
        # The admitted one's lock protected its path from the eviction above.
        assert all(p in self.model for p in self.locked())

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), key=st.sampled_from([b"a", b"b"]))
    def extend(self, data: st.DataObject, key: bytes) -> None:
        name = data.draw(st.sampled_from(sorted(self.requests)))
        pages = self.pool.alloc(1)
        if pages is not None:
            prefix, node, shared, keys, own = self.requests[name]
            self.requests[name] = (prefix, node, shared, [*keys, key], own + pages)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), count=st.integers(0, 5))
    def share(self, data: st.DataObject, count: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.requests)))
        prefix, node, shared, keys, own = self.requests[name]
        count = min(count, len(keys))
        whole = (*prefix, *keys[:count])
        result = self.cache.insert(prefix[0], list(whole[1:]), shared + own[:count])
        num_new = 0
        for n in range(2, len(whole) + 1):
            if whole[:n] not in self.model:
                self.model[whole[:n]] = [own[n - 2 - len(shared)], 0]
                num_new += 1
        self.touch(whole)
        assert result.num_new == num_new
        assert result.pages == [self.model[whole[:n]][0] for n in range(2, len(whole) + 1)]
        self.cache.inc_lock(result.node)
        self.cache.dec_lock(node)
        self.requests[name] = (whole, result.node, result.pages, keys[count:], own[count:])

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.requests)))
        _, node, _, _, own = self.requests.pop(name)
        self.pool.free(own)
        self.cache.dec_lock(node)

    @rule(n=st.integers(0, 6))
    def evict(self, n: int) -> None:
        locked = self.locked()
        node_locks = self.cache.num_locked
        evictable = self.cache.num_evictable
        before = set(self.cache.pages())
        freed = self.cache.evict(n)
        assert freed == min(n, evictable)
        assert node_locks == self.cache.num_locked
        gone = before - set(self.cache.pages())
        assert len(gone) == freed
        # Freed pages were unlocked leaves, no older leaf was left over.
        for _ in range(freed):
            leaves = [
                p for p in self.model if p not in locked and not any(q[: len(p)] == p and q != p for q in self.model)
            ]
            oldest = min(self.model[p][1] for p in leaves)
            victim = [p for p in leaves if self.model[p][1] == oldest and self.model[p][0] in gone]
            assert victim, "a more recently used page was evicted instead"
            del self.model[victim[0]]
        assert gone.isdisjoint(page for page, _ in self.model.values())

    @precondition(lambda self: not self.requests)
    @rule()
    def flush(self) -> None:
        self.cache.reset()
        self.model.clear()
        assert self.pool.num_free == self.pool.num_total

    @invariant()
    def every_page_has_one_owner(self) -> None:
        self.cache.check_integrity()
        self.pool.check_integrity()
        tree_pages = self.cache.pages()
        assert sorted(tree_pages) == sorted(page for page, _ in self.model.values())
        held = [page for *_, own in self.requests.values() for page in own]
        free = [page for page in range(1, self.NUM_PAGES + 1) if self.pool.is_free(page)]
        assert sorted(tree_pages + held + free) == list(range(1, self.NUM_PAGES + 1))
        assert self.cache.num_locked == len(self.locked())


TestRadixMachine = RadixMachine.TestCase
TestRadixMachine.settings = deep(200, 60)
TestRadixMachine.pytestmark = [pytest.mark.check(21, cases=DEPTH * 200 * 60)]
