"""Compiles a GPU's kernels side by side, before they are needed.

Triton compiles a kernel at its first launch, and runs a C compiler for what launches it: one after the other that took 10 of
the 30 s of a first start. So the steps of a start are rehearsed as soon as the model has its memory: launches only hand
their kernels to a pool of threads, which go on while the weights are loaded. Half of a compilation is Python, so what Triton's cache
lacks is compiled in forks of this process, which leave it there; the threads then only load it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from sightline.cache.vision_cache import VisionCache
from sightline.engine.encoder import Encoder
from sightline.engine.executor import Executor, GraphSizes
from sightline.engine.memory import PAGE_SIZE
from sightline.engine.peak import Blank, blank_request
from sightline.engine.runner import ModelRunner
from sightline.engine.sampler import Sampler
from sightline.engine.scheduler import ScheduledRow
from sightline.models.decoder import Decoder

logger = logging.getLogger("sightline.engine")

# Sizes of decode steps between which kernels or their tiles differ.
_DECODE_ROWS = (1, 16, 32, 64)
_PROMPTS = (PAGE_SIZE - 1, 2 * PAGE_SIZE - 1, 1024)
# Of a kernel that takes two: a fork hangs if a lock that it needs was held by another thread.
_FORK_SECONDS = 20.0


class _Compilers(ThreadPoolExecutor):
    """Threads that leave a kernel ready to be launched."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return super().submit(_ready_to_launch, fn, *args, **kwargs)


def _ready_to_launch(compile_kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    kernel = compile_kernel(*args, **kwargs)
    # the property makes its launcher and loads both
    _ = kernel.run
    return kernel


def _mode(compilers: ThreadPoolExecutor) -> Any:
    """Triton's, in which launches hand their kernels to `compilers`."""
    from triton import AsyncCompileMode
    from triton.runtime.cache import get_cache_manager

    class Mode(AsyncCompileMode):
        def submit(self, key: str, compile_kernel: Callable[[], Any], *more: Any) -> Any:
            place = get_cache_manager(hashlib.sha256(key.encode()).hexdigest()).cache_dir
            if not os.listdir(place):
                compile_kernel = partial(_compile_in_a_fork, compile_kernel)
            return super().submit(key, compile_kernel, *more)

    return Mode(compilers, ignore_errors=True)


def _compile_in_a_fork(compile_kernel: Callable[[], Any]) -> Any:
    # no memory for a fork, or SIGCHLD ignored: then this thread compiles
    with suppress(OSError):
        _in_a_fork(compile_kernel)
    return compile_kernel()


def _in_a_fork(work: Callable[[], object]) -> None:
    """Do it for what it leaves on disk. Whether it succeeded is not told: the caller does it again."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    end = time.monotonic() + _FORK_SECONDS
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > end:
            logger.warning("a kernel's compiler was stopped after %.0f s", _FORK_SECONDS)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return
        time.sleep(0.005)


@contextmanager
def compiling_ahead(rehearsal: Callable[[], None]) -> Iterator[None]:
    """Run `rehearsal`, whose kernels are compiled until the end of the body and not launched.

    What cannot be compiled is tried again, and reported, where it is launched.
    """
    began = time.monotonic()
    current = torch.cuda.current_device()
    with _Compilers(len(os.sched_getaffinity(0)), "compile", torch.cuda.set_device, (current,)) as compilers:
        mode = _mode(compilers)
        with mode:
            with launches_only_compile():
                try:
                    rehearsal()
                except Exception as error:
                    logger.warning("not all kernels are compiled ahead: %s: %s", type(error).__name__, error)
            num_kernels = len(mode.raw_futures)
            rehearsed = time.monotonic()
            yield
            loaded = time.monotonic()
    logger.info(
        "compiled %d kernels: %.1f s of rehearsal, %.1f s behind the weights",
        num_kernels,
        rehearsed - began,
        time.monotonic() - loaded,
    )


@contextmanager
def launches_only_compile() -> Iterator[None]:
    """For this process: nobody else launches during a start."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = run


def rehearse(executor: Executor, pictures: Sequence[Blank], *, max_step: int, max_running: int) -> None:
    """Steps of all kinds, and pictures, through a model whose weights are arbitrary. Its cache is a `step_cache`."""
    # without graphs, which would remember these shapes
    encoder = Encoder(executor.model, executor.device, executor.group)
    sampler = Sampler(executor.model.config.vocab_size, executor.device)
    runner = ModelRunner(executor, vision_cache=VisionCache(0), sampler=sampler, eos_token_ids=())
    with executor.group.silent(), _one_layer_of_each_kind(executor.model):
        # Llama 3.2's tower looks at its weights, and remembers what it saw
        for picture in () if executor.cross_attention else pictures:
            for _ in _encode(encoder, picture):
                pass
        for num_tokens in (max_step, *(n for n in _PROMPTS if n < max_step)):
            request = blank_request(runner, num_tokens)
            runner.forward([ScheduledRow(request, 0, num_tokens, True)], 0)
        prompts = [blank_request(runner, 1) for _ in range(min(max_running, max_step))]
        runner.forward([ScheduledRow(request, 0, 1, True) for request in prompts], 0)
        for num_rows in (*(n for n in _DECODE_ROWS if n < max_running), max_running):
            _decode(runner, num_rows)
        if executor.cross_attention and executor.backend.capturable:
            _decode_beside_pictures(executor, max_running)


@contextmanager
def _one_layer_of_each_kind(model: nn.Module) -> Iterator[None]:
    """Of its decoders, and the last: the others launch nothing else, and threads that compile want Python's lock, too."""
    decoders = [module for module in model.modules() if isinstance(module, Decoder)]
    whole = [decoder.layers for decoder in decoders]
    for decoder, layers in zip(decoders, whole, strict=True):
        kinds = {type(layer): layer for layer in reversed(layers[:-1])}
        decoder.layers = nn.ModuleList([*kinds.values(), layers[-1]])
    try:
        yield
    finally:
        for decoder, layers in zip(decoders, whole, strict=True):
            decoder.layers = layers


def _encode(encoder: Encoder, picture: Blank) -> Iterator[float]:
    encoder.kept((yield from encoder.encoding([picture.image], [picture.pixels])))


def _decode(runner: ModelRunner, num_rows: int) -> None:
    requests = [blank_request(runner, 1) for _ in range(num_rows)]
    for request in requests:
        request.output_ids.append(0)
    runner.forward([ScheduledRow(request, 0, 1, True) for request in requests], num_rows)


@torch.inference_mode()
def _decode_beside_pictures(executor: Executor, max_running: int) -> None:
    """As for a graph: it looks up what rows see on the device, where nothing is."""
    graphs = executor.new_graphs(GraphSizes(max_running, max_running, max_running, max_pages=1))
    for key in graphs.planned:
        if key.sees and key.tokens in (*_DECODE_ROWS, max_running):
            graphs.compute(key)
