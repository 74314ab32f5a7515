"""Builds an `EngineCore` from a checkpoint folder: load, plan memory, allocate, warm up; progress all the way."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from sightline.attention.backend import KVCache
from sightline.attention.torch_sdpa import TorchSDPABackend
from sightline.cache.page_pool import PagePool
from sightline.cache.radix import RadixCache
from sightline.cache.vision_cache import VisionCache
from sightline.config import EngineConfig
from sightline.engine.core import EngineCore
from sightline.engine.memory import PAGE_SIZE, module_bytes, plan_memory
from sightline.engine.runner import ModelRunner, has_cross_attention
from sightline.engine.sampler import Sampler
from sightline.engine.scheduler import Scheduler, SchedulerConfig
from sightline.errors import DeviceError
from sightline.models.loader import architecture, load_model, read_config
from sightline.types import EngineRequest, LoadProgress, MemoryPlan, SamplingParams, TokenEvent, ids_to_bytes

logger = logging.getLogger("sightline.engine")


def build_core(
    config: EngineConfig, model_dir: Path, on_progress: Callable[[LoadProgress], None]
) -> tuple[EngineCore, MemoryPlan]:
    """Raises `StartupError` subclasses that carry the exit code."""
    device = _device(config.device)
    dtype = _dtype(config.dtype, device)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
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
    weights = module_bytes(model)
    max_step = config.chunked_prefill_size or (2048 if device.type == "cpu" else 8192)
    plan = plan_memory(
        config,
        model.kv_spec,
        weights=weights,
        activation=0 if device.type == "cpu" else _activation_bytes(model, max_step, dtype),
        model_context=model.config.max_position_embeddings,
        dtype=dtype,
        device=device,
    )
    vision_cache = VisionCache(plan.vision_cache)
    # One page more than planned: page 0 is the null page.
    pool = PagePool(plan.num_pages + 1)
    eos = eos_token_ids(model_dir, hf_config)
    runner = ModelRunner(
        model,
        cache=KVCache.allocate(
            num_layers=model.kv_spec.num_layers,
            num_pages=plan.num_pages + 1,
            page_size=PAGE_SIZE,
            num_kv_heads=model.kv_spec.num_kv_heads,
            head_dim=model.kv_spec.head_dim,
            dtype=dtype,
            device=device,
        ),
        backend=TorchSDPABackend(),
        vision_cache=vision_cache,
        sampler=Sampler(model.config.vocab_size, device, config.random_seed),
        device=device,
        eos_token_ids=eos,
    )
    scheduler_config = _scheduler_config(model, plan, max_step, dtype)
    if not scheduler_config.cross_attention:
        plan = msgspec.structs.replace(plan, image_token_bytes=scheduler_config.image_token_bytes)
    scheduler = Scheduler(
        scheduler_config,
        pool,
        None if config.disable_radix_cache else RadixCache(pool, PAGE_SIZE),
        vision_cache,
    )
    core = EngineCore(
        scheduler,
        runner,
        eos_token_ids=eos,
        context_length=plan.context_length,
        decode_log_interval=config.decode_log_interval,
    )
    on_progress(LoadProgress("warm-up"))
    _warm_up(core)
    return core, plan


def _scheduler_config(model: Any, plan: MemoryPlan, max_step: int, dtype: torch.dtype) -> SchedulerConfig:
    config = SchedulerConfig(
        page_size=PAGE_SIZE,
        max_step_tokens=max_step,
        max_running=plan.max_running_requests,
        max_encode_tokens=max_step,
        image_token_bytes=model.config.hidden_size * dtype.itemsize,
    )
    if not has_cross_attention(model):
        return config
    return replace(
        config,
        image_token_bytes=model.feature_width * dtype.itemsize,
        num_features=lambda image: model.num_features(image.grid),
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


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise DeviceError(
            "--device cuda: torch finds no CUDA device; use --device cpu or install a CUDA build of torch."
        )
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on a CPU, where it is both exact and faster."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _activation_bytes(model: Any, max_step: int, dtype: torch.dtype) -> int:
    """Upper bound of one step's activations on a GPU: a few live [max_step, intermediate] tensors, and the logits."""
    config = model.config
    wide = max_step * (4 * config.hidden_size + 3 * config.intermediate_size) * dtype.itemsize
    return int(wide + 256 * config.vocab_size * 4 * 3) + (2 << 30)


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
