"""The link between the nodes of an engine: TCP that only holders of their secret can speak, encrypted. Imports no torch.

ZeroMQ's CURVE has a key pair for each side; both are derived from `--dist-secret`, so no keys are kept or exchanged. Node 0 listens at
`--dist-init-addr`. Another node says what it has (`Join`) and is told where its ranks get their orders (`Start`), or why not.
From then on the link only has to live: a node that does not hear the other's heartbeats, or whose connection ends, ends.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import socket
import time
from enum import Enum, auto
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

import sightline
from sightline.config import EngineConfig
from sightline.engine.setup import Meeting
from sightline.errors import AddressInUseError, SettingError
from sightline.prompt.processor import read_json

# ZeroMQ's, of who may connect
DOMAIN = "nodes"
_MIN_SECRET = 16
# A silent node is noticed in less than two seconds.
_HEARTBEAT_MS, _SILENCE_MS = 250, 1200
# Settings that may differ: they say where this node finds things and what it has.
_LOCAL = {
    "model",
    "revision",
    "download_dir",
    "node_rank",
    "dist_init_addr",
    "dist_secret",
    "dist_timeout",
    "num_threads",
}
# A pod's name is known some seconds after it starts.
_NAME_SECONDS = 20
_FAILED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH


class Join(msgspec.Struct, tag=True):
    """A node with everything in which it must be like node 0: versions of software, settings, and a digest of its model's files."""

    node: int
    versions: dict[str, str]
    settings: dict[str, Any]
    model: str

    @classmethod
    def of(cls, config: EngineConfig, model_dir: Path) -> Join:
        """This node."""
        versions = {"sightline": sightline.__version__, "torch": importlib.metadata.version("torch")}
        settings = config.model_dump(mode="json", exclude=_LOCAL)
        return cls(config.node_rank, versions, settings, _model_digest(model_dir))

    def difference(self, node_0: Join) -> str | None:
        """The first thing in which it is not like node 0."""
        for name, version in node_0.versions.items():
            if (other := self.versions.get(name)) != version:
                return f"it has {name} {other}, and node 0 has {version}"
        for name, value in node_0.settings.items():
            if (other := self.settings.get(name)) != value:
                return f"its --{name.replace('_', '-')} is {other}, and node 0's is {value}"
        return None if self.model == node_0.model else "its model's config.json or weight files are not those of node 0"


def _model_digest(model_dir: Path) -> str:
    """Of config.json and the weight files' names and sizes."""
    weights = sorted((path.name, path.stat().st_size) for path in model_dir.glob("*.safetensors"))
    content = [read_json(model_dir / "config.json"), weights]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Start(msgspec.Struct, tag=True):
    """The node is to start its ranks."""

    meeting: Meeting


class RankEnded(msgspec.Struct, tag=True):
    """A rank of the node ended by itself, and so the node does."""

    rank: int
    exit_code: int


class End(msgspec.Struct, tag=True):
    """The node is to end, with this exit code. reason: why, unless that is what was wanted."""

    exit_code: int = 0
    reason: str = ""


ToNode = Start | End
FromNode = Join | RankEnded
encode = msgspec.msgpack.Encoder().encode
decode_to_node = msgspec.msgpack.Decoder(ToNode).decode
decode_from_node = msgspec.msgpack.Decoder(FromNode).decode


class Address(NamedTuple):
    """Of node 0."""

    host: str
    port: int

    @classmethod
    def of(cls, config: EngineConfig) -> Address:
        """--dist-init-addr. Raises `SettingError`."""
        host, _, port = (config.dist_init_addr or "").removeprefix("tcp://").rpartition(":")
        if not (host and port.isdigit() and int(port) < 1 << 16):
            raise SettingError(
                f"--dist-init-addr: with --nnodes {config.nnodes} it must be HOST:PORT of node 0, not {config.dist_init_addr!r}."
            )
        return cls(host.strip("[]"), int(port))

    def at(self, port: int) -> str:
        """The URL of another port."""
        return f"tcp://{f'[{self.host}]' if ':' in self.host else self.host}:{port}"

    def resolved(self) -> Address:
        """With the address that this machine is to listen on; a name may take a moment to be known. Raises `SettingError`."""
        tries = itertools.count(1)
        while True:
            try:
                return Address(
                    str(socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0][4][0]), self.port
                )
            except OSError as error:
                if next(tries) > _NAME_SECONDS:
                    message = f"--dist-init-addr: {self.host} cannot be resolved: {error.strerror}."
                    raise SettingError(message) from error
            time.sleep(1)

    def listen(self) -> socket.socket:
        """On a free port of this address. Raises `AddressInUseError`."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.bind((self.host, 0))
        except OSError as error:
            listener.close()
            raise cannot_listen(self, error.strerror) from error
        listener.listen()
        return listener


def cannot_listen(address: Address, why: str | None) -> AddressInUseError:
    """Node 0's address is taken or another machine's."""
    return AddressInUseError(
        f"cannot listen on {address.host}:{address.port}: {why}. --dist-init-addr must be an address of node 0's and a free port."
    )


def check_nodes(config: EngineConfig) -> None:
    """Raises `SettingError` for settings of several nodes that cannot be."""
    if config.node_rank >= config.nnodes:
        last = config.nnodes - 1
        raise SettingError(f"--node-rank {config.node_rank}: with --nnodes {config.nnodes} it is 0 to {last}.")
    if config.nnodes == 1:
        return
    if config.tp_size % config.nnodes:
        valid = ", ".join(str(n) for n in range(1, config.tp_size + 1) if config.tp_size % n == 0)
        raise SettingError(
            f"--nnodes {config.nnodes}: --tp-size {config.tp_size} cannot be divided by that; valid numbers of nodes: {valid}."
        )
    if config.dp_size > 1:
        raise SettingError("--nnodes: an engine of several nodes has no replicas; use --dp-size 1, or Ray Serve.")
    Address.of(config)
    if len(config.dist_secret) < _MIN_SECRET:
        raise SettingError(
            f"--nnodes {config.nnodes}: the nodes need a secret of {_MIN_SECRET} characters or more by which they know each other, the "
            "same on all of them: export SIGHTLINE_DIST_SECRET=$(openssl rand -hex 32) on one, and its value on the others."
        )


class Keys:
    """Node 0's pair of keys, and that of all others, from their secret."""

    def __init__(self, secret: str) -> None:
        # slow on purpose, against guessing
        raw = hashlib.scrypt(secret.encode(), salt=b"sightline nodes", n=1 << 14, r=8, p=1, dklen=64)
        self._server, self._client = z85.encode(raw[:32]), z85.encode(raw[32:])

    def serve(self, sock: zmq.Socket[bytes]) -> None:
        """This socket takes connections. Its context needs an authenticator that asks `callback`."""
        _prepare(sock)
        sock.zap_domain = DOMAIN.encode()
        sock.curve_server = True
        sock.curve_secretkey, sock.curve_publickey = self._server, zmq.curve_public(self._server)

    def connect(self, sock: zmq.Socket[bytes]) -> None:
        """This socket connects."""
        _prepare(sock)
        sock.curve_serverkey = zmq.curve_public(self._server)
        sock.curve_secretkey, sock.curve_publickey = self._client, zmq.curve_public(self._client)

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a peer with this public key may connect; as pyzmq's authenticator calls it."""
        return key == zmq.curve_public(self._client)


def _prepare(sock: zmq.Socket[bytes]) -> None:
    sock.ipv6 = True
    sock.linger = 0
    sock.sndhwm = sock.rcvhwm = 0
    sock.heartbeat_ivl, sock.heartbeat_timeout = _HEARTBEAT_MS, _SILENCE_MS


class Event(Enum):
    """What happens to a connection."""

    MADE = auto()
    REFUSED = auto()
    LOST = auto()


class Monitor:
    """Tells of the connection of a socket that is about to connect. One thread uses it."""

    def __init__(self, sock: zmq.Socket[bytes]) -> None:
        self.socket = sock.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | _FAILED)
        self._made = False

    def next(self) -> Event | None:
        """Wait for an event; None for one that says nothing."""
        event = recv_monitor_message(self.socket)["event"]
        if event & _FAILED:
            return Event.LOST if self._made else Event.REFUSED
        if event == zmq.EVENT_DISCONNECTED:
            return Event.LOST if self._made else None
        self._made = True
        return Event.MADE
