"""Ranks that hold one model together: what each holds of it, and the sums between them.

A `Group` is an argument of whatever needs it, never a global; a group of one rank sums and gathers by doing nothing. Collectives
are torch.distributed's: NCCL between GPUs, gloo between processes of a CPU. Ranks of one machine find each other by a file and talk
over the loopback interface and NVLink or PCIe; those of several, by a store of rank 0's and over the machines' networks.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import FileStore, TCPStore  # type: ignore[attr-defined]

# torch 2.13 renamed it
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
# A rank that does not answer for so long hangs; one that died is noticed at once.
_TIMEOUT = timedelta(minutes=10)


class Shard(NamedTuple):
    """What one rank holds of a dimension: `width` entries from `start` of `total`. Those from `total` on are padding."""

    start: int
    width: int
    total: int

    @classmethod
    def whole(cls, total: int) -> Shard:
        """All of it."""
        return cls(0, total, total)

    @property
    def length(self) -> int:
        """Entries that are no padding."""
        return max(0, min(self.width, self.total - self.start))

    def times(self, unit: int) -> Shard:
        """The same share, of entries that are `unit` smaller ones each."""
        return Shard(self.start * unit, self.width * unit, self.total * unit)


class Group:
    """One rank's view of `size` ranks. Models are built with it before it is connected.

    num_collectives: those that this rank has begun; ranks of which all have the same are in step.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self._is_silent = False
        self.num_collectives = 0

    def connect(self, store: str, device: torch.device, listener: socket.socket | None = None) -> None:
        """Meet the other ranks, which all name the same new store: a `file:` URL, or the `tcp:` URL at which rank 0 listens.

        device: where their tensors lie. listener: rank 0's for a `tcp:` URL; the store takes it.
        """
        url = urlsplit(store)
        met: FileStore | TCPStore
        if url.scheme == "file":
            for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(variable, "lo")
            met = FileStore(url.path, self.size)
        else:
            assert url.hostname is not None, store
            met = TCPStore(
                url.hostname,
                url.port or 0,
                self.size,
                is_master=listener is not None,
                timeout=_TIMEOUT,
                wait_for_workers=False,
                master_listen_fd=None if listener is None else listener.detach(),
            )
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=met,
            rank=self.rank,
            world_size=self.size,
            timeout=_TIMEOUT,
            device_id=device if on_gpu else None,
        )

    def close(self) -> None:
        """Leave the others; needed only before another group is connected in this process."""
        if dist.is_initialized():
            dist.destroy_process_group()

    # -- shares --------------------------------------------------------------------------------------------------------

    def shard(self, total: int) -> Shard:
        """An equal share of what `size` divides."""
        assert total % self.size == 0, f"{total} does not divide by {self.size} ranks"
        width = total // self.size
        return Shard(self.rank * width, width, total)

    def padded_shard(self, total: int) -> Shard:
        """An equal share of what is padded until `size` divides it."""
        width = -(-total // self.size)
        return Shard(self.rank * width, width, total)

    def kv_shard(self, num_kv_heads: int) -> Shard:
        """The key heads that this rank's share of query heads reads: with more ranks than key heads, several hold the same."""
        if num_kv_heads % self.size == 0:
            return self.shard(num_kv_heads)
        assert self.size % num_kv_heads == 0, f"{num_kv_heads} key heads and {self.size} ranks"
        return Shard(self.rank // (self.size // num_kv_heads), 1, num_kv_heads)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Inside, collectives are left out: what they return has the right shape and arbitrary numbers."""
        self._is_silent = True
        try:
            yield
        finally:
            self._is_silent = False

    # -- collectives: every rank calls the same ones in the same order -------------------------------------------------------

    def _takes_part(self) -> bool:
        """Whether the collective that is asked for is to be done; it is counted."""
        if self.size == 1 or self._is_silent:
            return False
        self.num_collectives += 1
        return True

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, in place of x (contiguous)."""
        if self._takes_part():
            dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """x [S, W] of every rank side by side: [S, size * W]."""
        if self.size == 1:
            return x
        parts = x.new_empty(self.size, *x.shape)
        if self._takes_part():
            _all_gather(parts.view(-1, x.shape[-1]), x.contiguous())
        return parts.transpose(0, 1).flatten(1)

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """x (contiguous) of one rank, in place of everybody's."""
        if self._takes_part():
            dist.broadcast(x, src=source)
        return x


# The whole model.
SOLO = Group()
