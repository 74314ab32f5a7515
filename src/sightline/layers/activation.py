"""Activations by their name in config.json (`hidden_act`)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

QUICK = 1.702


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(QUICK x): the sigmoid form of gelu (Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2)."""
    if x.is_cuda:
        from sightline.kernels.activation import quick_gelu as fused

        return fused(x)
    return (x * QUICK).sigmoid_().mul_(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """gelu by tanh, equation of arXiv:1606.08415, section 2."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "silu": F.silu,
}


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): [..., 2 I], gate beside up -> silu(gate) * up, [..., I]."""
    if gate_up.is_cuda:
        from sightline.kernels.activation import silu_and_mul as fused

        return fused(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
