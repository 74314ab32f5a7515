"""What the kernels in Gluon, Triton's lower level, share, and what they call by names that triton 3.9 changed."""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
store_box = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def silu_and_mul(gate, up, dtype: gl.constexpr):
    """silu(gate) * up of float32 sums, in float32, rounded between as `activation.silu_and_mul` rounds."""
    gate = gate.to(dtype).to(gl.float32)
    rounded = (gate / (1.0 + gl.exp(-gate))).to(dtype)
    return rounded.to(gl.float32) * up.to(dtype).to(gl.float32)


def suits_the_copy_engine(x: Tensor, weight: Tensor) -> bool:
    """Whether it can bring both of a product: it wants 16 bits, rows of whole 16 bytes, and pairs of whole groups of eight features."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and weight.stride(0) % 8 == 0
    return x.element_size() == 2 and aligned and weight.shape[0] % 16 == 0
