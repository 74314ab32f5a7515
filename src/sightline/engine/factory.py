"""Builds an `EngineCore` from a checkpoint folder: load, plan memory, allocate, warm up; progress all the way."""

from __future__ import annotations

import gc
import json
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from sightline.attention.backend import AttentionBackend
from sightline.attention.torch_sdpa import TorchSDPABackend
from sightline.cache.page_pool import PagePool
from sightline.cache.radix import RadixCache
from sightline.cache.vision_cache import VisionCache
from sightline.config import EngineConfig
from sightline.engine.ahead import compiling_ahead, rehearse
from sightline.engine.core import EngineCore
from sightline.engine.encoder import Encoder
from sightline.engine.executor import Executor, GraphSizes
from sightline.engine.grammar import GrammarCompiler
from sightline.engine.memory import PAGE_SIZE, max_running_requests, module_bytes, plan_memory
from sightline.engine.node_link import check_nodes
from sightline.engine.peak import blank_pictures, encoder_rate, largest_picture, measure_peak, step_cache
from sightline.engine.runner import ModelRunner
from sightline.engine.sampler import Sampler
from sightline.engine.scheduler import Scheduler, SchedulerConfig
from sightline.engine.threads import ComputeThreads
from sightline.engine.workers import Workers
from sightline.errors import DeviceError, SettingError
from sightline.models.loader import architecture, build_model, fill_model, model_class_and_config, read_config
from sightline.parallel import Group
from sightline.prompt.processor import load_processor
from sightline.registry import FAMILIES
from sightline.types import EngineRequest, LoadProgress, MemoryPlan, SamplingParams, TokenEvent, ids_to_bytes

logger = logging.getLogger("sightline.engine")

# On a GPU, unless --chunked-prefill-size says otherwise. Rows of a step that also decodes: they bound the time between two tokens
# while others' prompts come in. For prompts of one or two thousand tokens more is not faster, because fewer decode rows ride along.
_MIXED_TOKENS = 768
# At most, where many wait, of families that make more than this of a picture of 1024 x 1024: LLaVA-OneVision's 7425 tokens would take
# ten steps of 768. The products of 3584 rows fill three times the 132 multiprocessors of an H200 nearly whole.
_LONG_PICTURE, _MAX_MIXED_TOKENS_LONG = 4096, 3584
# On a GPU, for each rank. Features encoded at once: a few pictures fill the device, and prompts wait for the whole batch.
_MAX_ENCODE_TOKENS = 1024


def build_core(
    config: EngineConfig,
    model_dir: Path,
    on_progress: Callable[[LoadProgress], None],
    run_dir: Path | None = None,
) -> tuple[EngineCore, MemoryPlan]:
    """run_dir: see `sightline.engine.process`; with `tp_size` it is needed, and the core's runner has workers to be closed.

    Raises `StartupError` subclasses that carry the exit code.
    """
    group = Group(0, config.tp_size)
    workers = None
    if group.size > 1:
        assert run_dir is not None, "the ranks meet in the run directory"
        check_group(config, model_dir)
        workers = Workers(run_dir, group, config, model_dir)
    try:
        return _build_core(config, model_dir, on_progress, group, workers)
    except BaseException as error:
        if workers is not None:
            workers.close(getattr(error, "exit_code", 1), f"node 0: {error}")
        raise


def check_group(config: EngineConfig, model_dir: Path) -> None:
    """Raises `SettingError` for a world size that cannot divide the model, or that nodes cannot divide, and `DeviceError` for one
    without enough GPUs here."""
    sizes = model_class_and_config(model_dir, architecture(read_config(model_dir)))[1].group_sizes
    valid = ", ".join(map(str, sizes))
    if config.tp_size not in sizes:
        raise SettingError(
            f"--tp-size {config.tp_size}: the heads and the MLP of this model cannot be divided by that; valid sizes: {valid}."
        )
    check_nodes(config)
    needed = config.ranks_per_node
    if choose_device(config.device).type == "cuda" and (found := torch.cuda.device_count()) < needed:
        on_each = f" on each of {config.nnodes} nodes" if config.nnodes > 1 else ""
        fitting = ", ".join(str(n) for n in sizes if n <= found * config.nnodes and n % config.nnodes == 0)
        raise DeviceError(
            f"--tp-size {config.tp_size} needs {needed} GPUs{on_each}, and {found} can be seen (CUDA_VISIBLE_DEVICES); valid "
            f"sizes with those: {fitting}."
        )


def build_executor(
    config: EngineConfig, model_dir: Path, group: Group, on_progress: Callable[[float, str], None]
) -> Executor:
    """What every rank begins with: its device, its share of the weights, and a K/V cache that is just enough to measure steps."""
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    if device.type == "cuda":
        if group.size > 1:
            device = torch.device("cuda", group.rank % config.ranks_per_node)
            torch.cuda.set_device(device)
        # not the default one, which cannot be captured
        torch.cuda.set_stream(torch.cuda.Stream(device))
        # what an earlier engine of this process left
        gc.collect()
        torch.cuda.empty_cache()
    if config.num_threads is not None or config.num_ranks > 1:
        torch.set_num_threads(config.num_threads or max(1, len(os.sched_getaffinity(0)) // config.num_ranks))
    threads = ComputeThreads() if device.type == "cpu" else None
    torch.manual_seed(config.random_seed or 0)
    hf_config = read_config(model_dir)
    model: Any = build_model(model_dir, architecture(hf_config), dtype=dtype, device=device, group=group)
    executor = Executor(
        model,
        group,
        cache=step_cache(model.kv_spec, _max_step(config, device), dtype, device),
        backend=_backend(config.attention_backend, device),
        encoder=Encoder(model, device, group, device.type == "cuda" and not config.disable_cuda_graph, threads),
        device=device,
        features=VisionCache(0).get,
        threads=threads,
    )
    with _compiling(config, model_dir, hf_config, executor):
        fill_model(model, model_dir, load_format=config.load_format, on_progress=on_progress)
    return executor


def _compiling(
    config: EngineConfig, model_dir: Path, hf_config: dict, executor: Executor
) -> AbstractContextManager[None]:
    """On a GPU: compiles what the steps of a start launch, beside the body."""
    device = executor.device
    if device.type == "cpu":
        return nullcontext()

    def rehearsal() -> None:
        pictures = blank_pictures(FAMILIES[architecture(hf_config)].processor, model_dir)
        max_running = max_running_requests(config, device)
        rehearse(executor, pictures, max_step=_max_step(config, device), max_running=max_running)

    return compiling_ahead(rehearsal)


def _overlaps(config: EngineConfig, device: torch.device) -> bool:
    return device.type == "cuda" and not config.disable_overlap_schedule


def _max_step(config: EngineConfig, device: torch.device) -> int:
    return config.chunked_prefill_size or (2048 if device.type == "cpu" else 8192)


def _build_core(
    config: EngineConfig,
    model_dir: Path,
    on_progress: Callable[[LoadProgress], None],
    group: Group,
    workers: Workers | None,
) -> tuple[EngineCore, MemoryPlan]:
    hf_config = read_config(model_dir)
    on_progress(LoadProgress("weights", 0.0))
    executor = build_executor(
        config, model_dir, group, lambda fraction, detail: on_progress(LoadProgress("weights", fraction, detail))
    )
    if workers is not None:
        workers.connect(executor.device)
    on_progress(LoadProgress("memory"))
    model, device, dtype = executor.model, executor.device, executor.cache.k[0].dtype
    eos = eos_token_ids(model_dir, hf_config)
    max_step = _max_step(config, device)
    max_running = max_running_requests(config, device)
    overlap = _overlaps(config, device)
    runner = ModelRunner(
        executor,
        vision_cache=VisionCache(0),
        sampler=Sampler(model.config.vocab_size, device, config.random_seed),
        eos_token_ids=eos,
        workers=workers,
    )
    peak = _peak(runner, model_dir, hf_config, max_step, max_running)
    plan = plan_memory(
        config,
        model.kv_spec,
        weights=module_bytes(model),
        activation=peak,
        model_context=model.config.max_position_embeddings,
        max_running=max_running,
        dtype=dtype,
        device=device,
        free_elsewhere=workers.free_memory() if workers is not None and device.type == "cuda" else None,
    )
    on_progress(LoadProgress("cache"))
    vision_cache = VisionCache(plan.vision_cache, workers.forget if workers is not None else None)
    runner.use(vision_cache)
    # One page more than planned: page 0 is the null page.
    pool = PagePool(plan.num_pages + 1)
    runner.allocate(plan.num_pages + 1)
    max_mixed = (config.chunked_prefill_size or _mixed_tokens(model_dir, hf_config)) if device.type == "cuda" else None
    scheduler_config = _scheduler_config(runner, plan, max_step, max_mixed, dtype)
    if not scheduler_config.cross_attention:
        plan = msgspec.structs.replace(plan, image_token_bytes=scheduler_config.image_token_bytes)
    scheduler = Scheduler(
        scheduler_config,
        pool,
        None if config.disable_radix_cache else RadixCache(pool, PAGE_SIZE),
        vision_cache,
        encode_beside=device.type == "cuda",
    )
    core = EngineCore(
        scheduler,
        runner,
        eos_token_ids=eos,
        context_length=plan.context_length,
        overlap=overlap,
        grammars=GrammarCompiler(model_dir, eos, model.config.vocab_size),
        decode_log_interval=config.decode_log_interval,
    )
    if max_mixed is not None and executor.backend.capturable and not config.disable_cuda_graph:
        runner.capture(
            _graph_sizes(config, plan, max_mixed), lambda fraction: on_progress(LoadProgress("graphs", fraction))
        )
    on_progress(LoadProgress("warm-up"))
    _warm_up(core)
    return core, plan


def _backend(name: str, device: torch.device) -> AttentionBackend:
    if name == "torch" or (name == "auto" and device.type == "cpu"):
        return TorchSDPABackend()
    if device.type == "cpu":
        raise DeviceError("--attention-backend triton needs a GPU; leave it out on a CPU.")
    from sightline.attention.triton import TritonBackend

    return TritonBackend()


def _mixed_tokens(model_dir: Path, hf_config: dict) -> int:
    processor = load_processor(FAMILIES[architecture(hf_config)].processor, model_dir)
    is_long = processor is not None and processor.plan(1024, 1024).num_tokens > _LONG_PICTURE
    return _MAX_MIXED_TOKENS_LONG if is_long else _MIXED_TOKENS


def _peak(runner: ModelRunner, model_dir: Path, hf_config: dict, max_step: int, max_running: int) -> int:
    """Bytes of one step's activations; 0 on a CPU, where they are small and nothing is reserved. On a GPU the encoder learns how
    fast it is, too."""
    if runner.executor.device.type == "cpu":
        return 0
    largest = largest_picture(FAMILIES[architecture(hf_config)].processor, model_dir)
    num_pictures = 1
    if largest is not None and largest.scale == 1.0:
        num_pictures = max(1, _encode_tokens(runner, max_step) // max(runner.num_features(largest.image), 1))
    peak = measure_peak(runner, largest, num_pictures, max_step=max_step, max_running=max_running)
    if largest is not None:
        runner.executor.encoder.flops_per_second = encoder_rate(runner, largest)
    torch.cuda.empty_cache()
    return peak


def _graph_sizes(config: EngineConfig, plan: MemoryPlan, max_mixed: int) -> GraphSizes:
    return GraphSizes(
        max_batch=min(config.cuda_graph_max_bs or plan.max_running_requests, plan.max_running_requests),
        max_running=plan.max_running_requests,
        max_mixed=max_mixed,
        max_pages=-(-plan.context_length // PAGE_SIZE),
    )


def _encode_tokens(runner: ModelRunner, max_step: int) -> int:
    return min(max_step, _MAX_ENCODE_TOKENS * runner.executor.group.size)


def _scheduler_config(
    runner: ModelRunner, plan: MemoryPlan, max_step: int, max_mixed: int | None, dtype: torch.dtype
) -> SchedulerConfig:
    model = runner.executor.model
    on_gpu = runner.executor.device.type == "cuda"
    config = SchedulerConfig(
        page_size=PAGE_SIZE,
        max_step_tokens=max_step,
        max_running=plan.max_running_requests,
        max_mixed_tokens=max_mixed,
        min_mixed_tokens=None if max_mixed is None else min(_MIXED_TOKENS, max_mixed),
        max_encode_tokens=_encode_tokens(runner, max_step) if on_gpu else max_step,
        image_token_bytes=model.config.hidden_size * dtype.itemsize,
    )
    if not runner.executor.cross_attention:
        return config
    return replace(
        config,
        image_token_bytes=model.feature_width * dtype.itemsize,
        num_features=runner.num_features,
        cross_attention=True,
    )


def _warm_up(core: EngineCore) -> None:
    """Answer one request, so that `ready` means that a real one would run. Uses ids that any vocabulary has."""
    message = EngineRequest(
        request_id="warm-up",
        input_ids=ids_to_bytes(np.zeros(PAGE_SIZE - 1, dtype=np.int32)),
        sampling=SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True),
        cache_salt=b"warm-up",
    )
    core.add(message)
    finished = False
    logger.disabled = True
    try:
        while not finished:
            events = core.step()
            finished = any(isinstance(e, TokenEvent) and e.finish_reason is not None for e in events)
    finally:
        logger.disabled = False
    if core.scheduler.radix is not None:
        core.scheduler.radix.reset()
    core.scheduler.assert_idle()
    core.stats = type(core.stats)(pages_total=core.stats.pages_total)


def choose_device(name: str) -> torch.device:
    """`auto` takes the GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise DeviceError(
            "--device cuda: torch finds no CUDA device; use --device cpu or install a CUDA build of torch."
        )
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on a CPU, where it is both exact and faster."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def eos_token_ids(model_dir: Path, hf_config: dict) -> tuple[int, ...]:
    """generation_config.json's eos_token_id (one or several), else config.json's."""
    path = model_dir / "generation_config.json"
    generation = json.loads(path.read_text()) if path.exists() else {}
    eos = generation.get("eos_token_id", hf_config.get("eos_token_id"))
    if eos is None:
        eos = hf_config.get("text_config", {}).get("eos_token_id")
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (eos,)
