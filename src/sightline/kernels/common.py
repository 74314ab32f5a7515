"""What several kernels share."""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

logger = logging.getLogger("sightline.engine")

# TRITON_INTERPRET=1 runs the kernels on the CPU, without a compiler: that is how they are tested without a GPU.
INTERPRETING = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc):
    """acc + a @ b, sums in float32; float32 inputs are not rounded to TF32."""
    if INTERPRETING:
        # the interpreter multiplies the bit patterns of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def key_slots(page_table, positions, mask, stride_page, stride_slot, PAGE_SIZE: tl.constexpr):
    """Offsets int64 of the keys at `positions` (int32) of a sequence, whose row of the page table is `page_table`; undefined
    where not `mask`."""
    page = tl.load(page_table + positions // PAGE_SIZE, mask=mask)
    return page.to(tl.int64) * stride_page + (positions % PAGE_SIZE) * stride_slot


@triton.jit
def keys_of_a_split(num_keys, num_splits, BLOCK_N: tl.constexpr, MIN_BLOCKS: tl.constexpr):
    """A multiple of BLOCK_N, at least MIN_BLOCKS of them: the last splits of few keys are empty."""
    return tl.maximum(tl.cdiv(tl.cdiv(num_keys, num_splits), BLOCK_N), MIN_BLOCKS) * BLOCK_N


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 on a CPU."""
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def on_hopper(tensor: Tensor) -> bool:
    """Whether it is on a card of compute capability 9."""
    return tensor.is_cuda and _generation(tensor.device) == 9


@functools.cache
def _generation(device: torch.device) -> int:
    """The first number of its compute capability."""
    return torch.cuda.get_device_capability(device)[0]


def hopper_form(name: str, tensor: Tensor) -> ModuleType | None:
    """The module `name`_hopper beside this one, if the tensor is on a Hopper card."""
    return _hopper_form(name) if on_hopper(tensor) else None


@functools.cache
def _hopper_form(name: str) -> ModuleType | None:
    """None, with a warning, for a triton that lacks the language of these kernels."""
    try:
        return importlib.import_module(f"sightline.kernels.{name}_hopper")
    except (ImportError, AttributeError) as error:
        logger.warning("%s takes its portable kernel, because this triton lacks the other's language: %s", name, error)
        return None
