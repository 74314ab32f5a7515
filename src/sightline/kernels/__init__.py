"""Triton kernels of the NVIDIA path, each beside the plain torch that it must equal.

Only the GPU path imports the modules of this package: they import triton, which a CPU server neither needs nor loads.
"""
