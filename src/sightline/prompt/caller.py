"""On whose behalf work is done: the tenant, and what one request keeps in memory.

A context variable, so that no endpoint can forget to hand it on: whatever runs for a request, in any task or thread, sees it.
"""

from __future__ import annotations

from contextvars import ContextVar


class Caller:
    """Who asks. salt: the tenant; pictures and prefixes are shared only under an equal one. This base asks for itself."""

    salt: bytes = b""

    def hold(self, num_bytes: int) -> None:
        """Account for encoded bytes that the request keeps until it ends. Raises `OverloadedError` when it is too much."""


_NOBODY = Caller()
_current: ContextVar[Caller] = ContextVar("caller")


def caller() -> Caller:
    """Who asks here and now."""
    return _current.get(_NOBODY)


def set_caller(who: Caller) -> None:
    """From now on, in this task and in what it starts, `who` asks."""
    _current.set(who)
