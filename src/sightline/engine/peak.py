"""How much memory one step takes at most on a GPU, by running the largest there are before the K/V cache is allocated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sightline.attention.backend import KVCache
from sightline.engine.memory import PAGE_SIZE
from sightline.engine.request import Request
from sightline.engine.runner import ModelRunner
from sightline.engine.scheduler import ScheduledRow
from sightline.models import KVSpec
from sightline.prompt.processor import load_processor
from sightline.types import ImageRef, SamplingParams

# A side longer than any family keeps, and the shapes among which the costliest picture is.
_SIDE = 6000
_SHAPES = ((1, 1), (1, 2), (2, 1), (1, 4), (4, 1))


def largest_picture(processor_path: str | None, model_dir: Path) -> tuple[ImageRef, np.ndarray] | None:
    """The picture with the most tokens that the family's processor makes, with black pixels; None for text alone."""
    processor = load_processor(processor_path, model_dir)
    if processor is None:
        return None
    plans = [processor.plan(_SIDE // w, _SIDE // h) for w, h in _SHAPES]
    plan = max(plans, key=lambda p: (p.num_tokens, p.width * p.height))
    pixels = processor.resize(Image.new("RGB", (plan.width, plan.height)), plan)
    return ImageRef(b"largest", 0, plan.num_tokens, plan.grid), np.array(pixels)


def step_cache(spec: KVSpec, max_step: int, dtype: torch.dtype, device: torch.device) -> KVCache:
    """Pages for one step, which all layers share: what they hold does not matter here."""
    cache = KVCache.allocate(
        num_layers=1,
        num_pages=-(-max_step // PAGE_SIZE) + 1,
        page_size=PAGE_SIZE,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=dtype,
        device=device,
    )
    return replace(cache, k=cache.k * spec.num_layers, v=cache.v * spec.num_layers)


def measure_peak(
    runner: ModelRunner, pictures: Sequence[tuple[ImageRef, np.ndarray]], *, max_step: int, max_running: int
) -> int:
    """Bytes above what is allocated now: `pictures` in the encoder and, beside it, a step of max_step tokens and the
    sampling of max_running rows with every filter. The runner's cache is a `step_cache`."""
    device = runner.device
    rows = min(max_running, max_step)

    def encode() -> None:
        images = [image for image, _ in pictures]
        runner.encoder.encode(images, [pixels for _, pixels in pictures])

    def step() -> None:
        launched = runner.forward([ScheduledRow(_request(runner, max_step), 0, max_step, True)], 0)
        runner.sample(launched)
        runner.collect(launched)

    def sample() -> None:
        hidden = torch.zeros(rows, runner.model.config.hidden_size, device=device, dtype=runner.cache.k[0].dtype)
        logits = runner.model.logits(hidden)
        params = SamplingParams(top_p=0.5, top_k=50, min_p=0.01, logprobs=20)
        states = [runner.sampler.new_state(params, np.zeros(1, dtype=np.int32), (), 0) for _ in range(rows)]
        runner.sampler.launch(logits, states).result()

    return (_peak(device, encode) if pictures else 0) + max(_peak(device, step), _peak(device, sample))


def _request(runner: ModelRunner, num_tokens: int) -> Request:
    params = SamplingParams(max_tokens=1)
    ids = np.zeros(num_tokens, dtype=np.int32)
    request = Request("peak", 0, ids, params, 1, runner.new_state(params, ids, 0))
    request.pages = list(range(1, -(-len(ids) // PAGE_SIZE) + 1))
    return request


def _peak(device: torch.device, work: Callable[[], None]) -> int:
    with torch.inference_mode():
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
