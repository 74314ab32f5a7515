"""A node of an engine other than the first: it starts its share of the ranks when node 0 says so, and ends with it. Imports no torch."""

from __future__ import annotations

import logging
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import zmq

import sightline
from sightline import hub
from sightline.config import ServerConfig
from sightline.engine.node_link import (
    Address,
    End,
    Event,
    Join,
    Keys,
    Monitor,
    RankEnded,
    Start,
    ToNode,
    check_nodes,
    decode_to_node,
    encode,
)
from sightline.engine.setup import EngineSetup, Meeting, start_rank
from sightline.errors import SettingError, StartupError
from sightline.logging import setup_logging

logger = logging.getLogger("sightline.engine")

_POLL_MS = 100
_NOTICE_SECONDS = 10.0
EXIT_NODE_ENDED = 7


def run_node(config: ServerConfig, stop: threading.Event) -> int:
    """Host this node's ranks until node 0 is done, or `stop` is set. Returns the exit code; raises `StartupError`."""
    name = f"node {config.node_rank}"
    setup_logging(config.log_level, config.log_format, role=name)
    check_nodes(config)
    model_dir = hub.resolve(config.model, revision=config.revision, download_dir=config.download_dir)
    setup = EngineSetup(config.engine_config(), model_dir, config.log_level, config.log_format, name)
    with _Link(setup) as link:
        message = link.wait_for_node_0(stop)
        if isinstance(message, Start):
            with _ranks(setup, message.meeting) as ranks:
                return _watch(link, ranks, stop)
        if message is not None and message.exit_code:
            raise SettingError(message.reason)
        return 0 if message is not None else EXIT_NODE_ENDED


@contextmanager
def _ranks(setup: EngineSetup, meeting: Meeting) -> Iterator[dict[int, subprocess.Popen[bytes]]]:
    """This node's ranks; none is left at the end."""
    config = setup.config
    run_dir = Path(tempfile.mkdtemp(prefix="sightline-node-"))
    ranks: dict[int, subprocess.Popen[bytes]] = {}
    try:
        setup.write(run_dir)
        meeting.write(run_dir)
        first = config.node_rank * config.ranks_per_node
        logger.info("starting ranks %d to %d", first, first + config.ranks_per_node - 1)
        for rank in range(first, first + config.ranks_per_node):
            ranks[rank] = start_rank(run_dir, rank)
        yield ranks
    finally:
        for process in ranks.values():
            process.kill()
            process.wait()
        shutil.rmtree(run_dir, ignore_errors=True)


def _watch(link: _Link, ranks: dict[int, subprocess.Popen[bytes]], stop: threading.Event) -> int:
    while not stop.is_set():
        match link.receive():
            case End(exit_code, reason):
                if exit_code:
                    logger.error("node 0 ends this engine: %s", reason)
                return exit_code
            case Event.LOST:
                logger.error("node 0 is gone, and with it this engine")
                return EXIT_NODE_ENDED
        for rank, process in ranks.items():
            if (code := process.poll()) is not None:
                logger.error("rank %d died (exit code %d), and with it this engine", rank, code)
                link.send(RankEnded(rank, code))
                return EXIT_NODE_ENDED
    return EXIT_NODE_ENDED


class _Link:
    """The connection to node 0."""

    def __init__(self, setup: EngineSetup) -> None:
        self._address = Address.of(setup.config)
        self._timeout = setup.config.dist_timeout
        self._join = Join.of(setup.config, setup.model_dir)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        Keys(setup.config.dist_secret).connect(self._socket)
        self._monitor = Monitor(self._socket)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor.socket, zmq.POLLIN)
        self._socket.connect(self._address.at(self._address.port))

    def __enter__(self) -> _Link:
        return self

    def __exit__(self, *exception: object) -> None:
        # what was sent goes out, unless nobody is there
        self._context.destroy(linger=1000)

    def wait_for_node_0(self, stop: threading.Event) -> ToNode | None:
        """What it says to us; None when `stop` is set. Raises `StartupError` when it is not there in time or has another secret."""
        where = f"{self._address.host}:{self._address.port}"
        began = time.monotonic()
        noticed = began - _NOTICE_SECONDS
        self.send(self._join)
        while not stop.is_set():
            now = time.monotonic()
            if now - began > self._timeout:
                raise StartupError(f"node 0 did not answer at {where} in {self._timeout:g} s (--dist-timeout)")
            if now - noticed >= _NOTICE_SECONDS:
                logger.info("waiting for node 0 at %s, for %.0f of %g s", where, now - began, self._timeout)
                noticed = now
            match self.receive():
                case Event.REFUSED:
                    raise SettingError(f"--dist-secret: what listens at {where} is no node 0 with this secret.")
                case Event.LOST:
                    raise StartupError(f"node 0 at {where} went away")
                case Start() | End() as message:
                    return message
        return None

    def receive(self) -> ToNode | Event | None:
        """Wait a moment for a message or for news of the connection."""
        ready = dict(self._poller.poll(_POLL_MS))
        if self._socket in ready:
            data = self._socket.recv()
            try:
                # an empty one only asks whether we are there
                return decode_to_node(data) if data else None
            except msgspec.MsgspecError as error:
                raise SettingError(f"node 0 speaks otherwise than sightline {sightline.__version__}.") from error
        return self._monitor.next() if ready else None

    def send(self, message: Join | RankEnded) -> None:
        """Does not wait."""
        self._socket.send(encode(message))
