"""How much memory one step takes at most on a GPU, by running the largest there are before the K/V cache is allocated."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from sightline.attention.backend import KVCache
from sightline.engine.encoder import MAX_GRAPH_FEATURES
from sightline.engine.memory import PAGE_SIZE
from sightline.engine.request import Request
from sightline.engine.runner import ModelRunner
from sightline.engine.scheduler import ScheduledRow
from sightline.models import KVSpec
from sightline.prompt.processor import ImagePlan, PixelLimits, Processor, load_processor
from sightline.types import ImageRef, Pixels, SamplingParams

logger = logging.getLogger("sightline.engine")

# A side longer than any family keeps, and the shapes among which the costliest picture is.
_SIDE = 6000
_SHAPES = ((1, 1), (1, 2), (2, 1), (1, 4), (4, 1))
_ENOUGH = 4096
_ONE_TOKEN = SamplingParams(max_tokens=1)
_USUAL = ((1024, 1024), (256, 256))


class Blank(NamedTuple):
    """A black picture that is yet to be resized. scale: how many times as many features the one has that it stands for."""

    image: ImageRef
    pixels: Pixels
    scale: float = 1.0


def largest_picture(processor_path: str | None, model_dir: Path) -> Blank | None:
    """The picture with the most tokens that the family's processor makes; None for text alone.

    Time grows with the square of a picture's patches, but memory does not: above some thousand features a smaller one stands
    in for it.
    """
    processor = load_processor(processor_path, model_dir)
    return None if processor is None else _largest(processor)


def _largest(processor: Processor) -> Blank:
    shapes = [(_SIDE // w, _SIDE // h) for w, h in _SHAPES]
    width, height = max(shapes, key=lambda size: processor.plan(*size).num_tokens)
    largest = plan = processor.plan(width, height)
    if largest.num_tokens > _ENOUGH:
        max_pixels = largest.width * largest.height * _ENOUGH // largest.num_tokens
        plan = processor.plan(width, height, PixelLimits(max_pixels=max_pixels))
    return _blank(processor, plan)._replace(scale=largest.num_tokens / plan.num_tokens)


def blank_pictures(processor_path: str | None, model_dir: Path) -> list[Blank]:
    """The largest and some like those that clients send; none for text alone."""
    processor = load_processor(processor_path, model_dir)
    if processor is None:
        return []
    return [_largest(processor), *(_blank(processor, processor.plan(*size)) for size in _USUAL)]


def _blank(processor: Processor, plan: ImagePlan) -> Blank:
    # twice the sides of what becomes of it: about as much larger as a picture that a GPU gets may be
    size = (2 * plan.width, 2 * plan.height)
    pixels = Pixels(np.zeros((size[1], size[0], 3), dtype=np.uint8), processor.views(size, plan))
    return Blank(ImageRef(b"blank", 0, plan.num_tokens, plan.grid), pixels)


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
    runner: ModelRunner, largest: Blank | None, num_pictures: int, *, max_step: int, max_running: int
) -> int:
    """Bytes above what is allocated now: num_pictures of `largest` in the encoder and, beside it, a step of max_step tokens and
    the sampling of max_running rows with every filter. The runner's cache is a `step_cache`."""
    device = runner.executor.device
    rows = min(max_running, max_step)

    def encode() -> None:
        assert largest is not None
        _encode(runner, largest, num_pictures)

    def run(requests: Sequence[Request]) -> None:
        launched = runner.forward([ScheduledRow(r, 0, r.prompt_len, True) for r in requests], 0)
        runner.sample(launched)
        runner.collect(launched)

    def step() -> None:
        run([blank_request(runner, max_step)])

    def sample() -> None:
        params = SamplingParams(max_tokens=1, top_p=0.5, top_k=50, min_p=0.01, logprobs=20)
        run([blank_request(runner, 1, params) for _ in range(rows)])

    pictures = int(largest.scale * _peak(device, encode)) if largest is not None else 0
    return pictures + max(_peak(device, step), _peak(device, sample))


def encoder_rate(runner: ModelRunner, largest: Blank) -> float:
    """Floating-point operations a second of the vision tower, behind a `measure_peak` that compiled its kernels."""
    device, seconds = runner.executor.device, 0.0
    # the second time, pictures that get graphs are captured
    for _ in range(2 if largest.image.num_tokens <= MAX_GRAPH_FEATURES else 1):
        with torch.inference_mode():
            torch.cuda.synchronize(device)
            began = time.perf_counter()
            flops = _encode(runner, largest, 1)
            torch.cuda.synchronize(device)
            seconds = time.perf_counter() - began
    return flops / seconds


def _encode(runner: ModelRunner, largest: Blank, num_pictures: int) -> float:
    """Its floating-point operations."""
    source = runner.new_pixels(largest.pixels.array.shape, np.uint8)
    source[:] = largest.pixels.array
    pixels = largest.pixels._replace(array=source)
    flops = sum(runner.encoding([largest.image] * num_pictures, [pixels] * num_pictures))
    if runner.workers is not None:
        runner.workers.forget(largest.image.digest)
    return flops


def blank_request(runner: ModelRunner, num_tokens: int, params: SamplingParams = _ONE_TOKEN) -> Request:
    """A prompt of zeros, with pages of the runner's `step_cache`."""
    ids = np.zeros(num_tokens, dtype=np.int32)
    request = Request("peak", 0, ids, params, 1, runner.new_state(params, ids, 0))
    request.pages = list(range(1, -(-len(ids) // PAGE_SIZE) + 1))
    return request


def _peak(device: torch.device, work: Callable[[], None]) -> int:
    began = time.perf_counter()
    with torch.inference_mode():
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    logger.debug("measured %s: %.2f GiB in %.1f s", work.__name__, peak / 2**30, time.perf_counter() - began)
    return peak
