"""Node 0's hold on the other nodes of an engine: it waits for them, tells them to start their ranks, and notices when one is gone."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator

import sightline
from sightline.config import EngineConfig
from sightline.engine.node_link import (
    DOMAIN,
    Address,
    End,
    Join,
    Keys,
    RankEnded,
    Start,
    ToNode,
    cannot_listen,
    decode_from_node,
    encode,
)
from sightline.engine.setup import Meeting
from sightline.errors import SettingError, StartupError

logger = logging.getLogger("sightline.engine")

_POLL_MS = 100
_NOTICE_SECONDS = 10.0


class Nodes:
    """The nodes 1 to nnodes - 1. Listens when it is made; a thread of its own talks to them from `start` on.

    Raises `AddressInUseError` and `SettingError`.
    """

    def __init__(self, config: EngineConfig, model_dir: Path, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._address = Address.of(config)
        self._local = self._address.resolved()
        self._own = Join.of(config, model_dir)
        self._missing = set(range(1, config.nnodes))
        self._timeout = config.dist_timeout
        self._keys = Keys(config.dist_secret)
        self._identities: dict[int, bytes] = {}
        self._end: End | None = None
        self._thread: threading.Thread | None = None
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(DOMAIN, self._keys)
        self._socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        self._keys.serve(self._socket)
        # a message for a node that is gone is an error
        self._socket.router_mandatory = True
        self.store_listener = self._local.listen()
        self.store = self._address.at(self.store_listener.getsockname()[1])
        try:
            self._socket.bind(self._local.at(self._address.port))
        except zmq.ZMQError as error:
            raise cannot_listen(self._address, error.strerror) from error

    def bind(self, sock: zmq.Socket[bytes]) -> str:
        """Let a rank of another node connect to this socket; returns its address."""
        self._keys.serve(sock)
        port = sock.bind_to_random_port(self._local.at(0).rpartition(":")[0])
        return self._address.at(port)

    def start(self, meeting: Meeting, on_end: Callable[[StartupError], None]) -> None:
        """Tell each node that comes to start its ranks. on_end is called once, on another thread, when one does not come, is
        lost, or has a rank that ended."""
        self._thread = threading.Thread(target=self._run, args=(meeting, on_end), name="sightline-nodes", daemon=True)
        self._thread.start()

    def close(self, end: End) -> None:
        """Tell all to end."""
        self._end = end
        if self._thread is not None:
            self._thread.join(2)
        self._authenticator.stop()

    def _run(self, meeting: Meeting, on_end: Callable[[StartupError], None]) -> None:
        try:
            self._wait(meeting)
            while self._end is None:
                self._listen(meeting)
            self._tell_all(self._end)
        except StartupError as error:
            self._tell_all(End(error.exit_code, str(error)))
            on_end(error)
        self._socket.close(linger=1000)

    def _wait(self, meeting: Meeting) -> None:
        began = time.monotonic()
        noticed = began - _NOTICE_SECONDS
        while self._missing and self._end is None:
            now = time.monotonic()
            names = ", ".join(map(str, sorted(self._missing)))
            where = f"{self._local.host}:{self._local.port}"
            if now - began > self._timeout:
                raise StartupError(f"node {names} did not come to {where} in {self._timeout:g} s (--dist-timeout)")
            if now - noticed >= _NOTICE_SECONDS:
                logger.info("waiting at %s for node %s, for %.0f of %g s", where, names, now - began, self._timeout)
                noticed = now
            self._listen(meeting)

    def _listen(self, meeting: Meeting) -> None:
        if self._socket.poll(_POLL_MS):
            identity, data = self._socket.recv_multipart()
            try:
                message = decode_from_node(data)
            except msgspec.MsgspecError:
                self._refuse(
                    identity, f"a node speaks otherwise than sightline {sightline.__version__}, which node 0 has."
                )
                return
            match message:
                case Join():
                    self._admit(identity, message, meeting)
                case RankEnded():
                    raise StartupError(f"rank {message.rank} died (exit code {message.exit_code})")
        for node, identity in self._identities.items():
            try:
                self._socket.send_multipart([identity, b""])
            except zmq.ZMQError:
                raise StartupError(f"node {node} is gone") from None

    def _admit(self, identity: bytes, join: Join, meeting: Meeting) -> None:
        problem = join.difference(self._own)
        if problem is None and join.node not in self._missing:
            problem = "there is one already"
        if problem is not None:
            self._refuse(identity, f"node {join.node} cannot take part: {problem}.")
            return
        logger.info("node %d is there", join.node)
        self._missing.remove(join.node)
        self._identities[join.node] = identity
        self._tell(identity, Start(meeting))

    def _refuse(self, identity: bytes, why: str) -> None:
        logger.error("%s", why)
        self._tell(identity, End(SettingError.exit_code, why))

    def _tell(self, identity: bytes, message: ToNode) -> None:
        self._socket.send_multipart([identity, encode(message)])

    def _tell_all(self, message: ToNode) -> None:
        for identity in self._identities.values():
            try:
                self._tell(identity, message)
            except zmq.ZMQError:
                logger.debug("a node went before it was told to")
