"""On whose behalf work is done: the tenant, what one request keeps in memory, and where its time goes.

A context variable, so that no endpoint can forget to hand it on: whatever runs for a request, in any task or thread, sees it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class Caller:
    """Who asks. salt: the tenant; pictures and prefixes are shared only under an equal one. This base asks for itself.

    traced: somebody wants to know where the time goes. outgoing: headers for what is fetched on its behalf.
    """

    salt: bytes = b""
    traced: bool = False
    outgoing: tuple[tuple[bytes, bytes], ...] = ()

    def hold(self, num_bytes: int) -> None:
        """Account for encoded bytes that the request keeps until it ends. Raises `OverloadedError` when it is too much."""

    def spent(self, phase: str, began: float, ended: float) -> None:
        """Take note of a phase of the work, in seconds of the monotonic clock."""


_NOBODY = Caller()
_current: ContextVar[Caller] = ContextVar("caller")


def caller() -> Caller:
    """Who asks here and now."""
    return _current.get(_NOBODY)


def set_caller(who: Caller) -> None:
    """From now on, in this task and in what it starts, `who` asks."""
    _current.set(who)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Tell the caller how long the block takes, whatever becomes of it."""
    began = time.monotonic()
    try:
        yield
    finally:
        caller().spent(name, began, time.monotonic())
