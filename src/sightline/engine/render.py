"""Views of a picture, made where it lies on the device: the bytes of `prompt.processor.render`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sightline.prompt.processor import arrange
from sightline.prompt.resize import columns_first
from sightline.types import View


def render(source: Tensor, views: Sequence[View]) -> Tensor:
    """source: upright RGB, uint8 [H, W, 3], contiguous. Launches on the current stream and does not wait."""
    parts = [arrange(_resized(source, view), view, source.new_zeros) for view in views]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _resized(source: Tensor, view: View) -> Tensor:
    # needs triton, which only the GPU path has
    from sightline.kernels.resize import resize_axis

    size = (source.shape[1], source.shape[0])
    # the square of a padded picture exists only as the kernel's idea of what is around it
    padded = (max(size), max(size)) if view.background is not None else size
    pixels = source
    for axis in (1, 0) if columns_first(padded, view.size) else (0, 1):
        if size[axis] == padded[axis] == view.size[axis]:
            continue
        height, width = pixels.shape[:2]
        lines = pixels if axis == 0 else pixels.view(1, height, width * 3)
        start = (padded[axis] - size[axis]) // 2
        lines = resize_axis(lines, view.size[axis], view.resample, start, padded[axis], view.background or (0, 0, 0))
        pixels = lines.view(height, -1, 3) if axis == 0 else lines.view(-1, width, 3)
    return pixels
