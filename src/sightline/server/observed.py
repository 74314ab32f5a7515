"""What the HTTP process sees of answers: the times that clients feel, and how answers end."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field

from sightline.types import Histogram


@dataclass
class Observed:
    """Since start. first_token: from a request's body to its first token. between_tokens: from one token of a choice to the
    next. request: from the body to the end. finishes: choices by finish reason. loop_lag: how late the event loop is. stalls:
    how long answers waited for clients that did not read. prompt_tokens, cached_tokens: by tenant."""

    first_token: Histogram = field(default_factory=Histogram)
    between_tokens: Histogram = field(default_factory=Histogram)
    request: Histogram = field(default_factory=Histogram)
    finishes: Counter[str] = field(default_factory=Counter)
    loop_lag: Histogram = field(default_factory=Histogram)
    stalls: Histogram = field(default_factory=Histogram)
    prompt_tokens: Counter[str] = field(default_factory=Counter)
    cached_tokens: Counter[str] = field(default_factory=Counter)

    async def measure_loop(self, interval: float = 0.25) -> None:
        """Note, until cancelled, by how much the event loop oversleeps: what every request in it waits too."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + interval
            await asyncio.sleep(interval)
            self.loop_lag.observe(max(loop.time() - due, 0.0))
