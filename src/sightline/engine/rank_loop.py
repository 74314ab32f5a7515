"""A rank's main loop: messages of rank 0 in, nothing out but what it asks for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import zmq
from torch import Tensor

from sightline.engine.executor import Executor
from sightline.engine.factory import build_executor
from sightline.engine.rank_messages import (
    Allocate,
    Capture,
    Encode,
    EncodePart,
    Forward,
    FreeMemory,
    Loaded,
    TellMemory,
    decode_to_rank,
    encode,
)
from sightline.engine.setup import EngineSetup
from sightline.engine.workers import rendezvous, socket_path
from sightline.errors import StartupError
from sightline.models import Encoding
from sightline.parallel import Group
from sightline.types import Fatal, ImageRef, Pixels

logger = logging.getLogger("sightline.engine")


def run_rank(run_dir: Path, rank: int) -> int:
    """Load, then serve rank 0 for ever. Returns the exit code of a start that failed, which rank 0 is told of first."""
    setup = EngineSetup.read(run_dir)
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.connect(socket_path(run_dir, rank))
    group = Group(rank, setup.config.tp_size)
    try:
        executor = build_executor(setup.config, setup.model_dir, group, lambda fraction, detail: None)
    except StartupError as error:
        socket.send(encode(Fatal(error.exit_code, str(error))))
        return error.exit_code
    socket.send(encode(Loaded()))
    group.connect(rendezvous(run_dir), executor.device)
    _Loop(executor, socket).run()
    return 0


class _Loop:
    def __init__(self, executor: Executor, socket: zmq.Socket[bytes]) -> None:
        self._executor = executor
        self._socket = socket
        self._features: dict[bytes, Tensor] = {}
        self._encodings: dict[int, tuple[list[ImageRef], Encoding[list[Tensor]]]] = {}
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
                executor.run(message.plan, None)
            case Encode():
                self._forget(message.forgotten)
                self._begin_encoding(message, frames)
            case EncodePart():
                self._encode_part(message.number)
            case TellMemory():
                self._socket.send(encode(FreeMemory(_free_memory(executor.device))))
            case Allocate():
                executor.allocate(message.num_pages)
            case Capture():
                executor.capture(message.sizes)

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
        self._encodings[message.number] = message.images, encoder.encoding(message.images, pixels)

    def _encode_part(self, number: int) -> None:
        images, encoding = self._encodings[number]
        try:
            next(encoding)
            return
        except StopIteration as end:
            self._features.update((image.digest, value) for image, value in zip(images, end.value, strict=True))
        except Exception:
            # as on rank 0, which then does not ask for their features
            logger.exception("%d pictures could not be encoded", len(images))
        del self._encodings[number]


def _free_memory(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
