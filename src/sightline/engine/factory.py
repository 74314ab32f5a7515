"""Builds an `EngineCore` from a checkpoint folder: load, plan memory, allocate, warm up; progress all the way."""

from __future__ import annotations

import gc
import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from sightline.attention.backend import AttentionBackend, KVCache
from sightline.attention.torch_sdpa import TorchSDPABackend
from sightline.cache.page_pool import PagePool
from sightline.cache.radix import RadixCache
from sightline.cache.vision_cache import VisionCache
from sightline.config import EngineConfig
from sightline.engine.core import EngineCore
from sightline.engine.cuda_graph import StepGraphs
from sightline.engine.encoder import Encoder
from sightline.engine.grammar import GrammarCompiler
from sightline.engine.memory import PAGE_SIZE, max_running_requests, module_bytes, plan_memory
from sightline.engine.peak import largest_picture, measure_peak, step_cache
from sightline.engine.runner import ModelRunner
from sightline.engine.sampler import Sampler
from sightline.engine.scheduler import Scheduler, SchedulerConfig
from sightline.errors import DeviceError
from sightline.models.loader import architecture, load_model, read_config
from sightline.prompt.processor import load_processor
from sightline.registry import FAMILIES
from sightline.types import EngineRequest, LoadProgress, MemoryPlan, SamplingParams, TokenEvent, ids_to_bytes

logger = logging.getLogger("sightline.engine")

# On a GPU, unless --chunked-prefill-size says otherwise. Rows of a step that also decodes: they bound the time between two tokens
# while others' prompts come in. For prompts of one or two thousand tokens more is not faster, because fewer decode rows ride along.
_MAX_MIXED_TOKENS = 768
# Of families that make more than this of a picture of 1024 x 1024: LLaVA-OneVision's 7425 tokens would take ten steps of 768.
_LONG_PICTURE, _MAX_MIXED_TOKENS_LONG = 4096, 2048
# On a GPU. Features encoded at once: a few pictures fill the device, and prompts wait for the whole batch.
_MAX_ENCODE_TOKENS = 1024


def build_core(
    config: EngineConfig, model_dir: Path, on_progress: Callable[[LoadProgress], None]
) -> tuple[EngineCore, MemoryPlan]:
    """Raises `StartupError` subclasses that carry the exit code."""
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    if device.type == "cuda":
        # Everything of this thread: beside it, the encoder's stream gives way.
        torch.cuda.set_stream(torch.cuda.Stream(device, priority=-1))
        # what an earlier engine of this process left
        gc.collect()
        torch.cuda.empty_cache()
    if config.num_threads is not None or config.dp_size > 1:
        torch.set_num_threads(config.num_threads or max(1, len(os.sched_getaffinity(0)) // config.dp_size))
    torch.manual_seed(config.random_seed or 0)
    hf_config = read_config(model_dir)

    def on_bytes(fraction: float, detail: str) -> None:
        on_progress(LoadProgress("weights", fraction, detail))

    on_progress(LoadProgress("weights", 0.0))
    model: Any = load_model(
        model_dir,
        architecture(hf_config),
        dtype=dtype,
        device=device,
        load_format=config.load_format,
        on_progress=on_bytes,
    )
    on_progress(LoadProgress("memory"))
    eos = eos_token_ids(model_dir, hf_config)
    max_step = config.chunked_prefill_size or (2048 if device.type == "cpu" else 8192)
    max_running = max_running_requests(config, device)
    overlap = device.type == "cuda" and not config.disable_overlap_schedule
    runner = ModelRunner(
        model,
        cache=step_cache(model.kv_spec, max_step, dtype, device),
        backend=_backend(config.attention_backend, device),
        vision_cache=VisionCache(0),
        encoder=Encoder(model, device, background=overlap, graphs=overlap and not config.disable_cuda_graph),
        sampler=Sampler(model.config.vocab_size, device, config.random_seed),
        device=device,
        eos_token_ids=eos,
    )
    plan = plan_memory(
        config,
        model.kv_spec,
        weights=module_bytes(model),
        activation=_peak(runner, model_dir, hf_config, max_step, max_running),
        model_context=model.config.max_position_embeddings,
        max_running=max_running,
        dtype=dtype,
        device=device,
    )
    runner.vision_cache = vision_cache = VisionCache(plan.vision_cache)
    # One page more than planned: page 0 is the null page.
    pool = PagePool(plan.num_pages + 1)
    runner.cache = KVCache.allocate(
        num_layers=model.kv_spec.num_layers,
        num_pages=plan.num_pages + 1,
        page_size=PAGE_SIZE,
        num_kv_heads=model.kv_spec.num_kv_heads,
        head_dim=model.kv_spec.head_dim,
        dtype=dtype,
        device=device,
    )
    max_mixed = (config.chunked_prefill_size or _mixed_tokens(model_dir, hf_config)) if device.type == "cuda" else None
    scheduler_config = _scheduler_config(runner, plan, max_step, max_mixed, dtype)
    if not scheduler_config.cross_attention:
        plan = msgspec.structs.replace(plan, image_token_bytes=scheduler_config.image_token_bytes)
    scheduler = Scheduler(
        scheduler_config,
        pool,
        None if config.disable_radix_cache else RadixCache(pool, PAGE_SIZE),
        vision_cache,
        runner.features_ready if overlap else lambda digest: True,
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
    on_progress(LoadProgress("warm-up"))
    _warm_up(core)
    if max_mixed is not None and runner.backend.capturable and not config.disable_cuda_graph:
        runner.graphs = _capture(config, runner, plan, max_mixed, on_progress)
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
    return _MAX_MIXED_TOKENS_LONG if is_long else _MAX_MIXED_TOKENS


def _peak(runner: ModelRunner, model_dir: Path, hf_config: dict, max_step: int, max_running: int) -> int:
    """Bytes of one step's activations; 0 on a CPU, where they are small and nothing is reserved."""
    if runner.device.type == "cpu":
        return 0
    largest = largest_picture(FAMILIES[architecture(hf_config)].processor, model_dir)
    num_pictures = 1
    if largest is not None and largest.scale == 1.0:
        num_pictures = max(1, min(max_step, _MAX_ENCODE_TOKENS) // max(runner.num_features(largest.image), 1))
    peak = measure_peak(runner, largest, num_pictures, max_step=max_step, max_running=max_running)
    torch.cuda.empty_cache()
    return peak


def _capture(
    config: EngineConfig,
    runner: ModelRunner,
    plan: MemoryPlan,
    max_mixed: int,
    on_progress: Callable[[LoadProgress], None],
) -> StepGraphs:
    graphs = StepGraphs(
        runner.model,
        runner.cache,
        runner.backend,
        max_batch=min(config.cuda_graph_max_bs or plan.max_running_requests, plan.max_running_requests),
        max_running=plan.max_running_requests,
        max_mixed=max_mixed,
        num_heads=runner.model.config.num_attention_heads,
        max_pages=-(-plan.context_length // PAGE_SIZE),
        device=runner.device,
    )
    graphs.capture(lambda fraction: on_progress(LoadProgress("graphs", fraction)))
    return graphs


def _scheduler_config(
    runner: ModelRunner, plan: MemoryPlan, max_step: int, max_mixed: int | None, dtype: torch.dtype
) -> SchedulerConfig:
    model = runner.model
    on_gpu = runner.device.type == "cuda"
    config = SchedulerConfig(
        page_size=PAGE_SIZE,
        max_step_tokens=max_step,
        max_running=plan.max_running_requests,
        max_mixed_tokens=max_mixed,
        max_encode_tokens=min(max_step, _MAX_ENCODE_TOKENS) if on_gpu else max_step,
        image_token_bytes=model.config.hidden_size * dtype.itemsize,
    )
    if not runner.cross_attention:
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
