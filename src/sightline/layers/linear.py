"""Linear layers whose weights are laid out for small batches, merged ones that load from separate tensors, and shares of both."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.layers.parameter import Slot
from sightline.parallel import SOLO, Group, Shard


def new_weight(out_features: int, in_features: int, few_rows: bool = True) -> nn.Parameter:
    """Uninitialised [out_features, in_features] on the default device and dtype. few_rows: its products may have few rows.

    On a CPU it is the transpose of a row-major [in, out]: a decode step's x @ W.T then reads W in the order in which the
    matrix product consumes it (measured 1.6 to 2.2 times faster for 1 to 8 rows, equal for hundreds).
    """
    if torch.get_default_device().type == "cpu":
        # rows that begin at multiples of 4 KiB would share few sets of the caches: a step took a tenth longer
        padding = 16 if few_rows and out_features % 1024 == 0 else 0
        columns = torch.empty(in_features, out_features + padding)[:, :out_features]
        return nn.Parameter(columns.t(), requires_grad=False)
    return nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)


# Rows up to which a kernel of our own is faster than cuBLAS, measured on an H200 at a 7B model's shapes: the portable one, and
# the one for Hopper.
_FEW_ROWS, _FEW_ROWS_ON_HOPPER = 32, 64


def has_few_rows(x: Tensor) -> bool:
    """Whether x [T, in] is for `kernels.skinny_linear`."""
    if not (x.is_cuda and x.ndim == 2 and 1 < x.shape[0] <= _FEW_ROWS_ON_HOPPER and x.element_size() == 2):
        return False
    from sightline.kernels.common import on_hopper

    return x.shape[0] <= _FEW_ROWS or on_hopper(x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] weight [out, in]^T (+ bias [out])."""
    # Kernels are imported here, and wherever a layer has one: a machine without a GPU need not have triton.
    if x.is_cuda and x.ndim == 2 and x.shape[0] == 1:
        from sightline.kernels.row_linear import row_linear

        return row_linear(x, weight, bias)
    if has_few_rows(x):
        from sightline.kernels.skinny_linear import skinny_linear

        return skinny_linear(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Module):
    """y = x W^T + b. weight: [out_features, in_features], uninitialised; bias zero until loaded."""

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = new_weight(out_features, in_features)
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return linear(x, self.weight, self.bias)

    def add_product_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual [T, out] + x [T, in] W^T without the bias, which the norm that follows can add for less. The residual may be
        overwritten."""
        if x.is_cuda:
            return residual.addmm_(x, self.weight.t())
        # in place would be slower on a CPU
        return torch.addmm(residual, x, self.weight.t())

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual [T, out] + x [T, in] W^T (+ b), the sum done inside the matrix product. The residual may be overwritten."""
        if x.is_cuda and x.shape[0] == 1:
            from sightline.kernels.row_linear import row_linear

            return row_linear(x, self.weight, self.bias, residual=residual)
        if has_few_rows(x):
            from sightline.kernels.skinny_linear import skinny_linear

            return skinny_linear(x, self.weight, self.bias, residual=residual)
        out = self.add_product_to(residual, x)
        return out if self.bias is None else out.add_(self.bias)


# oneDNN's products of hundreds of rows take 5 to 15 % less time than those that torch has from MKL, and end with an activation for
# little; but each new number of rows costs a millisecond, and a weight with padding in its rows some hundred times as much.
_MANY_ROWS = 64
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")


class PatchLinear(Linear):
    """A linear layer of a vision tower: on a CPU its rows are many, and their number comes again with each picture of the size."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias)
        self.weight = new_weight(out_features, in_features, few_rows=False)

    def is_for_onednn(self, x: Tensor) -> bool:
        """Whether the product of x [..., in] is."""
        on_cpu = x.device.type == "cpu" and x.dtype is torch.float32
        return _HAS_ONEDNN and on_cpu and x.ndim == 2 and x.shape[0] >= _MANY_ROWS

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return _onednn(x, self.weight, self.bias) if self.is_for_onednn(x) else super().forward(x)

    def add_product_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """See `Linear.add_product_to`."""
        if not self.is_for_onednn(x):
            return super().add_product_to(residual, x)
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, None, "add")

    def scaled_silu(self, x: Tensor, scale: float) -> Tensor:
        """silu(scale * (x W^T + b)) of x [T, in] that `is_for_onednn`."""
        assert self.bias is not None
        return _onednn(x * scale, self.weight, self.bias * scale, "swish")


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "")


class MergedLinear(Linear):
    """Several linear layers of one input as one product, or a rank's share of each (column-parallel: of their outputs).

    parts: sibling name in the checkpoint -> its output width, e.g. {"gate_proj": I, "up_proj": I}, or the share of it that is
    held; the outputs lie side by side in that order.
    """

    def __init__(self, in_features: int, parts: Mapping[str, int | Shard], bias: bool = False) -> None:
        self.parts = {name: Shard.whole(p) if isinstance(p, int) else p for name, p in parts.items()}
        super().__init__(in_features, sum(part.width for part in self.parts.values()), bias)

    def slots(self, name: str) -> Iterator[tuple[str, Slot]]:
        """`layers.0.mlp.gate_up_proj` yields `layers.0.mlp.gate_proj.weight` and so on."""
        parent = name.rpartition(".")[0]
        prefix = f"{parent}." if parent else ""
        start = 0
        for part, shard in self.parts.items():
            end = start + shard.width
            yield f"{prefix}{part}.weight", Slot.of_shard(self.weight.data[start:end], shard)
            if self.bias is not None:
                yield f"{prefix}{part}.bias", Slot.of_shard(self.bias.data[start:end], shard)
            start = end


class RowLinear(Linear):
    """A linear layer of which each rank holds a share of the inputs: the products are summed over ranks.

    Rank 0 adds what is added once, bias and residual.
    """

    def __init__(self, inputs: Shard, out_features: int, bias: bool = False, group: Group = SOLO) -> None:
        super().__init__(inputs.width, out_features, bias)
        self.inputs = inputs
        self.group = group

    def slots(self, name: str) -> Iterator[tuple[str, Slot]]:
        """The share's columns, and the whole bias."""
        yield f"{name}.weight", Slot.of_shard(self.weight.data, self.inputs, dim=1)
        if self.bias is not None:
            yield f"{name}.bias", Slot(self.bias.data)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs.width] -> [..., out_features]."""
        return self.group.all_reduce(linear(x, self.weight, self.bias if self.group.rank == 0 else None))

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """See `Linear.add_to`."""
        out = super().add_to(residual, x) if self.group.rank == 0 else linear(x, self.weight)
        return self.group.all_reduce(out)
