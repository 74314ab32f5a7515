"""Features of encoded pictures, kept under a byte budget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any


class _Entry:
    __slots__ = ("filled", "nbytes", "pins", "value", "was_pinned")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.value: Any = None
        self.filled = False
        self.was_pinned = False
        self.pins = 0


class VisionCache:
    """Digest -> features, least recently used first out. Values are opaque.

    An entry is reserved (its bytes count, nothing is stored yet), then filled. Entries that are pinned or not yet
    filled are never evicted. The budget holds at all times but for one case: an item (or a group of items used together)
    larger than the budget is admitted when nothing else must stay, for otherwise its request could never run.

    on_drop: told of every entry that leaves, by its digest.

    hits and misses count pictures needed by a request: a pin of an entry that an earlier one had brought, and a
    reservation. evictions counts entries dropped for room.
    """

    def __init__(self, max_bytes: int, on_drop: Callable[[bytes], None] | None = None) -> None:
        self.max_bytes = max_bytes
        self._on_drop = on_drop
        self.num_bytes = 0
        self.num_pinned = 0
        self.hits = 0
        self.misses = 0
        self.evictions = 0
        # In order of use, the latest last.
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def contains(self, digest: bytes) -> bool:
        """The features are here, or will be."""
        return digest in self._entries

    def is_filled(self, digest: bytes) -> bool:
        """The features are here."""
        entry = self._entries.get(digest)
        return entry is not None and entry.filled

    def get(self, digest: bytes) -> Any:
        """The features; KeyError when there are none. Makes the entry the most recently used."""
        entry = self._entries[digest]
        if not entry.filled:
            raise KeyError("the picture's place is reserved but not filled yet")
        self._entries.move_to_end(digest)
        return entry.value

    def can_fit(self, nbytes: int, group: Collection[bytes] = (), guest: bool = True) -> bool:
        """Whether `reserve` would succeed now. group: entries that the newcomer will be used with; they are no rivals that
        a guest would have to wait for, or pictures that only make sense together could wait for each other. guest: may be one."""
        kept = [(digest, e) for digest, e in self._entries.items() if self._must_stay(e) or digest in group]
        rivals = any(digest not in group for digest, _ in kept)
        return sum(e.nbytes for _, e in kept) + nbytes <= self.max_bytes or (guest and not rivals)

    def reserve(self, digest: bytes, nbytes: int, group: Collection[bytes] = ()) -> bool:
        """Make room for an absent picture, evicting what nobody uses; False, and nothing changed, if that is too little.

        Follow it by `fill`, or by `discard_unfilled` when the picture could not be encoded. group: see `can_fit`; those of
        its pictures that are here must be pinned.
        """
        assert digest not in self._entries, "the picture is here already"
        assert nbytes >= 0
        if not self.can_fit(nbytes, group):
            return False
        self._evict_down_to(self.max_bytes - nbytes)
        self._entries[digest] = _Entry(nbytes)
        self.num_bytes += nbytes
        self.misses += 1
        return True

    def fill(self, digest: bytes, value: Any) -> None:
        """Store the features of a reserved entry."""
        entry = self._entries[digest]
        assert not entry.filled, "the picture was filled before"
        entry.value = value
        entry.filled = True
        self._see_guests_off()

    def discard_unfilled(self, digest: bytes) -> None:
        """Give a reservation back. Nothing happens when the entry was filled or is not here."""
        entry = self._entries.get(digest)
        if entry is None or entry.filled:
            return
        assert entry.pins == 0, "somebody waits for features that will not come"
        self._drop(digest)

    def pin(self, digest: bytes) -> None:
        """Keep an entry from eviction; undone by one `unpin`."""
        entry = self._entries[digest]
        self._entries.move_to_end(digest)
        self.hits += entry.was_pinned
        entry.was_pinned = True
        self.num_pinned += entry.pins == 0
        entry.pins += 1

    def unpin(self, digest: bytes) -> None:
        """Undo one `pin`."""
        entry = self._entries[digest]
        assert entry.pins > 0, "unpinned more often than pinned"
        entry.pins -= 1
        self.num_pinned -= entry.pins == 0
        self._see_guests_off()

    def _see_guests_off(self) -> None:
        """An item larger than the budget was a guest: it leaves when its last user has, and has been filled."""
        if self.num_bytes > self.max_bytes:
            self._evict_down_to(self.max_bytes)

    def clear(self) -> int:
        """Drop everything that nobody uses; returns how many entries."""
        unused = [digest for digest, entry in self._entries.items() if not self._must_stay(entry)]
        for digest in unused:
            self._drop(digest)
        return len(unused)

    @staticmethod
    def _must_stay(entry: _Entry) -> bool:
        return entry.pins > 0 or not entry.filled

    def _evict_down_to(self, nbytes: int) -> None:
        if self.num_bytes <= nbytes:
            return
        for digest in [d for d, entry in self._entries.items() if not self._must_stay(entry)]:
            self._drop(digest)
            self.evictions += 1
            if self.num_bytes <= nbytes:
                return

    def _drop(self, digest: bytes) -> None:
        self.num_bytes -= self._entries.pop(digest).nbytes
        if self._on_drop is not None:
            self._on_drop(digest)

    def check_integrity(self) -> None:
        """Assert the counters and the budget."""
        entries = self._entries.values()
        assert self.num_bytes == sum(e.nbytes for e in entries), "wrong count of bytes"
        assert self.num_pinned == sum(e.pins > 0 for e in entries), "wrong count of pinned entries"
        assert all(e.pins >= 0 for e in entries)
        guests = len(entries) == 1 or all(map(self._must_stay, entries))
        assert self.num_bytes <= self.max_bytes or guests, "over budget with something to evict"
