"""Pictures to features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sightline.engine.render import render
from sightline.models import Encoding
from sightline.types import ImageRef, Pixels

# Not cuDNN's, which plans for each new shape for some 300 ms of the host's time.
_AT_ONCE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Encoder:
    """Runs a model's vision tower, part by part.

    flops_per_second: how fast the device does it, measured at start; None where nobody has.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model: Any = model
        self._device = device
        self._merges = not has_cross_attention(model)
        self.flops_per_second: float | None = None

    def encoding(self, images: Sequence[ImageRef], pixels: Sequence[Pixels]) -> Encoding[list[Tensor]]:
        """pixels: of the family's views, or with these still to be made. Each `next` launches a part; the result is the features
        of each picture: [num_tokens, hidden], or what cross-attention reads."""
        with self._context():
            on_device = [self._upload(p) for p in pixels]
            parts = self._model.encoding(on_device, [image.grid for image in images])
        while True:
            with self._context():
                try:
                    flops = next(parts)
                except StopIteration as end:
                    return self._checked(images, end.value)
            yield flops

    def _checked(self, images: Sequence[ImageRef], features: Sequence[Tensor]) -> list[Tensor]:
        for image, rows in zip(images, features, strict=True):
            if self._merges and rows.shape[0] != image.num_tokens:
                raise ValueError(f"the encoder made {rows.shape[0]} rows for {image.num_tokens} placeholders")
        # a view would keep the whole batch alive for as long as one of its pictures is cached
        return [rows.clone() if len(images) > 1 else rows.contiguous() for rows in features]

    def new_pixels(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Host memory for pixels, pinned for a GPU: torch keeps and reuses it, so no page of it faults twice."""
        if self._device.type != "cuda":
            return np.empty(shape, dtype)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()

    @contextmanager
    def _context(self) -> Iterator[None]:
        with torch.inference_mode():
            if self._device.type != "cuda":
                yield
                return
            with sdpa_kernel(_AT_ONCE, set_priority=True):
                yield

    def _upload(self, pixels: Pixels) -> Tensor:
        tensor = torch.from_numpy(pixels.array)
        if self._device.type == "cuda":
            # pinned already, unless this is no picture of a client's
            tensor = tensor.pin_memory().to(self._device, non_blocking=True)
        return render(tensor, pixels.views) if pixels.views else tensor


def has_cross_attention(model: nn.Module) -> bool:
    """Whether pictures stand beside the text, see `sightline.models`."""
    return bool(getattr(model, "cross_attention", False))
