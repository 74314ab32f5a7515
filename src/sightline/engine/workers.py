"""Rank 0's hold on the other ranks of a tensor-parallel engine: it starts them, tells them what to do, and ends when one dies."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import zmq
from torch import Tensor

from sightline.engine.encoder import Encoder
from sightline.engine.executor import GraphSizes, StepPlan
from sightline.engine.rank_messages import (
    Allocate,
    Capture,
    Encode,
    Encoded,
    EncodePart,
    EncodeRest,
    EndEncoding,
    Forward,
    FreeMemory,
    FromRank,
    Loaded,
    TellMemory,
    ToRank,
    decode_from_rank,
    encode,
)
from sightline.errors import EngineError, RankError, startup_error
from sightline.models import Encoding
from sightline.parallel import Group
from sightline.types import Fatal, ImageRef, Pixels

logger = logging.getLogger("sightline.engine")

Answer = TypeVar("Answer", bound=FromRank)

# A rank that died does not answer.
_POLL_MS = 100
# Pixels are sent without copying them from this size on; below, a copy costs less than keeping track.
_COPY_BELOW = 1 << 16
EXIT_RANK_DIED = 7


def socket_path(run_dir: Path, rank: int) -> str:
    """Where rank 0 and another meet."""
    return f"ipc://{run_dir / f'rank-{rank}.sock'}"


def rendezvous(run_dir: Path) -> Path:
    """The file by which the ranks' collectives find each other."""
    return run_dir / "rendezvous"


@contextmanager
def _collective() -> Iterator[None]:
    """Where rank 0 fails inside, others wait for it: `RankError`."""
    try:
        yield
    except Exception as error:
        raise RankError(f"rank 0 failed where others take part: {type(error).__name__}: {error}") from error


def divide(sizes: Sequence[int], count: int) -> list[int]:
    """For each of several things the one of `count` ranks that takes it: the largest first, each to the rank that has least."""
    loads, owners = [0] * count, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += sizes[i]
    return owners


class Workers:
    """Ranks 1 to size - 1, as processes. The directory holds the engine's setup. One thread uses it.

    They are told everything and asked hardly anything, so rank 0 never waits for them but inside collectives. When one dies, no
    collective ends any more: rank 0's process ends at once.
    """

    def __init__(self, run_dir: Path, group: Group) -> None:
        self._context = zmq.Context()
        self._sockets: list[zmq.Socket[bytes]] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._forgotten: list[bytes] = []
        self._num_encodings = 0
        self._closing = False
        for rank in range(1, group.size):
            socket = self._context.socket(zmq.PAIR)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.bind(socket_path(run_dir, rank))
            self._sockets.append(socket)
            command = [sys.executable, "-m", "sightline.engine.worker", str(run_dir), str(rank)]
            # at the end of its input a worker ends, and that comes when this process ends in whatever way
            self._processes.append(subprocess.Popen(command, stdin=subprocess.PIPE))

    def wait_loaded(self) -> None:
        """Wait until all have their weights, and watch them from then on. Raises the `StartupError` that one died of."""
        for rank in range(1, len(self._sockets) + 1):
            self._answer(rank, Loaded)
        for rank, process in enumerate(self._processes, start=1):
            threading.Thread(target=self._watch, args=(rank, process), daemon=True).start()

    def free_memory(self) -> int:
        """Bytes that are free on the device with the least."""
        self._tell(TellMemory())
        return min(self._answer(rank, FreeMemory).num_bytes for rank in range(1, len(self._sockets) + 1))

    def allocate(self, num_pages: int) -> None:
        """See `Executor.allocate`."""
        self._tell(Allocate(num_pages))

    def capture(self, sizes: GraphSizes) -> None:
        """See `Executor.capture`."""
        self._tell(Capture(sizes))

    def encoding(
        self, encoder: Encoder, images: Sequence[ImageRef], pixels: Sequence[Pixels]
    ) -> Encoding[list[Tensor]]:
        """Divide pictures among all ranks, this one with its `encoder` too; they keep the features until `forget`. The parts are
        this rank's own, the result what its vision cache keeps of all."""
        self._num_encodings += 1
        number = self._num_encodings
        owners = divide([encoder.num_features(image) for image in images], len(self._sockets) + 1)
        forgotten = self._take_forgotten()
        for rank in range(1, len(self._sockets) + 1):
            own = [p for p, owner in zip(pixels, owners, strict=True) if owner == rank]
            shapes, views = [p.array.shape for p in own], [p.views for p in own]
            message = Encode(forgotten, number, list(images), owners, shapes, views)
            self._tell_one(rank, message, *(p.array.reshape(-1).data for p in own))
        mine = [i for i, owner in enumerate(owners) if owner == 0]
        parts = encoder.encoding([images[i] for i in mine], [pixels[i] for i in mine])
        try:
            while True:
                self._tell(EncodePart(number))
                yield next(parts)
        except StopIteration as end:
            encoded: list[Tensor] = end.value
        except BaseException:
            self._tell(EndEncoding(number))
            raise
        self._tell(EncodeRest(number))
        problems = [self._answer(rank, Encoded).problem for rank in range(1, len(self._sockets) + 1)]
        failed = next(filter(None, problems), None)
        self._tell(EndEncoding(number, exchange=failed is None))
        if failed is not None:
            raise EngineError(failed)
        with _collective():
            return encoder.exchange(images, owners, encoded)

    def forget(self, digest: bytes) -> None:
        """They drop these features before they do anything else."""
        self._forgotten.append(digest)

    @contextmanager
    def step(self, plan: StepPlan) -> Iterator[None]:
        """Let them compute what rank 0 computes inside the block."""
        self._tell(Forward(self._take_forgotten(), plan))
        with _collective():
            yield

    def _take_forgotten(self) -> list[bytes]:
        forgotten, self._forgotten = self._forgotten, []
        return forgotten

    def _tell(self, message: ToRank) -> None:
        data = encode(message)
        for socket in self._sockets:
            socket.send(data)

    def _tell_one(self, rank: int, message: ToRank, *frames: memoryview) -> None:
        self._sockets[rank - 1].send_multipart([encode(message), *frames], copy=False, copy_threshold=_COPY_BELOW)

    def _answer(self, rank: int, kind: type[Answer]) -> Answer:
        socket, process = self._sockets[rank - 1], self._processes[rank - 1]
        while True:
            # once more after it has died, for its last message
            died = process.poll() is not None
            if socket.poll(_POLL_MS):
                message = decode_from_rank(socket.recv())
                if isinstance(message, Fatal):
                    raise startup_error(message.exit_code, f"rank {rank}: {message.message}")
                assert isinstance(message, kind), message
                return message
            if died:
                raise startup_error(EXIT_RANK_DIED, f"rank {rank} ended with exit code {process.returncode}")

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        if not self._closing:
            logger.error("rank %d died (exit code %d), and with it this engine", rank, code)
            os._exit(EXIT_RANK_DIED)

    def close(self) -> None:
        """End them."""
        self._closing = True
        for process in self._processes:
            process.kill()
            process.wait()
        self._context.destroy(linger=0)
