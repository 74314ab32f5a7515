"""A product that ends with SwiGLU, for many rows: cuBLAS and the activation behind it, or on a Hopper card one kernel for both."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from sightline.kernels.activation import silu_and_mul
from sightline.kernels.common import hopper_form


def swiglu_linear(x: Tensor, weight: Tensor) -> Tensor:
    """silu(gate) * up of x [M, K] weight [2 F, K]^T, gate above up -> [M, F], contiguous; sums in float32, rounded as
    `silu_and_mul` of the rounded product. Rows of x and weight are contiguous."""
    hopper = hopper_form("swiglu_linear", x)
    if hopper is not None and hopper.takes(x, weight):
        result: Tensor = hopper.swiglu_linear_hopper(x, weight)
        return result
    return silu_and_mul(F.linear(x, weight))
