"""What rank 0 tells the other ranks of its engine, and what they answer: msgpack over Unix sockets, or TCP to other nodes, no pickle.

A rank does what it is told, in order; that alone keeps the ranks' collectives in step.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from sightline.engine.executor import GraphSizes, StepPlan
from sightline.types import Fatal, ImageRef, View

# How long ranks wait for each other after a step that failed on one of them.
PATIENCE_MS = 2000


class TellMemory(msgspec.Struct, tag=True):
    """Answer with `FreeMemory`."""


class Allocate(msgspec.Struct, tag=True):
    """Make the K/V cache, of so many pages."""

    num_pages: int


class Capture(msgspec.Struct, tag=True):
    """Make the CUDA graphs."""

    sizes: GraphSizes


class Encode(msgspec.Struct, tag=True):
    """Pictures to be encoded by all ranks together, under this number. owners: whose each is. A frame for the uint8 pixels of each
    of the rank's own follows, of these shapes and views.

    forgotten: pictures whose features are needed no more, dropped first.
    """

    forgotten: list[bytes]
    number: int
    images: list[ImageRef]
    owners: list[int]
    shapes: list[tuple[int, ...]]
    views: list[tuple[View, ...]]


class EncodePart(msgspec.Struct, tag=True):
    """The next part of the rank's own share of an encoding, if there is one."""

    number: int


class EncodeRest(msgspec.Struct, tag=True):
    """All parts that are left. Answer with `Encoded`."""

    number: int


class EndEncoding(msgspec.Struct, tag=True):
    """Exchange the features and keep those of all pictures, or drop what there is."""

    number: int
    exchange: bool = False


class Forward(msgspec.Struct, tag=True):
    """Compute a step. forgotten: as in `Encode`."""

    forgotten: list[bytes]
    plan: StepPlan


class TellProgress(msgspec.Struct, tag=True):
    """Rank 0's step failed. Answer with `Progress`, also where the step failed too."""


class Loaded(msgspec.Struct, tag=True):
    """The weights are there, on a device of this kind; from here on the rank takes part in collectives."""

    device: str


class Encoded(msgspec.Struct, tag=True):
    """The rank's own pictures are encoded; problem: or why not."""

    problem: str | None = None


class FreeMemory(msgspec.Struct, tag=True):
    """Bytes that nobody uses on the rank's device."""

    num_bytes: int


class Progress(msgspec.Struct, tag=True):
    """How far the rank is, see `Group`."""

    num_collectives: int


ToRank = TellMemory | Allocate | Capture | Encode | EncodePart | EncodeRest | EndEncoding | Forward | TellProgress
FromRank = Loaded | FreeMemory | Encoded | Progress | Fatal


def _encode_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    raise NotImplementedError(f"a {type(value).__name__} is in no message")


def _decode_array(kind: type, value: Any) -> Any:
    assert kind is np.ndarray, kind
    dtype, shape, data = value
    # a copy, which may be written to
    return np.frombuffer(data, np.dtype(dtype)).reshape(shape).copy()


encode = msgspec.msgpack.Encoder(enc_hook=_encode_array).encode
decode_to_rank = msgspec.msgpack.Decoder(ToRank, dec_hook=_decode_array).decode
decode_from_rank = msgspec.msgpack.Decoder(FromRank).decode
