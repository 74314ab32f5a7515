"""The engine's main loop over a connection: messages in, steps, events out. The same for a process and a thread."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sightline.config import EngineConfig
from sightline.errors import StartupError
from sightline.types import (
    Abort,
    EngineRequest,
    Fatal,
    FinishReason,
    FlushCache,
    FromEngine,
    LoadProgress,
    PixelBuffer,
    Pixels,
    PutPixels,
    Ready,
    Shutdown,
    ToEngine,
    TokenEvent,
)

if TYPE_CHECKING:
    from sightline.engine.core import EngineCore

logger = logging.getLogger("sightline.engine")

STATS_INTERVAL = 0.25

# Pixel files that are used again, up to this size: 16 MiB of shared memory in all.
_SLOT, _NUM_SLOTS, _SLOT_BYTES = "slot-", 4, 4 << 20
# What the receiver appends to a slot's name when it has read it.
_READ = ".read"

NewPixels = Callable[[tuple[int, ...], Any], np.ndarray]


class Connection(Protocol):
    """The engine's end of the wire. `receive` returns at once with timeout 0, and waits with None."""

    def receive(self, timeout: float | None) -> Sequence[ToEngine]: ...

    def send(self, messages: Sequence[FromEngine]) -> None: ...


class PixelFiles:
    """Files of the run directory, in shared memory, that hand pixels to `read_pixels`. Names owe nothing to a client.

    The receiver unlinks them. A few small ones it renames instead, and they are written again: new memory takes four times as
    long as what is copied into it.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._serial = itertools.count()
        self._slots: set[str] = set()

    def write(self, digest: bytes, pixels: Pixels) -> PixelBuffer:
        """Once for each picture, right before the message with the result."""
        data = np.ascontiguousarray(pixels.array).data.cast("B")
        slot = self._free_slot() if data.nbytes <= _SLOT_BYTES else None
        name = slot or f"pixels-{os.getpid()}-{next(self._serial)}"
        fd = os.open(self._run_dir / name, os.O_RDWR | os.O_CREAT | (0 if slot else os.O_EXCL), 0o600)
        try:
            # one copy by the kernel: a mapping would fault on every page
            while data:
                data = data[os.write(fd, data) :]
        finally:
            os.close(fd)
        return PixelBuffer(digest=digest, shape=pixels.array.shape, name=name, views=pixels.views)

    def _free_slot(self) -> str | None:
        for name in (f"{_SLOT}{i}" for i in range(_NUM_SLOTS)):
            if name not in self._slots:
                self._slots.add(name)
                return name
            with suppress(FileNotFoundError):
                (self._run_dir / f"{name}{_READ}").rename(self._run_dir / name)
                return name
        return None


def read_pixels(run_dir: Path, buffer: PixelBuffer, new: NewPixels = np.zeros) -> Pixels:
    """Read the pixels into new memory and give the file back, or unlink it. EOFError when the file is too short."""
    path = run_dir / buffer.name
    array = new(buffer.shape, np.uint8)
    data = array.data.cast("B")
    is_slot = buffer.name.startswith(_SLOT)
    with path.open("rb", buffering=0) as file:
        if not is_slot:
            path.unlink()
        while data:
            count = file.readinto(data)
            if not count:
                raise EOFError(f"{buffer.name} ends {len(data)} bytes early")
            data = data[count:]
    if is_slot:
        path.rename(run_dir / f"{buffer.name}{_READ}")
    return Pixels(array, buffer.views)


def limit_spinning() -> None:
    """Bound how long OpenMP's threads spin while they wait; read once, when torch loads its OpenMP.

    By default they spin for milliseconds. With two busy neighbours on two cores that made the engine fifty times slower;
    a short spin keeps the speed of a quiet machine.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def run_engine(config: EngineConfig, model_dir: Path, run_dir: Path, connection: Connection) -> int:
    """Load, then serve until `Shutdown`. Returns the exit code; start-up errors are sent as `Fatal` first."""
    limit_spinning()
    # Imported here: torch takes a second, and the parent should hear of the phase before.
    connection.send([LoadProgress("imports")])
    from sightline.engine.factory import build_core

    started = time.monotonic()
    try:
        core, plan = build_core(config, model_dir, _throttled(connection), run_dir)
    except StartupError as error:
        connection.send([Fatal(error.exit_code, str(error))])
        return error.exit_code
    connection.send([Ready(plan, time.monotonic() - started), core.snapshot()])
    shutdown = _Loop(core, run_dir, connection).run()
    if not shutdown.orphaned:
        core.runner.close()
    return 0


def _throttled(connection: Connection) -> Callable[[LoadProgress], None]:
    """Forward every new phase, but of one phase no more than twenty messages a second."""
    last: tuple[str, float] = ("", 0.0)

    def send(progress: LoadProgress) -> None:
        nonlocal last
        now = time.monotonic()
        if progress.phase != last[0] or now - last[1] > 0.05 or progress.fraction == 1.0:
            last = (progress.phase, now)
            connection.send([progress])

    return send


class _Loop:
    def __init__(self, core: EngineCore, run_dir: Path, connection: Connection) -> None:
        self._core = core
        self._run_dir = run_dir
        self._connection = connection
        self._stats_sent = 0.0
        core.deliver = self._deliver

    def run(self) -> Shutdown:
        """Serve until there is one."""
        core = self._core
        idles = True
        while True:
            waits = core.stalled or (core.idle and not idles)
            for message in self._connection.receive(None if waits else 0):
                if isinstance(message, Shutdown):
                    return message
                self._handle(message)
            if core.idle:
                core.scheduler.assert_idle()
                idles = core.runner.use_idle_time()
            else:
                began = time.monotonic()
                events = core.step()
                core.stats.step_seconds.observe(time.monotonic() - began)
                self._send(events)

    def _handle(self, message: EngineRequest | PutPixels | Abort | FlushCache) -> None:
        core = self._core
        match message:
            case EngineRequest():
                try:
                    core.add(message)
                except ValueError as error:
                    logger.error("refused request %s: %s", message.request_id, error)
                    failed = TokenEvent(
                        request_id=message.request_id, finish_reason=FinishReason.ERROR, error=str(error)
                    )
                    self._send([failed])
                self._put(message.pixels)
            case PutPixels():
                self._put(message.pixels)
            case Abort():
                self._send(core.abort(message.request_id, message.index))
            case FlushCache():
                core.scheduler.flush()

    def _put(self, buffers: tuple[PixelBuffer, ...]) -> None:
        for buffer in buffers:
            self._core.put_pixels(buffer.digest, read_pixels(self._run_dir, buffer, self._core.runner.new_pixels))

    def _deliver(self, tokens: Sequence[TokenEvent]) -> None:
        """See `_send`, which also sends what can wait for the end of a step."""
        ended = any(token.finish_reason is not None for token in tokens)
        self._connection.send([self._core.snapshot(), *tokens] if ended else tokens)

    def _send(self, events: Sequence[FromEngine]) -> None:
        """Events, preceded by a snapshot when something ended, so that who sees an answer's end sees its counts.

        While there is work, the snapshots are also the sign of life that the HTTP process waits for.
        """
        ended = any(isinstance(e, TokenEvent) and e.finish_reason is not None for e in events)
        now = time.monotonic()
        if ended or now - self._stats_sent > STATS_INTERVAL:
            self._stats_sent = now
            events = [*events, *self._core.expire()]
            events = [self._core.snapshot(), *events]
        if events:
            self._connection.send(events)
