"""What was done with pictures since start: for `/server_info`, the metrics and the tests."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sightline.types import Histogram


@dataclass
class MediaCounters:
    """Work done since start; a known picture adds nothing."""

    fetches: int = 0
    probes: int = 0
    decodes: int = 0
    resizes: int = 0
    fetched_bytes: int = 0


class PictureStats:
    """What became of pictures since start. loads: by (source, result); a result is "ok" or the error's code."""

    def __init__(self) -> None:
        self.loads: Counter[tuple[str, str]] = Counter()
        self.fetch_seconds = Histogram()
        self.decode_seconds = Histogram()
        self.resize_seconds = Histogram()
        self._lock = threading.Lock()

    @contextmanager
    def timed(self, histogram: Histogram) -> Iterator[None]:
        """Observe how long the block takes, in whatever thread."""
        began = time.monotonic()
        yield
        with self._lock:
            histogram.observe(time.monotonic() - began)
