"""Which replica should compute a prompt: the one whose caches hold most of it, unless it has too much to do.

Plain Python, used by the server's replicas, by the Ray application and by the simulator. A router never asks a replica
what it has cached; it remembers what it sent where, up to the size of the caches. A wrong guess costs time, never an answer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Generic, Literal, NamedTuple, TypeVar

import numpy as np

from sightline.types import ImageRef

Method = Literal["auto", "cache_aware", "round_robin", "shortest_queue"]
ReplicaT = TypeVar("ReplicaT", bound=Hashable)

# Tokens of one remembered piece of a prompt.
BLOCK = 32
# A replica that holds a whole prompt may have this much more to do than the idlest one, and half of what that one has besides.
SLACK = 16
# A prompt is computed before anybody else's next token, so two of them behind each other are what makes a first token late. Of 1 to
# 8, simulated, this is the least that no longer lets arrivals bunch, and found pictures as often.
_UNBEGUN = 3


def load(num_in_flight: int, num_begun: int) -> int:
    """What a replica has to do, counted in requests that only decode: those `num_begun` that have had their first token."""
    return _UNBEGUN * (num_in_flight - num_begun) + num_begun


class PictureUse(NamedTuple):
    """A picture of a prompt. key: its identity; offset: of its first placeholder; num_tokens: placeholders."""

    key: Hashable
    offset: int
    num_tokens: int


class Footprint(NamedTuple):
    """What of a prompt caches may hold. blocks: a key for every `BLOCK` tokens, each of which covers all before it too."""

    num_tokens: int
    blocks: tuple[Hashable, ...]
    pictures: tuple[PictureUse, ...]


def footprint(input_ids: np.ndarray, images: Sequence[ImageRef], salt: bytes = b"") -> Footprint:
    """Of one prompt. input_ids: int32 [L]; salt: the tenant's, as prefixes are shared under an equal one only."""
    key: int = hash(salt)
    blocks = []
    for start in range(0, len(input_ids) - BLOCK + 1, BLOCK):
        end = start + BLOCK
        shown = tuple(i.digest for i in images if i.offset < end and i.offset + i.num_tokens > start)
        key = hash((key, input_ids[start:end].tobytes(), shown))
        blocks.append(key)
    pictures = tuple(PictureUse(i.digest, i.offset, i.num_tokens) for i in images)
    return Footprint(len(input_ids), tuple(blocks), pictures)


class Router(Generic[ReplicaT]):
    """Chooses replicas by `method` and remembers what went where.

    prefix_tokens, picture_tokens: how much of each a replica's caches hold, and so how much is remembered of it.
    """

    def __init__(self, method: Method, *, prefix_tokens: int, picture_tokens: int) -> None:
        self.method = "cache_aware" if method == "auto" else method
        self._capacity = (prefix_tokens, picture_tokens)
        self._records: dict[ReplicaT, _Record] = {}
        self._turn = 0

    def choose(self, prompt: Footprint, loads: Mapping[ReplicaT, int]) -> ReplicaT:
        """Of the replicas in `loads` (what each has to do, see `load`), the one to send `prompt` to. ValueError for none."""
        if not loads:
            raise ValueError("there is no replica to choose from")
        return self.ranked(prompt, loads)[0]

    def ranked(self, prompt: Footprint, loads: Mapping[ReplicaT, int]) -> list[ReplicaT]:
        """The replicas in `loads`, best first."""
        replicas = list(loads)
        start = self._turn % max(len(replicas), 1)
        self._turn += 1
        # Who is equally good takes turns.
        turns = replicas[start:] + replicas[:start]
        if self.method == "round_robin":
            return turns
        if self.method == "shortest_queue":
            return sorted(turns, key=loads.__getitem__)
        slack = SLACK + min(loads.values(), default=0) / 2
        return sorted(turns, key=lambda r: loads[r] - slack * self.reused(prompt, r))

    def reused(self, prompt: Footprint, replica: ReplicaT) -> float:
        """The part of a prompt, 0 to 1, that the replica probably need not compute: its prefix, and pictures behind it."""
        record = self._records.get(replica)
        return record.reused(prompt) / prompt.num_tokens if record and prompt.num_tokens else 0.0

    def record(self, prompt: Footprint, replica: ReplicaT) -> None:
        """`prompt` goes to `replica`."""
        if self.method == "cache_aware":
            self._records.setdefault(replica, _Record(*self._capacity)).add(prompt)

    def forget(self, replica: ReplicaT) -> None:
        """The replica has gone."""
        self._records.pop(replica, None)

    def forget_all(self) -> None:
        """The replicas' caches were flushed."""
        self._records.clear()


class _Record:
    """What one replica was sent, as long as its caches probably hold it."""

    def __init__(self, prefix_tokens: int, picture_tokens: int) -> None:
        self._blocks = _Recent(prefix_tokens)
        self._pictures = _Recent(picture_tokens)

    def reused(self, prompt: Footprint) -> int:
        """In tokens."""
        num_prefix = 0
        for key in prompt.blocks:
            if key not in self._blocks:
                break
            num_prefix += BLOCK
        known = (p for p in prompt.pictures if p.key in self._pictures)
        return num_prefix + sum(
            p.offset + p.num_tokens - max(p.offset, min(num_prefix, p.offset + p.num_tokens)) for p in known
        )

    def add(self, prompt: Footprint) -> None:
        # The beginning last: as in the caches, a prefix outlives what follows it.
        for key in reversed(prompt.blocks):
            self._blocks.add(key, BLOCK)
        for picture in prompt.pictures:
            self._pictures.add(picture.key, picture.num_tokens)


class _Recent:
    """Keys with their sizes in tokens; the least recently added go first when together they are more than `capacity`."""

    def __init__(self, capacity: int) -> None:
        self._sizes: OrderedDict[Hashable, int] = OrderedDict()
        self._capacity = capacity
        self._total = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._sizes

    def add(self, key: Hashable, size: int) -> None:
        self._total += size - self._sizes.pop(key, 0)
        self._sizes[key] = size
        while self._total > self._capacity and self._sizes:
            self._total -= self._sizes.popitem(last=False)[1]
