"""Normalisation layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    shift: Tensor

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width), requires_grad=False)
        self.shape = (width,)
        self.eps = eps
        self.register_buffer("shift", torch.tensor(eps, dtype=torch.float32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> same shape and dtype; sums in float32."""
        if x.is_cuda:
            from sightline.kernels.norm import rms_norm

            return rms_norm(x.reshape(-1, self.shape[0]), self.weight, self.eps).view(x.shape)
        if x.dtype is torch.float32:
            # torch's CPU rms_norm is half a dozen passes; the norm by one vectorised reduction takes 2/3 of its time
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            scale = torch.addcmul(self.shift, norm, norm, value=1.0 / self.shape[0]).rsqrt_()
            return (x * scale).mul_(self.weight)
        return F.rms_norm(x, self.shape, self.weight, self.eps)

    def after_bias(self, x: Tensor, pending: Tensor) -> Tensor:
        """See `LayerNorm.after_bias`."""
        return self.forward(x.add_(pending))


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(width), requires_grad=False)
        self.shape = (width,)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> same shape and dtype."""
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)

    def after_bias(self, x: Tensor, pending: Tensor) -> Tensor:
        """forward(x + pending) of x [T, width], which becomes that sum; pending: [width], the bias of the product before."""
        if not x.is_cuda:
            return self.forward(x.add_(pending))
        from sightline.kernels.norm import bias_layer_norm

        return bias_layer_norm(x, pending, self.weight, self.bias, self.eps)
