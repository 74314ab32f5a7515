"""Entry point of the engine process: `python -m sightline.engine.process RUN_DIR`.

RUN_DIR is a 0700 directory made by the parent. It holds engine.json (config, model folder, log level), the Unix sockets
and, for moments, pixel files. Nothing listens on a network.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import zmq

from sightline.engine.loop import run_engine
from sightline.engine.setup import EngineSetup, run_process
from sightline.errors import StartupError
from sightline.types import Fatal, FromEngine, Shutdown, ToEngine, decode_to_engine, encode_message

logger = logging.getLogger("sightline.engine")

SOCKET = "engine.sock"
_PARENT_POLL_MS = 1000


class ZmqConnection:
    """The child's end of a PAIR socket. A vanished parent reads as `Shutdown`."""

    def __init__(self, run_dir: Path) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(f"ipc://{run_dir / SOCKET}")
        self._parent = os.getppid()

    def receive(self, timeout: float | None) -> Sequence[ToEngine]:
        """All messages that are there; with timeout None, wait for the first."""
        messages: list[ToEngine] = []
        while True:
            wait = _PARENT_POLL_MS if timeout is None and not messages else 0
            if self._socket.poll(wait):
                data = self._socket.recv()
                try:
                    messages += decode_to_engine(data)
                except msgspec.MsgspecError as error:
                    logger.error("a message of %d bytes is none of ours and was dropped: %s", len(data), error)
            elif self.orphaned:
                return [Shutdown(orphaned=True)]
            elif messages or timeout is not None:
                return messages

    def send(self, messages: Sequence[FromEngine]) -> None:
        self._socket.send(encode_message(list(messages)))

    @property
    def orphaned(self) -> bool:
        """Whether the parent has gone."""
        return os.getppid() != self._parent

    def close(self) -> None:
        """Flush what was sent (at most a second) and close."""
        self._socket.close()
        zmq.Context.instance().term()


def main() -> int:
    """Run the engine; the exit code is the server's when it cannot start."""
    run_dir = Path(sys.argv[1])
    # The terminal's Ctrl-C and the supervisor's SIGTERM reach the whole group: the parent drains first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    setup = EngineSetup.read(run_dir)
    setup.start_log()
    connection = ZmqConnection(run_dir)
    try:
        return run_engine(setup.config, setup.model_dir, run_dir, connection)
    except StartupError as error:
        connection.send([Fatal(error.exit_code, str(error))])
        return error.exit_code
    except Exception as error:
        connection.send([Fatal(7, f"{type(error).__name__}: {error}")])
        raise
    finally:
        connection.close()
        if connection.orphaned:
            # Nobody else is left to do it.
            shutil.rmtree(run_dir, ignore_errors=True)


if __name__ == "__main__":
    run_process(main)
