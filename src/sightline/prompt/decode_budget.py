"""Where pictures are decoded: threads of their own, under a bound on their memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

# Text beside sixteen pictures of 36 megapixels on two cores: p90 20 ms instead of 32, and 12 alone.
_DECODER_NICENESS = 10


def _give_way() -> None:
    """This thread, from now on, takes what the others of this machine leave. (On Linux a priority is a thread's own.)"""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread) + _DECODER_NICENESS
        os.setpriority(os.PRIO_PROCESS, thread, min(niceness, 19))


class DecodeBudget:
    """Bounds the pixel bytes being decoded at once, in threads of its own, first come first served.

    A picture larger than the whole budget waits to be alone. One event loop's.
    """

    def __init__(self, total: int) -> None:
        self._total = self._free = total
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()
        # Not the default threads: text must not wait for pictures.
        self._threads = ThreadPoolExecutor(os.cpu_count(), "sightline-decoder", _give_way)

    @property
    def num_bytes(self) -> int:
        """Pixel bytes being decoded now."""
        return self._total - self._free

    async def run(self, num_bytes: int, function: Callable[..., T], *args: Any) -> T:
        """Run `function` in a worker thread while holding `num_bytes` of the budget."""
        loop = asyncio.get_running_loop()
        share = min(num_bytes, self._total)
        await self._take(share)

        def done(work: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop may be closed by now
                loop.call_soon_threadsafe(self._give, share)

        # The caller's going does not stop a thread that runs: the share is free when the thread is.
        work = self._threads.submit(function, *args)
        work.add_done_callback(done)
        return await asyncio.wrap_future(work)

    async def _take(self, share: int) -> None:
        if not self._queue and share <= self._free:
            self._free -= share
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((share, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._give(share)
            raise

    def _give(self, share: int) -> None:
        self._free += share
        while self._queue and (self._queue[0][1].cancelled() or self._queue[0][0] <= self._free):
            share, turn = self._queue.popleft()
            if not turn.cancelled():
                self._free -= share
                turn.set_result(None)

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)
