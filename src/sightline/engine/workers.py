"""Rank 0's hold on the other ranks of a tensor-parallel engine: it starts them, tells them what to do, and ends when one dies."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import zmq
from torch import Tensor

from sightline.config import EngineConfig
from sightline.engine.encoder import Encoder
from sightline.engine.executor import GraphSizes, StepPlan
from sightline.engine.node_link import End
from sightline.engine.nodes import Nodes
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
    FromRank,
    Loaded,
    Progress,
    TellMemory,
    TellProgress,
    ToRank,
    decode_from_rank,
    encode,
)
from sightline.engine.setup import Meeting, start_rank
from sightline.errors import DeviceError, EngineError, RankError, StartupError, startup_error
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


def _out_of_step(error: Exception) -> RankError:
    return RankError(f"rank 0 failed where others take part: {type(error).__name__}: {error}")


def divide(sizes: Sequence[int], count: int) -> list[int]:
    """For each of several things the one of `count` ranks that takes it: the largest first, each to the rank that has least."""
    loads, owners = [0] * count, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += sizes[i]
    return owners


class Workers:
    """Ranks 1 to size - 1, as processes, some perhaps on other nodes. The directory holds the engine's setup. One thread uses it.

    They are told everything and asked hardly anything, so rank 0 never waits for them but inside collectives. When one dies, no
    collective ends any more: rank 0's process ends at once.
    """

    def __init__(self, run_dir: Path, group: Group, config: EngineConfig, model_dir: Path) -> None:
        """Raises `StartupError` when there are other nodes and this one cannot listen for them."""
        self._context = zmq.Context()
        self._sockets: list[zmq.Socket[bytes]] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._group = group
        self._parent = os.getppid()
        self._forgotten: list[bytes] = []
        self._num_encodings = 0
        self._loaded = False
        self._closing = False
        # why a rank elsewhere, or its node, is no more
        self._lost: StartupError | None = None
        self._nodes = Nodes(config, model_dir, self._context) if config.nnodes > 1 else None
        store = (run_dir / "rendezvous").as_uri() if self._nodes is None else self._nodes.store
        self._meeting = Meeting(store, [self._bind(run_dir, rank, config) for rank in range(1, config.tp_size)])
        self._meeting.write(run_dir)
        self._processes = [start_rank(run_dir, rank) for rank in range(1, config.ranks_per_node)]
        if self._nodes is not None:
            self._nodes.start(self._meeting, self._on_lost)

    def _bind(self, run_dir: Path, rank: int, config: EngineConfig) -> str:
        """Make the socket for a rank's orders; returns its address."""
        socket = self._context.socket(zmq.PAIR)
        self._sockets.append(socket)
        if self._nodes is not None and rank >= config.ranks_per_node:
            return self._nodes.bind(socket)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 0)
        address = f"ipc://{run_dir / f'rank-{rank}.sock'}"
        socket.bind(address)
        return address

    def connect(self, device: torch.device) -> None:
        """Wait until all have their weights, watch them from then on, and meet them. Raises the `StartupError` that one
        died of."""
        for rank in range(1, len(self._sockets) + 1):
            found = self._answer(rank, Loaded).device
            if found != device.type:
                raise DeviceError(
                    f"rank {rank} found {found}, and rank 0 {device.type}; say --device, or use other machines."
                )
        self._loaded = True
        if self._lost is not None:
            raise self._lost
        for rank, process in enumerate(self._processes, start=1):
            threading.Thread(target=self._watch, args=(rank, process), daemon=True).start()
        self._group.connect(self._meeting.store, device, None if self._nodes is None else self._nodes.store_listener)

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
        try:
            return encoder.exchange(images, owners, encoded)
        except Exception as error:
            raise _out_of_step(error) from error

    def forget(self, digest: bytes) -> None:
        """They drop these features before they do anything else."""
        self._forgotten.append(digest)

    @contextmanager
    def step(self, plan: StepPlan) -> Iterator[None]:
        """Let them compute what rank 0 computes inside the block. Raises `RankError` when that fails and not all come equally far."""
        self._tell(Forward(self._take_forgotten(), plan))
        try:
            yield
        except Exception as error:
            if not self._in_step():
                raise _out_of_step(error) from error
            raise

    def _in_step(self) -> bool:
        """Whether all ranks have begun the same collectives, so that none waits for another."""
        self._tell(TellProgress())
        deadline = time.monotonic() + PATIENCE_MS / 1e3
        for rank, socket in enumerate(self._sockets, start=1):
            left = max(0, round((deadline - time.monotonic()) * 1000))
            if not socket.poll(left):
                return False
            if self._read(rank, Progress).num_collectives != self._group.num_collectives:
                return False
        return True

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
        socket = self._sockets[rank - 1]
        while True:
            # once more after one has died, for last messages
            died = self._death()
            if socket.poll(_POLL_MS):
                return self._read(rank, kind)
            if died is not None:
                for other, each in enumerate(self._sockets, start=1):
                    if each.poll(0):
                        self._read(other, Fatal)
                raise died

    def _read(self, rank: int, kind: type[Answer]) -> Answer:
        message = decode_from_rank(self._sockets[rank - 1].recv())
        if isinstance(message, Fatal):
            raise startup_error(message.exit_code, f"rank {rank}: {message.message}")
        assert isinstance(message, kind), message
        return message

    def _death(self) -> StartupError | None:
        """Why one of them is no more, or nobody waits for them."""
        if os.getppid() != self._parent:
            return StartupError("the server is gone")
        for rank, process in enumerate(self._processes, start=1):
            if (code := process.poll()) is not None:
                return StartupError(f"rank {rank} ended with exit code {code}")
        return self._lost

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        self._on_lost(StartupError(f"rank {rank} died (exit code {code})"))

    def _on_lost(self, error: StartupError) -> None:
        self._lost = error
        if self._loaded and not self._closing:
            logger.error("%s, and with it this engine", error)
            os._exit(EXIT_RANK_DIED)

    def close(self, exit_code: int = 0, reason: str = "") -> None:
        """End them. exit_code and reason: for other nodes."""
        self._closing = True
        for process in self._processes:
            process.kill()
            process.wait()
        if self._nodes is not None:
            self._nodes.close(End(exit_code, reason))
        self._context.destroy(linger=0)
