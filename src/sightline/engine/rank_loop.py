"""A rank's main loop: messages of rank 0 in, nothing out but what it asks for."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import zmq
from torch import Tensor

from sightline.engine.executor import Executor
from sightline.engine.factory import build_executor, check_group
from sightline.engine.node_link import Event, Keys, Monitor
from sightline.engine.rank_messages import (
    PATIENCE_MS,
    Allocate,
    Capture,
    Encode,
    Encoded,
    EncodePart,
    EncodeRest,
    EndEncoding,
    Forward,
    FreeMemory,
    Loaded,
    Progress,
    TellMemory,
    TellProgress,
    decode_to_rank,
    encode,
)
from sightline.engine.setup import EngineSetup, Meeting
from sightline.errors import StartupError, leaves_device_unusable
from sightline.models import Encoding
from sightline.parallel import Group
from sightline.types import Fatal, ImageRef, Pixels

logger = logging.getLogger("sightline.engine")


_EXIT_LOST = 7


def run_rank(run_dir: Path, rank: int) -> int:
    """Load, then serve rank 0 for ever. Returns the exit code of a start that failed, which rank 0 is told of first."""
    setup, meeting = EngineSetup.read(run_dir), Meeting.read(run_dir)
    config = setup.config
    socket = _connect(meeting.orders[rank - 1], config.dist_secret)
    group = Group(rank, config.tp_size)
    try:
        check_group(config, setup.model_dir)
        executor = build_executor(config, setup.model_dir, group, lambda fraction, detail: None)
    except StartupError as error:
        socket.send(encode(Fatal(error.exit_code, str(error))))
        zmq.Context.instance().destroy(linger=1000)
        return error.exit_code
    socket.send(encode(Loaded(executor.device.type)))
    group.connect(meeting.store, executor.device)
    _Loop(executor, socket).run()
    return 0


def _connect(address: str, secret: str) -> zmq.Socket[bytes]:
    """To rank 0, which is on another node where the address is none of this machine's."""
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    socket.setsockopt(zmq.RCVHWM, 0)
    if address.startswith("tcp:"):
        Keys(secret).connect(socket)
        monitor = Monitor(socket)
        threading.Thread(target=_end_with_connection, args=(monitor,), daemon=True).start()
    socket.connect(address)
    return socket


def _end_with_connection(monitor: Monitor) -> None:
    while monitor.next() in (None, Event.MADE):
        pass
    # the node notices too, says so and ends this process; else it is gone itself
    time.sleep(1)
    os._exit(_EXIT_LOST)


class _Loop:
    def __init__(self, executor: Executor, socket: zmq.Socket[bytes]) -> None:
        self._executor = executor
        self._socket = socket
        self._features: dict[bytes, Tensor] = {}
        self._encodings: dict[int, _Encoding] = {}
        executor.features = self._features.__getitem__

    def run(self) -> None:
        """Until the process is ended."""
        while True:
            first, *frames = self._socket.recv_multipart(copy=False)
            self._do(first.bytes, [frame.buffer for frame in frames])

    def _do(self, data: bytes, frames: Sequence[memoryview]) -> None:
        executor = self._executor
        match message := decode_to_rank(data):
            case Forward():
                self._forget(message.forgotten)
                try:
                    executor.run(message.plan, None)
                except Exception as error:
                    self._compare(error)
            case Encode():
                self._forget(message.forgotten)
                self._begin_encoding(message, frames)
            case EncodePart():
                self._encodings[message.number].step()
            case EncodeRest():
                encoding = self._encodings[message.number]
                while not encoding.done:
                    encoding.step()
                self._socket.send(encode(Encoded(encoding.problem)))
            case EndEncoding():
                self._end_encoding(message)
            case TellProgress():
                self._socket.send(encode(Progress(executor.group.num_collectives)))
            case TellMemory():
                self._socket.send(encode(FreeMemory(_free_memory(executor.device))))
            case Allocate():
                executor.allocate(message.num_pages)
            case Capture():
                executor.capture(message.sizes)

    def _compare(self, error: Exception) -> None:
        """Go on after a step that failed, when rank 0 asks how far it came here: then it failed there too, and it decides."""
        if leaves_device_unusable(error) or not self._socket.poll(PATIENCE_MS):
            raise error
        data = self._socket.recv()
        if not isinstance(decode_to_rank(data), TellProgress):
            raise error
        self._do(data, [])

    def _forget(self, digests: Sequence[bytes]) -> None:
        for digest in digests:
            self._features.pop(digest, None)

    def _begin_encoding(self, message: Encode, frames: Sequence[memoryview]) -> None:
        encoder = self._executor.encoder
        pixels = []
        for frame, shape, views in zip(frames, message.shapes, message.views, strict=True):
            array = encoder.new_pixels(shape, np.uint8)
            array.reshape(-1)[:] = np.frombuffer(frame, np.uint8)
            pixels.append(Pixels(array, views))
        rank = self._executor.group.rank
        own = [image for image, owner in zip(message.images, message.owners, strict=True) if owner == rank]
        self._encodings[message.number] = _Encoding(message.images, message.owners, encoder.encoding(own, pixels))

    def _end_encoding(self, message: EndEncoding) -> None:
        encoding = self._encodings.pop(message.number)
        if message.exchange:
            features = self._executor.encoder.exchange(encoding.images, encoding.owners, encoding.encoded)
            self._features.update(zip((image.digest for image in encoding.images), features, strict=True))


@dataclass
class _Encoding:
    """Pictures on their way. encoded: the rank's own, once all parts are done; problem: why they are not."""

    images: list[ImageRef]
    owners: list[int]
    parts: Encoding[list[Tensor]]
    encoded: list[Tensor] = field(default_factory=list)
    done: bool = False
    problem: str | None = None

    def step(self) -> None:
        """The next part, if there is one."""
        try:
            if not self.done:
                next(self.parts)
        except StopIteration as end:
            self.encoded, self.done = end.value, True
        except Exception as error:
            logger.exception("%d pictures could not be encoded", len(self.images))
            self.problem, self.done = f"{type(error).__name__}: {error}", True


def _free_memory(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
