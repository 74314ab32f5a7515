"""With how many threads a CPU computes, and where two of them run."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

logger = logging.getLogger("sightline.engine")

# With any of these the user has placed the threads.
_USERS = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
_TASKS = Path("/proc/self/task")
_CPUS = Path("/sys/devices/system/cpu")


class ComputeThreads:
    """The calling thread and those with which torch's OpenMP helps it. Made before that thread's first parallel operation.

    Two threads are held on two cores while they compute: some kernels wake both on one (virtual machines that pack their threads,
    after every pause), and there each waits for the other's turn to end, which makes a step three to five times as long. The
    caller keeps the core that it is on and is free again afterwards, so that it can make way for others and no thread that it
    starts inherits anything; the other one keeps off that core. Nothing is done to other threads of the process.

    More than two are left alone: OpenMP ends and starts some whenever a product takes fewer of them, and one that is born
    meanwhile would inherit the caller's core.
    """

    def __init__(self) -> None:
        self._other: int | None = None
        if sys.platform != "linux" or torch.get_num_threads() != 2 or any(name in os.environ for name in _USERS):
            return
        try:
            self._cores = {cpu: _siblings(cpu) for cpu in os.sched_getaffinity(0)}
            self._current_cpu: Callable[[], int] = ctypes.CDLL(None).sched_getcpu
            self._other = _helper()
        except (OSError, AttributeError) as error:
            logger.debug("threads are not placed: %s", error)

    @contextmanager
    def one(self) -> Iterator[None]:
        """For work so small that waking a second thread takes longer."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    @contextmanager
    def all(self) -> Iterator[None]:
        """For work that is worth all threads. May be entered again inside."""
        before = self._part() if self._other is not None else None
        try:
            yield
        finally:
            if before is not None:
                os.sched_setaffinity(0, before)

    def _part(self) -> set[int] | None:
        """Hold the two apart. Returns where the caller might run before; None if it cannot be done or has been."""
        assert self._other is not None
        allowed = os.sched_getaffinity(0)
        core = self._cores.get(self._current_cpu(), set()) & allowed
        if not core or core == allowed:
            return None
        try:
            os.sched_setaffinity(self._other, allowed - core)
            os.sched_setaffinity(0, core)
        except OSError as error:
            logger.debug("threads are no longer placed: %s", error)
            self._other = None
            return None
        return allowed


def _siblings(cpu: int) -> set[int]:
    """The hardware threads of a core."""
    path = _CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list"
    if not path.exists():
        return {cpu}
    found: set[int] = set()
    for part in path.read_text().strip().split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def _helper() -> int | None:
    """The thread that OpenMP starts for this one: a new thread has its parent's name."""
    mine = threading.get_native_id()
    name = f"sl-omp-{mine}"
    path = _TASKS / str(mine) / "comm"
    before = path.read_text().strip()
    path.write_text(name)
    try:
        torch.zeros(1 << 20).add_(1)
    finally:
        path.write_text(before)
    found = [int(task.name) for task in _TASKS.iterdir() if (task / "comm").read_text().strip() == name]
    return found[0] if len(found) == 1 else None
