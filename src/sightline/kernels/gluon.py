"""What the kernels in Gluon, Triton's lower level, call by names that triton 3.9 changed."""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
store_box = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
