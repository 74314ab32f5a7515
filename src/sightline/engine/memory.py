"""How the device's memory is spent: weights, pictures' features, K/V pages."""

from __future__ import annotations

import os

import torch

from sightline.config import EngineConfig
from sightline.errors import OutOfMemoryError
from sightline.models import KVSpec
from sightline.types import MemoryPlan

PAGE_SIZE = 16
_GIB = 1 << 30
# Enough for hundreds of pictures of a small model; a CPU server should not take a laptop's memory by default.
_CPU_KV_BYTES = 2 * _GIB
_CPU_VISION_BYTES = _GIB // 4
# For CUDA graphs, libraries' workspaces and fragmentation.
_CUDA_RESERVE = 3 * _GIB


def plan_memory(
    config: EngineConfig,
    spec: KVSpec,
    *,
    weights: int,
    activation: int,
    model_context: int,
    max_running: int,
    dtype: torch.dtype,
    device: torch.device,
    free_elsewhere: int | None = None,
) -> MemoryPlan:
    """Split what is left after weights and the activation peak. All sizes in bytes, on each rank.

    weights are allocated already. free_elsewhere: what the device of another rank has left, the least of them. activation: the peak of one step; on a GPU it counts only where no
    `mem_fraction_static` says how much is to be left for it.

    Raises `OutOfMemoryError` naming the flag that helps, when less than one context of K/V would fit and no context was
    asked for that does.
    """
    per_token = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * dtype.itemsize
    context = config.context_length or model_context
    vision = int(config.vision_cache_gb * _GIB) if config.vision_cache_gb is not None else _default_vision(device)
    free = _available(config, device, weights, activation, free_elsewhere) - weights - vision
    if config.max_total_tokens is not None:
        tokens = config.max_total_tokens
    else:
        tokens = free // per_token
        if device.type == "cpu":
            tokens = min(tokens, _CPU_KV_BYTES // config.num_ranks // per_token, context * max_running)
    # Page 0 is the null page, which padding may touch.
    num_pages = max(0, int(tokens)) // PAGE_SIZE
    usable = num_pages * PAGE_SIZE
    if config.context_length is None:
        context = min(context, usable)
    if usable < max(context, 2 * PAGE_SIZE) or num_pages * PAGE_SIZE * per_token > free:
        raise OutOfMemoryError(
            f"{usable} tokens of K/V ({usable * per_token / _GIB:.2f} GiB) do not hold one context of {context} tokens in "
            f"the {max(free, 0) / _GIB:.2f} GiB left beside weights ({weights / _GIB:.2f} GiB), activations "
            f"({activation / _GIB:.2f} GiB) and pictures ({vision / _GIB:.2f} GiB). Lower --context-length, "
            "--vision-cache-gb or --max-total-tokens, or raise --mem-fraction-static."
        )
    return MemoryPlan(
        device=str(device),
        weights=weights,
        vision_cache=vision,
        kv_cache=usable * per_token,
        kv_bytes_per_token=per_token,
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        context_length=context,
        max_running_requests=max_running,
    )


def _default_vision(device: torch.device) -> int:
    return _CPU_VISION_BYTES if device.type == "cpu" else 4 * _GIB


def _available(
    config: EngineConfig, device: torch.device, weights: int, activation: int, free_elsewhere: int | None
) -> int:
    """Bytes for weights, pictures and K/V."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if free_elsewhere is not None:
            free = min(free, free_elsewhere)
        if config.mem_fraction_static is not None:
            return int(total * config.mem_fraction_static)
        return free + weights - activation - _CUDA_RESERVE
    return int(device_memory(device) * (config.mem_fraction_static or 0.5)) // config.num_ranks


def device_memory(device: torch.device) -> int:
    """Bytes that the device has."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def max_running_requests(config: EngineConfig, device: torch.device) -> int:
    """Requests computed at once."""
    return config.max_running_requests or (32 if device.type == "cpu" else 256)


def module_bytes(module: torch.nn.Module) -> int:
    """Bytes of parameters and buffers, shared ones counted once."""
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers())}
    return sum(tensors.values())
