"""How messages reach an engine: a child process and a Unix socket, or a thread and a queue. Imports no torch."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

import msgspec

from sightline.config import EngineConfig
from sightline.engine.loop import run_engine
from sightline.engine.setup import EngineSetup
from sightline.types import FromEngine, Shutdown, ToEngine, decode_from_engine, encode_message

logger = logging.getLogger("sightline.server")


class Transport(Protocol):
    """Carries messages to the engine; `on_message` and `on_end` are called on the event loop."""

    def start(self, on_message: Callable[[Sequence[FromEngine]], None], on_end: Callable[[int], None]) -> None: ...

    def send(self, message: ToEngine) -> None: ...

    def kill(self) -> None: ...

    async def close(self) -> None: ...


class ProcessTransport:
    """A child process and a PAIR socket in the run directory."""

    def __init__(self, setup: EngineSetup, run_dir: Path, env: Mapping[str, str]) -> None:
        import zmq
        import zmq.asyncio

        from sightline.engine.process import SOCKET

        self._run_dir = run_dir
        self._env = {**os.environ, **env}
        setup.write(run_dir)
        self._socket = zmq.asyncio.Context.instance().socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.bind(f"ipc://{run_dir / SOCKET}")
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: asyncio.Task[None] | None = None

    def start(self, on_message: Callable[[Sequence[FromEngine]], None], on_end: Callable[[int], None]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sightline.engine.process", str(self._run_dir)], env=self._env
        )
        loop = asyncio.get_running_loop()
        self._reader = loop.create_task(self._read(on_message))
        process = self._process

        def wait() -> None:
            code = process.wait()
            # A moment for the last messages (why it died) to be read.
            loop.call_soon_threadsafe(lambda: loop.call_later(0.1, on_end, code))

        threading.Thread(target=wait, daemon=True).start()

    async def _read(self, on_message: Callable[[Sequence[FromEngine]], None]) -> None:
        while True:
            data = await self._socket.recv()
            try:
                messages = decode_from_engine(data)
            except msgspec.MsgspecError as error:
                logger.error("a message of %d bytes is none of ours and was dropped: %s", len(data), error)
                continue
            on_message(messages)

    def send(self, message: ToEngine) -> None:
        # With no high-water mark a send never waits, so the future is done when it is returned.
        self._socket.send(encode_message([message]))

    def kill(self) -> None:
        """End the process at once, also one that is stopped."""
        if self._process is not None:
            self._process.kill()

    async def close(self) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            self.send(Shutdown())
            try:
                await asyncio.to_thread(process.wait, 5)
            except subprocess.TimeoutExpired:
                process.kill()
        if self._reader is not None:
            self._reader.cancel()
        self._socket.close()


class ThreadTransport:
    """The engine's loop in a daemon thread of this process."""

    def __init__(self, config: EngineConfig, model_dir: Path, run_dir: Path) -> None:
        self._arguments = (config, model_dir, run_dir)
        self._inbox: SimpleQueue[ToEngine] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, on_message: Callable[[Sequence[FromEngine]], None], on_end: Callable[[int], None]) -> None:
        loop = asyncio.get_running_loop()

        def run() -> None:
            code = 7
            try:
                code = run_engine(*self._arguments, _QueueConnection(self._inbox, loop, on_message))
            finally:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(on_end, code)

        self._thread = threading.Thread(target=run, name="sightline-engine", daemon=True)
        self._thread.start()

    def send(self, message: ToEngine) -> None:
        self._inbox.put(message)

    def kill(self) -> None:
        """A thread cannot be ended; its process is the caller's own."""

    async def close(self) -> None:
        if self._thread is not None and self._thread.is_alive():
            self._inbox.put(Shutdown())
            await asyncio.to_thread(self._thread.join, 5)


class _QueueConnection:
    def __init__(
        self,
        inbox: SimpleQueue[ToEngine],
        loop: asyncio.AbstractEventLoop,
        on_message: Callable[[Sequence[FromEngine]], None],
    ) -> None:
        self._inbox = inbox
        self._loop = loop
        self._on_message = on_message

    def receive(self, timeout: float | None) -> Sequence[ToEngine]:
        messages = [self._inbox.get()] if timeout is None else []
        while not self._inbox.empty():
            messages.append(self._inbox.get())
        return messages

    def send(self, messages: Sequence[FromEngine]) -> None:
        self._loop.call_soon_threadsafe(self._on_message, messages)
