"""Pictures to features, on a stream of their own where the device has streams."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sightline.engine.render import render
from sightline.types import ImageRef, Pixels

# Not cuDNN's, which plans for each new shape for some 300 ms of the host's time.
_AT_ONCE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# Features of a batch that a graph is worth; a larger one keeps the device busy for longer than its launches take.
_MAX_GRAPH_FEATURES = 4096
_MAX_GRAPHS = 64


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    pixels: list[Tensor]
    features: list[Tensor]


class EncoderGraphs:
    """CUDA graphs of the vision tower for lists of pictures whose shapes come again.

    For a model with `static_encoder`. The memory of all graphs is one pool: they run one after the other.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._pool = torch.cuda.graph_pool_handle()
        self._known: OrderedDict[tuple[Any, ...], _Captured | None] = OrderedDict()

    def encode(self, pixels: Sequence[Tensor], grids: Sequence[Any]) -> list[Tensor]:
        """The model's `encode_images`; the result is valid until the next call."""
        key = tuple((grid, *p.shape) for grid, p in zip(grids, pixels, strict=True))
        known, captured = key in self._known, self._known.pop(key, None)
        if captured is None and known:
            captured = self._capture(pixels, grids)
        self._known[key] = captured
        if len(self._known) > _MAX_GRAPHS:
            self._known.popitem(last=False)
        if captured is None:
            features: list[Tensor] = self._model.encode_images(pixels, grids)
            return features
        for static, new in zip(captured.pixels, pixels, strict=True):
            static.copy_(new)
        captured.graph.replay()
        return captured.features

    def _capture(self, pixels: Sequence[Tensor], grids: Sequence[Any]) -> _Captured:
        static = [p.clone() for p in pixels]
        graph = torch.cuda.CUDAGraph()
        # the decoder's stream may go on meanwhile
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        features = self._model.encode_images(static, grids)
        graph.capture_end()
        return _Captured(graph, static, features)


class Encoder:
    """Runs a model's vision tower.

    background: beside the decoder's work, so that decoding never waits for a picture. graphs: see `EncoderGraphs`.
    """

    def __init__(self, model: nn.Module, device: torch.device, background: bool, graphs: bool = False) -> None:
        self._model: Any = model
        self._graphs = EncoderGraphs(model) if graphs and getattr(model, "static_encoder", False) else None
        self._device = device
        self._merges = not has_cross_attention(model)
        self._stream = torch.cuda.Stream(device) if background else None
        self._running: dict[bytes, torch.cuda.Event] = {}

    @torch.inference_mode()
    def encode(self, images: Sequence[ImageRef], pixels: Sequence[Pixels]) -> list[Tensor]:
        """pixels: of the family's views, or with these still to be made. Returns the features of each
        picture: [num_tokens, hidden], or what cross-attention reads."""
        with self._context():
            on_device = [self._upload(p) for p in pixels]
            grids = [image.grid for image in images]
            if self._graphs is not None and sum(image.num_tokens for image in images) <= _MAX_GRAPH_FEATURES:
                features = self._graphs.encode(on_device, grids)
            else:
                features = self._model.encode_images(on_device, grids)
            for image, rows in zip(images, features, strict=True):
                if self._merges and rows.shape[0] != image.num_tokens:
                    raise ValueError(f"the encoder made {rows.shape[0]} rows for {image.num_tokens} placeholders")
            # a view would keep the whole batch alive for as long as one of its pictures is cached, and a graph's output is
            # overwritten
            result = [rows.clone() if len(images) > 1 or self._graphs else rows.contiguous() for rows in features]
        if self._stream is not None:
            self._hand_over(images, result)
        return result

    def new_pixels(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Host memory for pixels, pinned for a GPU: torch keeps and reuses it, so no page of it faults twice."""
        if self._device.type != "cuda":
            return np.empty(shape, dtype)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()

    @contextmanager
    def _context(self) -> Iterator[None]:
        if self._device.type != "cuda":
            yield
            return
        with sdpa_kernel(_AT_ONCE, set_priority=True), torch.cuda.stream(self._stream):
            yield

    def _upload(self, pixels: Pixels) -> Tensor:
        tensor = torch.from_numpy(pixels.array)
        if self._device.type == "cuda":
            # pinned already, unless this is no picture of a client's
            tensor = tensor.pin_memory().to(self._device, non_blocking=True)
        return render(tensor, pixels.views) if pixels.views else tensor

    def _hand_over(self, images: Sequence[ImageRef], features: Sequence[Tensor]) -> None:
        assert self._stream is not None
        self._running = {digest: event for digest, event in self._running.items() if not event.query()}
        done = torch.cuda.Event()
        done.record(self._stream)
        decoder = torch.cuda.current_stream(self._device)
        for image, rows in zip(images, features, strict=True):
            self._running[image.digest] = done
            # its memory may be given away only when the decoder has read it, too
            rows.record_stream(decoder)

    def is_done(self, digest: bytes) -> bool:
        """Nothing of this picture is still being computed."""
        done = self._running.get(digest)
        if done is None:
            return True
        if not done.query():
            return False
        del self._running[digest]
        return True

    def wait_for(self, digests: Collection[bytes]) -> None:
        """Make what is launched from here on wait for these pictures."""
        for digest in digests:
            if not self.is_done(digest):
                torch.cuda.current_stream(self._device).wait_event(self._running[digest])


def has_cross_attention(model: nn.Module) -> bool:
    """Whether pictures stand beside the text, see `sightline.models`."""
    return bool(getattr(model, "cross_attention", False))
