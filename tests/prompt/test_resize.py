"""Resizing on threads gives Pillow's own bytes."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sightline.prompt import resize as module
from sightline.prompt.resize import resize

FILTERS = (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS)


@pytest.mark.parametrize("resample", FILTERS, ids=lambda f: f.name)
def test_equals_pillow(resample: Image.Resampling, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LARGE", 0)
    monkeypatch.setattr(module, "_THREADS", 4)
    rng = np.random.default_rng(0)
    for _ in range(60):
        before, after = rng.integers(1, 150, 2).tolist(), rng.integers(1, 150, 2).tolist()
        if rng.random() < 0.3:
            after[rng.integers(2)] = before[rng.integers(2)]
        pixels = rng.integers(0, 256, (before[1], before[0], 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        ours = resize(image, (after[0], after[1]), resample)
        assert ours.size == (after[0], after[1])
        assert np.array_equal(np.asarray(ours), np.asarray(image.resize((after[0], after[1]), resample)))
