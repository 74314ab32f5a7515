"""From a checkpoint folder to a module with weights. Only safetensors are read, and nothing in a checkpoint is executed."""

from __future__ import annotations

import difflib
import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sightline import hub
from sightline.errors import CheckpointError, ModelNotFoundError
from sightline.hub import progress_detail
from sightline.layers.parameter import Slot, collect_slots
from sightline.parallel import SOLO, Group
from sightline.registry import FAMILIES

Progress = Callable[[float, str], None]

_INDEX = "model.safetensors.index.json"
_UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")
# Threads that read weights for a GPU: pages of the file, pinned memory and the way to the device are waited for side by side.
_READERS = 8
# Bytes of pinned memory that each of them fills at once.
_STAGE = 32 << 20


def read_config(model_dir: Path) -> dict[str, Any]:
    """The contents of config.json."""
    path = model_dir / "config.json"
    if not path.is_file():
        raise ModelNotFoundError(f"{model_dir} holds no config.json, so it is no checkpoint folder.")
    return _read_json(path)


def architecture(config: Mapping[str, Any]) -> str:
    """The first of config.json's `architectures`, if it is one that we serve."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ModelNotFoundError("config.json: architectures is missing, so the kind of model is unknown.")
    if names[0] not in FAMILIES:
        (near,) = difflib.get_close_matches(names[0], FAMILIES, n=1, cutoff=0.0)
        raise ModelNotFoundError(
            f"The architecture {names[0]} is not supported; the nearest that is: {near} ({FAMILIES[near].name}). "
            "`sightline models` lists all."
        )
    return names[0]


def build_model(
    model_dir: Path,
    architecture: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    group: Group = SOLO,
) -> nn.Module:
    """This rank's share of the model of `architecture`, in eval mode, without gradients and with arbitrary weights."""
    model_class, config, _ = model_class_and_config(model_dir, architecture)
    with _defaults(torch.device(device), dtype):
        model: nn.Module = model_class(config, group).eval()
    return model


def fill_model(
    model: nn.Module, model_dir: Path, *, load_format: str = "auto", on_progress: Progress | None = None
) -> None:
    """Give a model that was built of the same folder its weights.

    load_format: "auto" or "safetensors" reads the folder's safetensors; "dummy" makes random weights on the device and
    reads config.json alone. on_progress: called with (fraction, detail) as bytes arrive.
    """
    if load_format == "dummy":
        _fill_at_random(model)
    elif load_format in ("auto", "safetensors"):
        companion = _companion(type(model), read_config(model_dir))
        _fill(model, model_dir, on_progress or (lambda fraction, detail: None), companion)
    else:
        raise CheckpointError(f"load_format is {load_format!r}; known are auto, safetensors and dummy.")


def model_class_and_config(model_dir: Path, architecture: str) -> tuple[Any, Any, str | None]:
    """The class, its config, and the name of the checkpoint that fills slots which this one may leave empty."""
    module_name, _, class_name = FAMILIES[architecture].model.partition(":")
    model_class = getattr(importlib.import_module(module_name), class_name)
    preprocessor = model_dir / "preprocessor_config.json"
    hf_config = read_config(model_dir)
    companion = _companion(model_class, hf_config)
    companion_dir = hub.find_companion(companion, model_dir) if companion else None
    if companion_dir is not None:
        hf_config = {**hf_config, "companion_config": read_config(companion_dir)}
    config = model_class.config_class.from_hf(hf_config, _read_json(preprocessor) if preprocessor.is_file() else {})
    return model_class, config, companion


def _companion(model_class: Any, hf_config: Mapping[str, Any]) -> str | None:
    return model_class.companion(hf_config) if hasattr(model_class, "companion") else None


@contextmanager
def _defaults(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Modules are born on the device in the dtype, so that weights exist once."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} holds no JSON object.")
    return value


def weight_files(model_dir: Path) -> list[Path]:
    """The shards that the index names, or the only safetensors file."""
    index = model_dir / _INDEX
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{_INDEX}: weight_map is missing.")
        names = sorted({str(name) for name in weight_map.values()})
        unsafe = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
        if unsafe:
            raise CheckpointError(f"{_INDEX} names {unsafe[0]!r}, which is no safetensors file of this folder.")
        missing = [name for name in names if not (model_dir / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{model_dir}: {_few(missing)} missing, of {len(names)} weight files named by {_INDEX}."
            )
        return [model_dir / name for name in names]
    single = model_dir / "model.safetensors"
    if single.is_file():
        return [single]
    found = sorted(model_dir.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise CheckpointError(
            f"{model_dir} holds {len(found)} safetensors files but neither {_INDEX} nor model.safetensors."
        )
    unsafe = sorted(p.name for p in model_dir.iterdir() if p.suffix in _UNSAFE_SUFFIXES)
    if unsafe:
        raise CheckpointError(
            f"{model_dir} holds its weights as {unsafe[0]}, a format that can run code or that is not read here. Convert "
            "them to safetensors (transformers: model.save_pretrained), or take a revision that has *.safetensors."
        )
    raise CheckpointError(f"{model_dir} holds no weights: no *.safetensors file.")


def _fill(model: nn.Module, model_dir: Path, on_progress: Progress, companion: str | None) -> None:
    """Copy every tensor of the folder to its slot; each slot once, and no tensor left over.

    companion: folder or hub name of the checkpoint that fills slots which this one leaves empty.
    """
    slots = collect_slots(model)
    filled: set[str] = set()
    if _num_readers(slots) > 1:
        # the readers' copies are on no stream of ours, and what the parameters were born with must not come later
        torch.cuda.synchronize()
    leftover = _copy_files(weight_files(model_dir), slots, filled, model.map_name, on_progress)  # type: ignore[arg-type]
    missing = [name for name in slots if name not in filled]
    if missing and companion is not None:
        folder = hub.find_companion(companion, model_dir)
        if folder is None:
            raise CheckpointError(
                f"The weights in {model_dir} lack {len(missing)} tensors ({missing[0]}, ...), which are "
                f"those of {companion}. Put that checkpoint's folder (config.json and *.safetensors) at "
                f"{model_dir / companion.rstrip('/').rpartition('/')[2]}, or download it into the hub cache."
            )
        _copy_files(weight_files(folder), slots, filled, model.map_companion_name, on_progress)  # type: ignore[arg-type]
        missing = [name for name in slots if name not in filled]
    if missing or leftover:
        problems = [f"{_few(missing)} missing"] if missing else []
        problems += [f"{_few(leftover)} unknown to this architecture"] if leftover else []
        raise CheckpointError(f"The weights in {model_dir} do not fit the model: {'; '.join(problems)}.")


def _copy_files(
    files: Sequence[Path],
    slots: Mapping[str, Slot],
    filled: set[str],
    map_name: Callable[[str], str | None],
    on_progress: Progress,
) -> list[str]:
    """Fill the slots that are not filled yet. Returns the tensors that found no place."""
    leftover: list[str] = []
    total = sum(path.stat().st_size for path in files)
    done = reported = 0
    for path in files:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                copies = []
                for name in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
                    ours = map_name(name)
                    if ours is None:
                        continue
                    if ours not in slots or ours in filled:
                        leftover.append(name)
                        continue
                    copies.append(partial(_copy, slots[ours], file, name))
                    filled.add(ours)
                for num_bytes in _side_by_side(copies, _num_readers(slots)):
                    done += num_bytes
                    if (done - reported) * 100 >= total:
                        reported = done
                        on_progress(min(done / total, 1.0), progress_detail(done, total))
        except SafetensorError as error:
            raise CheckpointError(f"{path.name} is no whole safetensors file: {error}") from error
    on_progress(1.0, progress_detail(total, total))
    return leftover


def _num_readers(slots: Mapping[str, Slot]) -> int:
    return _READERS if any(slot.target.is_cuda for slot in slots.values()) else 1


def _side_by_side(work: Sequence[Callable[[], int]], num_threads: int) -> Iterator[int]:
    """What each returns, as they end. When one raises, those that have not begun do not begin."""
    if num_threads == 1:
        for one in work:
            yield one()
        return
    with ThreadPoolExecutor(num_threads, "weights") as readers:
        futures = [readers.submit(one) for one in work]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


def _copy(slot: Slot, file: Any, name: str) -> int:
    """Read what the slot wants of tensor `name`, and no more. Returns the bytes that the whole tensor has."""
    view = file.get_slice(name)
    shape = tuple(view.get_shape())
    if shape != slot.shape:
        raise CheckpointError(f"{name} has shape {list(shape)}, but config.json asks for {list(slot.shape)}.")
    tensor: Tensor = file.get_tensor(name) if slot.part is None else view[slot.part]
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise CheckpointError(f"{name} is of type {tensor.dtype}; only float32, float16 and bfloat16 weights are read.")
    value = tensor if slot.convert is None else slot.convert(tensor)
    target = slot.target
    if target.ndim == 2 and target.stride(0) == 1 and target.device.type == "cpu":
        # torch transposes fast only between whole matrices of one type: five times faster than one strided copy
        target, value = target.t(), value.to(target.dtype).t().contiguous()
    if target.is_cuda and value.nbytes > _STAGE:
        num_rows = max(1, _STAGE // value[0].nbytes)
        for part, rows in zip(target.split(num_rows), value.split(num_rows), strict=True):
            part.copy_(rows.pin_memory())
    else:
        target.copy_(value)
    return math.prod(shape) * tensor.element_size()


def _few(names: Sequence[str]) -> str:
    """ "a, b, c (and 12 more)"."""
    more = f" (and {len(names) - 3} more)" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} {'are' if len(names) > 1 else 'is'}"


def _fill_at_random(model: nn.Module) -> None:
    """Matrices of deviation 1 / sqrt(fan in), so that activations stay near 1; norms and biases as they are born. The ranks of a
    group draw the same numbers, so they agree about what each of them holds in full."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
