"""Products of a normalised input, as every decoder layer begins both its halves; for one row on a GPU a single kernel."""

from __future__ import annotations

from torch import Tensor

from sightline.layers.activation import silu_and_mul
from sightline.layers.linear import Linear, has_few_rows
from sightline.layers.norm import RMSNorm

# Rows from which, on an H200, a kernel of our own with SwiGLU inside is faster than cuBLAS and the activation behind it.
_MANY_ROWS = 512


def normed_linear(norm: RMSNorm, linear: Linear, x: Tensor) -> Tensor:
    """linear(norm(x)) of x [T, in]."""
    if x.is_cuda and x.shape[0] == 1:
        from sightline.kernels.row_linear import row_linear

        return row_linear(x, linear.weight, linear.bias, gain=norm.weight, eps=norm.eps)
    return linear(norm(x))


def normed_swiglu(norm: RMSNorm, gate_up: Linear, x: Tensor) -> Tensor:
    """silu(gate) * up of norm(x), x [T, in]; gate_up has no bias and holds gate above up -> [T, out / 2]."""
    if x.is_cuda and x.shape[0] == 1:
        from sightline.kernels.row_linear import row_linear

        return row_linear(x, gate_up.weight, gain=norm.weight, eps=norm.eps, swiglu=True)
    if has_few_rows(x):
        from sightline.kernels.skinny_linear import skinny_linear

        return skinny_linear(norm(x), gate_up.weight, swiglu=True)
    if x.is_cuda and x.shape[0] >= _MANY_ROWS:
        from sightline.kernels.swiglu_linear import swiglu_linear

        return swiglu_linear(norm(x), gate_up.weight)
    return silu_and_mul(gate_up(norm(x)))
