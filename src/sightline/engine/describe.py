"""`sightline models PATH`: what a checkpoint folder is, what it needs, and whether it fits this machine.

The model is built without memory (torch's meta device) and the plan is the engine's own, so what is said here is what
`sightline serve` would find. What only a run can measure, the activations of a step on a GPU, is estimated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from sightline.config import EngineConfig
from sightline.engine.encoder import has_cross_attention
from sightline.engine.factory import check_group, choose_device, choose_dtype
from sightline.engine.memory import device_memory, max_running_requests, plan_memory
from sightline.errors import CheckpointError, OutOfMemoryError
from sightline.models.loader import architecture, model_class_and_config, read_config, weight_files
from sightline.parallel import Group
from sightline.prompt.chat_template import load_source
from sightline.prompt.pipeline import PromptPipeline
from sightline.prompt.processor import ImagePlan
from sightline.registry import FAMILIES

_GIB = 1 << 30
# A GPU step of the default size takes about this beside weights and K/V; the engine measures it.
_ACTIVATIONS = 4 * _GIB
# A side longer than any family keeps.
_LARGE = 6000


class Fact(NamedTuple):
    """One line of the answer."""

    name: str
    value: str


def describe(config: EngineConfig, folder: Path) -> tuple[list[Fact], OutOfMemoryError | None]:
    """Facts about a folder that can be served, and why it does not fit, if so.

    Raises `StartupError` for one that cannot be served on any machine.
    """
    hf_config = read_config(folder)
    name = architecture(hf_config)
    family = FAMILIES[name]
    model_class, model_config, companion = model_class_and_config(folder, name)
    check_group(config, folder)
    with torch.device("meta"):
        whole: Any = model_class(model_config)
        model: Any = model_class(model_config, Group(0, config.tp_size))
    pipeline = PromptPipeline(folder, allow_local=True)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    numbers = sum(parameter.numel() for parameter in whole.parameters())
    own = sum(parameter.numel() for parameter in model.parameters())
    weights = own * dtype.itemsize + sum(buffer.nbytes for buffer in model.buffers())
    on_each = f", on each of {config.tp_size} ranks" if config.tp_size > 1 else ""
    _, is_familys = load_source(folder, None, family.chat_template)
    facts = [
        Fact("family", f"{family.name} ({name})"),
        Fact("chat template", f"{family.chat_template}, the family's" if is_familys else "the checkpoint's own"),
        Fact("parameters", f"{numbers / 1e9:.2f} billion" if numbers >= 1e9 else f"{numbers / 1e6:.1f} million"),
        Fact("weights", "random numbers" if config.load_format == "dummy" else _weights(folder)),
        *([Fact("vision tower", f"from {companion}, where the weights lack it")] if companion else []),
        Fact("device", f"{device.type}, {_size(device_memory(device))} of memory"),
        Fact("in memory", f"{_size(weights)} of weights in {str(dtype).removeprefix('torch.')}{on_each}"),
    ]
    on_gpu = device.type == "cuda"
    try:
        plan = plan_memory(
            config,
            model.kv_spec,
            # on a GPU the engine asks after loading; here the weights are still to come
            weights=0 if on_gpu else weights,
            activation=weights + _ACTIVATIONS if on_gpu else 0,
            model_context=model_config.max_position_embeddings,
            max_running=max_running_requests(config, device),
            dtype=dtype,
            device=device,
        )
    except OutOfMemoryError as error:
        return [*facts, Fact("context", f"{model_config.max_position_embeddings} tokens")], error
    per_token = plan.kv_bytes_per_token
    facts += [
        Fact(
            "context", f"{plan.context_length} tokens, of {model_config.max_position_embeddings} that the model allows"
        ),
        Fact("K/V", f"{per_token} bytes a token, {_size(per_token * plan.context_length)} for a full context{on_each}"),
    ]
    processor = pipeline.processor
    if processor is not None:
        shown = {"1024x1024": processor.plan(1024, 1024), "a large picture": processor.plan(_LARGE, _LARGE)}
        facts += [
            Fact(title, f"{p.num_tokens} tokens, {_size(_picture_bytes(model, p, dtype))} of the vision cache")
            for title, p in shown.items()
        ]
    return [*facts, Fact("fits", f"yes, with {plan.num_tokens} tokens of K/V ({_size(plan.kv_cache)})")], None


def _picture_bytes(model: Any, plan: ImagePlan, dtype: torch.dtype) -> int:
    if has_cross_attention(model):
        return int(model.num_features(plan.grid) * model.feature_width * dtype.itemsize)
    return int(plan.num_tokens * model.config.hidden_size * dtype.itemsize)


def _weights(folder: Path) -> str:
    files = weight_files(folder)
    kinds: set[str] = set()
    for path in files:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                kinds |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no dict)
        except SafetensorError as error:
            raise CheckpointError(f"{path.name} is no whole safetensors file: {error}") from error
    count = f"{len(files)} files" if len(files) > 1 else "one file"
    return f"{_size(sum(path.stat().st_size for path in files))} in {count}, {', '.join(sorted(kinds))}"


def _size(num_bytes: int) -> str:
    for unit, divisor in (("GiB", _GIB), ("MiB", 1 << 20)):
        if num_bytes >= divisor:
            return f"{num_bytes / divisor:.1f} {unit}"
    return f"{num_bytes / 1024:.1f} KiB"
