"""What several kernels share."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

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
