"""The prefix cache: finished K/V pages in a tree keyed by their exact content.

One node is one full page. A child is found by the page's token ids and by the pictures whose placeholders lie in it;
nothing is hashed, so two different pages never share a key. Roots are kept per tenant salt.
"""

from __future__ import annotations

import heapq
import itertools
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sightline.cache.page_pool import PagePool
from sightline.types import ImageRef

PageKey = bytes

_SPAN = struct.Struct("<III")


def page_keys(input_ids: np.ndarray, images: Sequence[ImageRef], page_size: int) -> list[PageKey]:
    """Keys of the full pages of `input_ids`; a last, partial page has none.

    A key is the page's ids (int32) and, for each picture that overlaps the page, its digest and where the overlap
    lies: (first position in the page, first placeholder of the picture, number of placeholders). An image's offset may
    be negative when it began before `input_ids`.
    """
    num_pages = len(input_ids) // page_size
    data = np.ascontiguousarray(input_ids[: num_pages * page_size], dtype="<i4").tobytes()
    width = 4 * page_size
    keys = [data[i : i + width] for i in range(0, num_pages * width, width)]
    for image in images:
        assert len(image.digest) == 32, "a digest of another length would make keys ambiguous"
        first, last = max(image.offset, 0), min(image.offset + image.num_tokens, num_pages * page_size)
        for page in range(first // page_size, -(-last // page_size) if last > first else 0):
            start = max(first, page * page_size)
            count = min(last, (page + 1) * page_size) - start
            keys[page] += image.digest + _SPAN.pack(start - page * page_size, start - image.offset, count)
    return keys


class Node:
    """One cached page. Opaque to callers, who keep it only to lock and unlock it.

    refs: locks on this very node plus children with refs > 0; so a node is in use exactly when refs > 0, and locking
    below a node in use costs nothing above it. A root has page 0, and its tenant's salt as key.
    """

    __slots__ = ("children", "in_heap", "key", "last_used", "page", "parent", "refs", "serial")

    def __init__(self, parent: Node | None, key: PageKey, page: int, serial: int) -> None:
        self.parent = parent
        self.key = key
        self.page = page
        self.serial = serial
        self.children: dict[PageKey, Node] = {}
        self.refs = 0
        self.last_used = 0
        self.in_heap = False


class Match(NamedTuple):
    """The longest cached prefix: its deepest node (a root if nothing matched) and its pages, in order."""

    node: Node
    pages: list[int]


class InsertResult(NamedTuple):
    """The deepest node of the inserted path, the tree's pages for all of its keys, and how many of them are new."""

    node: Node
    pages: list[int]
    num_new: int


class RadixCache:
    """Maps page keys to pages, and evicts pages that nobody uses, least recently used first.

    Ownership: a page belongs to exactly one of the pool (free), this tree, or a request. `insert` moves pages from a
    request to the tree; the caller must then use the pages of the result, because a page whose content the tree had
    already is freed and replaced by the tree's. `evict` moves pages from the tree to the pool.

    Use: a request that runs holds one lock on its deepest node, which keeps every page on the path to it. Take the lock
    right after `match` or `insert`, before anything else may evict; to extend a prefix, insert, lock the new node,
    unlock the old one. Everything not locked may be evicted, so a node that is not locked must not be kept.

    Time is a counter (`clock`), so runs can be repeated exactly.
    """

    def __init__(self, pool: PagePool, page_size: int, clock: Callable[[], int] | None = None) -> None:
        self.page_size = page_size
        self._pool = pool
        self._clock = clock or itertools.count(1).__next__
        self._serial = itertools.count(1).__next__
        self._roots: dict[bytes, Node] = {}
        self._num_pages = 0
        self._num_locked = 0
        # (last_used, serial, node) of evictable leaves, each at most once; entries may be out of date.
        self._heap: list[tuple[int, int, Node]] = []

    @property
    def num_pages(self) -> int:
        """Pages that the tree owns."""
        return self._num_pages

    @property
    def num_locked(self) -> int:
        """Pages of the tree that somebody uses."""
        return self._num_locked

    @property
    def num_evictable(self) -> int:
        """Pages that `evict` could free now: all that nobody uses, since a node in use keeps its whole path in use."""
        return self._num_pages - self._num_locked

    def match(self, salt: bytes, keys: Sequence[PageKey]) -> Match:
        """The longest cached prefix of `keys`; it becomes the most recently used one. Not locked yet."""
        node = self._roots.get(salt)
        if node is None:
            return Match(Node(None, salt, 0, 0), [])
        now = self._clock()
        pages = []
        for key in keys:
            child = node.children.get(key)
            if child is None:
                break
            child.last_used = now
            pages.append(child.page)
            node = child
        return Match(node, pages)

    def inc_lock(self, node: Node) -> None:
        """Keep the path to `node` from eviction; undone by one `dec_lock` of the same node."""
        current: Node | None = node
        while current is not None:
            current.refs += 1
            if current.refs > 1:
                return
            self._num_locked += current.parent is not None
            current = current.parent

    def dec_lock(self, node: Node) -> None:
        """Undo one `inc_lock`."""
        assert node.refs > 0, "unlocked more often than locked"
        current: Node | None = node
        while current is not None:
            current.refs -= 1
            if current.refs > 0:
                return
            self._num_locked -= current.parent is not None
            self._offer(current)
            current = current.parent

    def insert(self, salt: bytes, keys: Sequence[PageKey], pages: Sequence[int]) -> InsertResult:
        """Give the pages of a prefix to the tree. `keys` are those of the whole prefix, from its first page on.

        pages[i] holds keys[i]: either the tree's own page for that position (from an earlier match or insert), or a
        page of the caller's, which the tree takes or, having an equal one, frees.
        """
        assert len(keys) == len(pages)
        now = self._clock()
        node = root = self._roots.get(salt) or Node(None, salt, 0, 0)
        kept: list[int] = []
        duplicates: list[int] = []
        num_new = 0
        for key, page in zip(keys, pages, strict=True):
            child = node.children.get(key)
            if child is None:
                assert not self._pool.is_free(page), f"page {page} is free and cannot be cached"
                child = node.children[key] = Node(node, key, page, self._serial())
                num_new += 1
            elif child.page != page:
                duplicates.append(page)
            child.last_used = now
            kept.append(child.page)
            node = child
        self._pool.free(duplicates)
        self._num_pages += num_new
        if num_new:
            self._roots[salt] = root
        self._offer(node)
        return InsertResult(node, kept, num_new)

    def evict(self, n: int) -> int:
        """Free up to n pages that nobody uses, least recently used first; returns how many. O(log pages) for each."""
        freed: list[int] = []
        while len(freed) < n and self._heap:
            used, _, node = heapq.heappop(self._heap)
            node.in_heap = False
            if node.refs or node.children:
                continue
            if used != node.last_used:
                self._offer(node)
                continue
            freed.append(node.page)
            self._remove(node)
        self._pool.free(freed)
        return len(freed)

    def reset(self) -> int:
        """Free every page that nobody uses; returns how many."""
        return self.evict(self.num_evictable)

    def _remove(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        self._num_pages -= 1
        if parent.parent is not None:
            self._offer(parent)
        elif not parent.children:
            # A tenant without pages leaves nothing behind; a lock on the loose root stays harmless.
            del self._roots[parent.key]

    def _offer(self, node: Node) -> None:
        """Make a node a candidate for eviction if it is a leaf that nobody uses."""
        if node.parent is not None and not node.in_heap and not node.refs and not node.children:
            node.in_heap = True
            heapq.heappush(self._heap, (node.last_used, node.serial, node))

    def _nodes(self) -> Iterator[Node]:
        stack = [child for root in self._roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack += node.children.values()

    def pages(self) -> list[int]:
        """Every page that the tree owns, in no order; for integrity checks."""
        return [node.page for node in self._nodes()]

    def check_integrity(self) -> None:
        """Assert the structure, the counters, and that no page of the tree has a second owner."""
        nodes = list(self._nodes())
        pages = [node.page for node in nodes]
        assert len(set(pages)) == len(pages), "a page is in the tree twice"
        assert not any(self._pool.is_free(page) for page in pages), "a cached page is free"
        assert len(nodes) == self._num_pages, f"{len(nodes)} nodes, counted as {self._num_pages}"
        assert sum(node.refs > 0 for node in nodes) == self._num_locked, "wrong count of locked pages"
        in_heap = {id(node) for _, _, node in self._heap}
        assert len(in_heap) == len(self._heap), "a node is in the heap twice"
        assert all(root.children for root in self._roots.values()), "a root without pages was kept"
        for node in nodes:
            assert node.parent is not None
            assert node.parent.children[node.key] is node, "a node does not hang where its key says"
            assert node.last_used <= node.parent.last_used or node.parent.parent is None, "a child outlives its parent"
            assert node.refs >= sum(child.refs > 0 for child in node.children.values()), "a locked path is broken"
            assert node.in_heap == (id(node) in in_heap), "heap and flag differ"
            assert node.in_heap or node.refs or node.children, "an evictable page would never be evicted"
