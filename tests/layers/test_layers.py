"""Each layer against its formula."""

from __future__ import annotations

import math
import platform

import pytest
import torch
from torch.nn import functional as F

from sightline.layers.activation import QUICK, quick_gelu, silu_and_mul
from sightline.layers.embedding import Embedding, place_features
from sightline.layers.linear import Linear, MergedLinear, PatchLinear
from sightline.layers.norm import LayerNorm, RMSNorm
from sightline.layers.parameter import collect_slots
from sightline.layers.rotary import MultimodalRotaryEmbedding, RotaryEmbedding, apply_rotary


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype) -> None:
    norm = RMSNorm(48, 1e-5)
    norm.weight.data = torch.randn(48).to(dtype)
    x = (torch.randn(7, 48) * torch.logspace(-4, 4, 7)[:, None]).to(dtype)
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(norm(x).double(), expected, atol=tolerance, rtol=tolerance)
    assert norm(x).dtype is dtype
    assert norm(torch.zeros(2, 48)).eq(0).all()


def test_layer_norm() -> None:
    norm = LayerNorm(16, 1e-6)
    norm.weight.data, norm.bias.data = torch.randn(2, 16)
    x = torch.randn(3, 16)
    torch.testing.assert_close(norm(x), F.layer_norm(x, (16,), norm.weight, norm.bias, 1e-6))


@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias: bool) -> None:
    linear = Linear(12, 20, bias=bias)
    linear.weight.data.normal_()
    if linear.bias is not None:
        assert linear.bias.eq(0).all()
        linear.bias.data.normal_()
    x, residual = torch.randn(5, 12), torch.randn(5, 20)
    expected = x @ linear.weight.T + (linear.bias if linear.bias is not None else 0)
    torch.testing.assert_close(linear(x), expected)
    torch.testing.assert_close(linear.add_to(residual.clone(), x), residual + expected)
    assert tuple(linear.weight.shape) == (20, 12)


def test_merged_linear_loads_by_slices() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv_proj = MergedLinear(8, {"q_proj": 6, "k_proj": 2, "v_proj": 2}, bias=True)

    block = Block()
    slots = collect_slots(block)
    assert list(slots) == [f"{n}_proj.{p}" for n in "qkv" for p in ("weight", "bias")]
    separate = {name: torch.randn(slot.shape) for name, slot in slots.items()}
    for name, slot in slots.items():
        slot.target.copy_(separate[name])
    x = torch.randn(3, 8)
    expected = [F.linear(x, separate[f"{n}_proj.weight"], separate[f"{n}_proj.bias"]) for n in "qkv"]
    torch.testing.assert_close(block.qkv_proj(x), torch.cat(expected, dim=-1))


@pytest.mark.parametrize(("rows", "out_features"), [(3, 40), (200, 40), (200, 1024)])
def test_patch_linear_equals_the_plain_product(rows: int, out_features: int) -> None:
    torch.manual_seed(0)
    layer = PatchLinear(24, out_features, bias=True)
    assert layer.bias is not None
    layer.weight.normal_()
    layer.bias.normal_()
    # padded rows would send oneDNN to its reference code
    assert layer.weight.t().is_contiguous()
    x, residual = torch.randn(rows, 24), torch.randn(rows, out_features)
    product = x.double() @ layer.weight.double().t()
    expected = product + layer.bias
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=1e-5)
    added = layer.add_product_to(residual.clone(), x)
    torch.testing.assert_close(added.double(), product + residual, atol=1e-5, rtol=1e-5)
    assert not layer.is_for_onednn(x.bfloat16())
    if layer.is_for_onednn(x):
        torch.testing.assert_close(layer.scaled_silu(x, QUICK).double(), F.silu(QUICK * expected), atol=1e-5, rtol=1e-5)
    else:
        assert rows == 3 or not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64")


def test_weights_whose_columns_are_pages_apart_are_padded() -> None:
    """Columns 4096 bytes apart share few sets of a cache."""
    assert Linear(8, 2048).weight.stride() == (1, 2064)
    assert Linear(8, 2000).weight.stride() == (1, 2000)


def test_activations() -> None:
    x = torch.linspace(-6, 6, 50)
    torch.testing.assert_close(quick_gelu(x.clone()), x / (1 + torch.exp(-1.702 * x)))
    gate_up = torch.randn(3, 10)
    before = gate_up.clone()
    torch.testing.assert_close(silu_and_mul(gate_up), F.silu(gate_up[:, :5]) * gate_up[:, 5:])
    assert torch.equal(gate_up, before)


def test_embedding_is_its_own_head() -> None:
    embedding = Embedding(30, 8)
    embedding.weight.data.normal_()
    ids = torch.tensor([3, 0, 29, 3])
    assert torch.equal(embedding(ids), embedding.weight[ids])
    hidden = torch.randn(2, 8)
    torch.testing.assert_close(embedding.logits(hidden), hidden @ embedding.weight.T)


def test_place_features() -> None:
    hidden = place_features(torch.zeros(5, 2), torch.tensor([3, 1]), torch.tensor([[1.0, 1.0], [2.0, 2.0]]))
    assert hidden[:, 0].tolist() == [0, 2, 0, 1, 0]
    with pytest.raises(AssertionError, match="1 placeholder"):
        place_features(torch.zeros(5, 2), torch.tensor([3]), torch.zeros(2, 2))


def rotate(x: torch.Tensor, angles: list[float]) -> torch.Tensor:
    """One head, pair by pair: (x[i], x[i + half]) turned by angles[i]."""
    half = len(angles)
    out = x.clone()
    for i, angle in enumerate(angles):
        a, b = x[i].item(), x[i + half].item()
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def test_rotary() -> None:
    x = torch.randn(3, 2, 8)
    positions = torch.tensor([0, 5, 1000])
    turned = apply_rotary(x, RotaryEmbedding(8, 10000.0)(positions))
    for row in range(3):
        angles = [positions[row].item() * 10000.0 ** (-2 * i / 8) for i in range(4)]
        for head in range(2):
            torch.testing.assert_close(turned[row, head], rotate(x[row, head], angles), atol=2e-4, rtol=1e-4)


def test_multimodal_rotary() -> None:
    x = torch.randn(2, 1, 16)
    positions = torch.tensor([[1, 7], [2, 5], [3, 0]])
    turned = apply_rotary(x, MultimodalRotaryEmbedding(16, 100.0, [2, 3, 3])(positions))
    axes = [0, 0, 1, 1, 1, 2, 2, 2]
    for row in range(2):
        angles = [positions[axis, row].item() * 100.0 ** (-2 * i / 16) for i, axis in enumerate(axes)]
        torch.testing.assert_close(turned[row, 0], rotate(x[row, 0], angles), atol=1e-5, rtol=1e-5)


def test_multimodal_rotary_of_text_is_ordinary() -> None:
    positions = torch.arange(9)
    plain = RotaryEmbedding(16, 100.0)(positions)
    multi = MultimodalRotaryEmbedding(16, 100.0, [2, 3, 3])(positions.expand(3, -1))
    assert torch.equal(plain.cos, multi.cos)
    assert torch.equal(plain.sin, multi.sin)


def test_rotary_keeps_bfloat16_and_turns_in_float32() -> None:
    x = torch.randn(3, 2, 8).bfloat16()
    rotary = RotaryEmbedding(8, 100.0)(torch.arange(3))
    turned = apply_rotary(x, rotary)
    assert turned.dtype is torch.bfloat16
    assert torch.equal(turned, apply_rotary(x.float(), rotary).bfloat16())
