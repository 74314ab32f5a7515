"""Pictures to features."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sightline.engine.render import render
from sightline.engine.threads import ComputeThreads
from sightline.models import Encoding
from sightline.parallel import SOLO, Group
from sightline.types import ImageRef, Pixels

# Not cuDNN's, which plans for each new shape for some 300 ms of the host's time.
_AT_ONCE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


# Features of a batch that graphs are worth; a larger one keeps the device busy for longer than its launches take.
MAX_GRAPH_FEATURES = 4096
_MAX_SHAPES = 64


class _Captured(NamedTuple):
    """A graph of each part and its operations, the tensors that they read and those that hold the result."""

    parts: list[tuple[torch.cuda.CUDAGraph, float]]
    pixels: list[Tensor]
    features: list[Tensor]


class EncoderGraphs:
    """CUDA graphs of the vision tower for lists of pictures whose shapes come again: a slow host launches its kernels more slowly
    than small pictures are computed.

    For a model with `static_encoder`. The memory of all graphs is one pool, so an encoding must end before the next begins.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._pool = torch.cuda.graph_pool_handle()
        self._known: OrderedDict[tuple[Any, ...], _Captured | None] = OrderedDict()

    def encoding(self, pixels: Sequence[Tensor], grids: Sequence[Any]) -> Encoding[list[Tensor]]:
        """The model's `encoding`; the result is valid until the next one."""
        key = tuple((grid, *p.shape) for grid, p in zip(grids, pixels, strict=True))
        known, captured = key in self._known, self._known.pop(key, None)
        if captured is None and known:
            captured = self._capture(pixels, grids)
        self._known[key] = captured
        if len(self._known) > _MAX_SHAPES:
            self._known.popitem(last=False)
        if captured is None:
            return (yield from self._model.encoding(pixels, grids))
        for static, new in zip(captured.pixels, pixels, strict=True):
            static.copy_(new)
        for graph, flops in captured.parts:
            graph.replay()
            yield flops
        return captured.features

    def _capture(self, pixels: Sequence[Tensor], grids: Sequence[Any]) -> _Captured:
        static = [p.clone() for p in pixels]
        encoding = self._model.encoding(static, grids)
        parts: list[tuple[torch.cuda.CUDAGraph, float]] = []
        features: list[Tensor] | None = None
        while features is None:
            graph, flops = torch.cuda.CUDAGraph(), 0.0
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                flops = next(encoding)
            except StopIteration as end:
                features = end.value
            graph.capture_end()
            parts.append((graph, flops))
        return _Captured(parts, static, features)


class Encoder:
    """Runs a model's vision tower, part by part. Pictures are divided among the ranks of a group, which all keep all of them.

    graphs: see `EncoderGraphs`. threads: those of a CPU.

    flops_per_second: how fast the device does it, measured at start; None where nobody has.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        group: Group = SOLO,
        graphs: bool = False,
        threads: ComputeThreads | None = None,
    ) -> None:
        self._model: Any = model
        self._graphs = EncoderGraphs(model) if graphs and getattr(model, "static_encoder", False) else None
        self._device = device
        self._group = group
        self._threads = threads
        self._cross_attention = has_cross_attention(model)
        self.flops_per_second: float | None = None

    def encoding(self, images: Sequence[ImageRef], pixels: Sequence[Pixels]) -> Encoding[list[Tensor]]:
        """pixels: of the family's views, or with these still to be made. Each `next` launches a part; the result is one
        [features, hidden] for each picture, to be `kept` or exchanged."""
        with self._context():
            on_device = [self._upload(p) for p in pixels]
            small = sum(image.num_tokens for image in images) <= MAX_GRAPH_FEATURES
            how = self._graphs if self._graphs is not None and small else self._model
            parts = how.encoding(on_device, [image.grid for image in images])
        while True:
            with self._context():
                try:
                    flops = next(parts)
                except StopIteration as end:
                    result: list[Tensor] = end.value
                    break
            yield flops
        for image, rows in zip(images, result, strict=True):
            if rows.shape[0] != self.num_features(image):
                raise ValueError(f"the encoder made {rows.shape[0]} rows for {image.num_tokens} placeholders")
        return result

    def num_features(self, image: ImageRef) -> int:
        """Features that a picture has in the vision cache."""
        count: int = self._model.num_features(image.grid) if self._cross_attention else image.num_tokens
        return count

    def kept(self, encoded: Sequence[Tensor]) -> list[Tensor]:
        """What the vision cache keeps of each picture: [num_tokens, hidden], or what cross-attention reads."""
        with self._context():
            if self._cross_attention:
                return [self._model.kept(rows) for rows in encoded]
            # a view would keep the whole batch alive for as long as one of its pictures is cached, and a graph's output is
            # overwritten
            return [rows.clone() if len(encoded) > 1 or self._graphs else rows.contiguous() for rows in encoded]

    def exchange(self, images: Sequence[ImageRef], owners: Sequence[int], encoded: Sequence[Tensor]) -> list[Tensor]:
        """What the vision cache keeps of all pictures. owners: whose each is; encoded: this rank's own, in order."""
        own = iter(encoded)
        received = []
        config, dtype = self._model.config, next(self._model.parameters()).dtype
        with self._context():
            for image, owner in zip(images, owners, strict=True):
                rows = torch.empty(self.num_features(image), config.hidden_size, dtype=dtype, device=self._device)
                if owner == self._group.rank:
                    rows.copy_(next(own))
                rows = self._group.broadcast(rows, owner)
                received.append(self._model.kept(rows) if self._cross_attention else rows)
        return received

    def new_pixels(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Host memory for pixels, pinned for a GPU: torch keeps and reuses it, so no page of it faults twice."""
        if self._device.type != "cuda":
            return np.empty(shape, dtype)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()

    @contextmanager
    def _context(self) -> Iterator[None]:
        with torch.inference_mode():
            if self._threads is not None:
                with self._threads.all():
                    yield
                return
            with sdpa_kernel(_AT_ONCE, set_priority=True):
                yield

    def _upload(self, pixels: Pixels) -> Tensor:
        tensor = torch.from_numpy(pixels.array)
        if self._device.type == "cuda":
            # pinned already, unless this is no picture of a client's
            tensor = tensor.pin_memory()
        tensor = tensor.to(self._device, non_blocking=True)
        return render(tensor, pixels.views) if pixels.views else tensor


def has_cross_attention(model: nn.Module) -> bool:
    """Whether pictures stand beside the text, see `sightline.models`."""
    return bool(getattr(model, "cross_attention", False))
