"""Norm, activation and rotary kernels against their torch equals and the model's own layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="no triton on this machine")

from sightline.kernels import activation, norm, rope
from sightline.kernels.row_linear import row_linear, row_linear_reference
from sightline.kernels.skinny_linear import Shape, skinny_linear, skinny_linear_reference
from sightline.layers.activation import quick_gelu, silu_and_mul
from sightline.layers.norm import LayerNorm, RMSNorm
from sightline.layers.rotary import MultimodalRotaryEmbedding, RotaryEmbedding, apply_rotary

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PAGE = 16


def check(out: Tensor, expected: Tensor) -> None:
    """Two units in the last place: the interpreter cuts bfloat16 off where the GPU rounds."""
    assert out.shape == expected.shape
    tolerance = 4e-6 if out.dtype is torch.float32 else 2 * torch.finfo(out.dtype).eps
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)


def strided(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, width], a view of wider rows."""
    return torch.randn(rows, width + 24).to(device, dtype)[:, 8 : width + 8]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [48, 896])
def test_rms_norm(width: int, dtype: torch.dtype, device: torch.device) -> None:
    layer = RMSNorm(width, 1e-5).to(device, dtype)
    layer.weight.data = torch.randn(width).to(device, dtype)
    scales = torch.logspace(-3, 3, 5).to(device, dtype)[:, None]
    x = strided(5, width, dtype, device) * scales
    check(norm.rms_norm(x, layer.weight, layer.eps), norm.rms_norm_reference(x, layer.weight, layer.eps))
    view = strided(3, width, dtype, device)
    check(norm.rms_norm(view, layer.weight, layer.eps), layer(view))
    assert norm.rms_norm(torch.zeros_like(view), layer.weight, layer.eps).eq(0).all()
    assert norm.rms_norm(view[:0], layer.weight, layer.eps).shape == (0, width)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [40, 1500])
def test_silu_and_mul(width: int, dtype: torch.dtype, device: torch.device) -> None:
    gate_up = 4 * strided(3, 2 * width, dtype, device)
    gate_up[0, 0] = -200.0
    check(activation.silu_and_mul(gate_up), silu_and_mul(gate_up))
    check(activation.silu_and_mul_reference(gate_up), silu_and_mul(gate_up))


@pytest.mark.parametrize("multimodal", [False, True])
def test_rotary_tables(multimodal: bool, device: torch.device) -> None:
    """The step's tables are the layer's own."""
    positions = torch.randint(0, 30000, (3, 9), device=device)
    if multimodal:
        layer = MultimodalRotaryEmbedding(80, 1e6, (8, 12, 20)).to(device)
        expected, axis = layer(positions), layer.axis
    else:
        layer = RotaryEmbedding(80, 1e6).to(device)
        expected, axis = layer(positions[0]), torch.zeros(40, dtype=torch.int64, device=device)
    cos, sin = rope.rotary_tables(positions, layer.inv_freq, axis)
    torch.testing.assert_close(cos, expected.cos, atol=1e-6, rtol=0)
    torch.testing.assert_close(sin, expected.sin, atol=1e-6, rtol=0)
    cos, sin = rope.rotary_tables_reference(positions, layer.inv_freq, axis)
    torch.testing.assert_close(cos, expected.cos, atol=1e-6, rtol=0)
    torch.testing.assert_close(sin, expected.sin, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "dim"), [(4, 4, 64), (6, 2, 80), (7, 1, 128), (28, 4, 16)])
def test_rotate_and_write(
    num_heads: int, num_kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    width = (num_heads + 2 * num_kv_heads) * dim
    qkv = strided(6, width, dtype, device)
    table = RotaryEmbedding(dim, 1e4).to(device)(torch.randint(0, 5000, (6,), device=device))
    slots = torch.tensor([40, -1, 17, 3, -1, 63], device=device)
    caches = [torch.full((4, PAGE, num_kv_heads, dim), 7.0, dtype=dtype, device=device) for _ in range(4)]

    turned = apply_rotary(qkv.unflatten(1, (-1, dim))[:, : num_heads + num_kv_heads], table).flatten(1)
    values = qkv[:, turned.shape[1] :].clone()
    reference = qkv.clone()
    around = qkv._base.clone()
    rope.rotate_and_write(qkv, table.cos, table.sin, caches[0], caches[1], slots)
    rope.rotate_and_write_reference(reference, table.cos, table.sin, caches[2], caches[3], slots)

    check(qkv[:, : turned.shape[1]], turned)
    assert torch.equal(qkv[:, turned.shape[1] :], values)
    check(qkv, reference)
    around[:, 8 : width + 8] = qkv
    assert torch.equal(around, qkv._base)
    check(caches[0], caches[2])
    assert torch.equal(caches[1], caches[3])
    written = slots[slots >= 0]
    keys = turned.unflatten(1, (-1, dim))[:, num_heads:][slots >= 0]
    check(caches[0].flatten(0, 1)[written], keys)
    untouched = [s for s in range(4 * PAGE) if s not in written.tolist()]
    for cache in caches[:2]:
        assert cache.flatten(0, 1)[untouched].eq(7).all()


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_rotate_heads_of_a_vision_tower(dtype: torch.dtype, device: torch.device) -> None:
    """16 heads of 80: queries and keys turn, values stay."""
    qkv = strided(5, 3 * 16 * 80, dtype, device)
    table = RotaryEmbedding(80, 1e4).to(device)(torch.arange(5, device=device))
    expected = apply_rotary(qkv.unflatten(1, (-1, 80))[:, :32], table).flatten(1)
    values, reference = qkv[:, 2 * 16 * 80 :].clone(), qkv.clone()
    rope.rotate_heads(qkv, table.cos, table.sin, 32)
    rope.rotate_heads_reference(reference, table.cos, table.sin, 32)
    check(qkv[:, : 2 * 16 * 80], expected)
    check(reference, qkv)
    assert torch.equal(qkv[:, 2 * 16 * 80 :], values)


def test_write_kv(device: torch.device) -> None:
    rows = torch.randn(4, 9, 80).to(device)
    k, v = rows[:, 2:5], rows[:, 5:8]
    slots = torch.tensor([33, -1, 0, 18], device=device)
    caches = [torch.zeros(3, PAGE, 3, 80, device=device) for _ in range(4)]
    rope.write_kv(k, v, caches[0], caches[1], slots)
    rope.write_kv_reference(k, v, caches[2], caches[3], slots)
    assert torch.equal(caches[0], caches[2])
    assert torch.equal(caches[1], caches[3])
    assert torch.equal(caches[1].flatten(0, 1)[33], v[0])
    assert caches[0].flatten(0, 1).any(-1).any(-1).sum() == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_quick_gelu(dtype: torch.dtype, device: torch.device) -> None:
    x = 4 * torch.randn(3, 700).to(device, dtype)
    check(activation.quick_gelu(x), activation.quick_gelu_reference(x))
    check(activation.quick_gelu(x), quick_gelu(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_gain", [False, True])
@pytest.mark.parametrize("swiglu", [False, True])
def test_row_linear(dtype: torch.dtype, with_gain: bool, swiglu: bool, device: torch.device) -> None:
    """Sizes that no block divides; with everything that may go with the product, and without."""
    x = torch.randn(1, 600).to(device, dtype)
    weight = (torch.randn(38, 600) * 0.04).to(device, dtype)
    gain = torch.randn(600).to(device, dtype) if with_gain else None
    out = 19 if swiglu else 38
    bias, residual = torch.randn(out).to(device, dtype), torch.randn(1, out).to(device, dtype)
    for extra in ({}, {"bias": None if swiglu else bias, "residual": residual}):
        args = {"gain": gain, "eps": 1e-5, "swiglu": swiglu, **extra}
        ours, expected = row_linear(x, weight, **args), row_linear_reference(x, weight, **args)
        tolerance = 2e-5 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize(("rows", "inner", "out"), [(5, 384, 128), (17, 200, 76)])
def test_skinny_linear(
    rows: int, inner: int, out: int, swiglu: bool, splits: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Sizes that blocks divide, and sizes that they do not. Twice: a launch leaves the counters as it found them."""
    x = strided(rows, inner, dtype, device)
    weight = (torch.randn(2 * out if swiglu else out, inner) * 0.04).to(device, dtype)
    bias, residual = torch.randn(out).to(device, dtype), torch.randn(rows, out).to(device, dtype)
    shape = Shape(32, 64, splits, 4, 2)
    tolerance = 2e-5 if dtype is torch.float32 else 4 * torch.finfo(dtype).eps
    for args in ({}, {"bias": None if swiglu else bias, "residual": residual}):
        ours = skinny_linear(x, weight, swiglu=swiglu, shape=shape, **args)
        expected = skinny_linear_reference(x, weight, swiglu=swiglu, **args)
        torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)
        assert torch.equal(skinny_linear(x, weight, swiglu=swiglu, shape=shape, **args), ours)
    if splits == 1:
        # the shape that it chooses itself
        ours, expected = skinny_linear(x, weight, swiglu=swiglu), skinny_linear_reference(x, weight, swiglu=swiglu)
        torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_after_a_bias(dtype: torch.dtype, device: torch.device) -> None:
    layer = LayerNorm(200, 1e-6).to(device, dtype)
    layer.weight.data, layer.bias.data = torch.randn(200).to(device, dtype), torch.randn(200).to(device, dtype)
    x, pending = (3 + torch.randn(5, 200)).to(device, dtype), torch.randn(200).to(device, dtype)
    expected_sum = x + pending
    ours = x.clone()
    out = norm.bias_layer_norm(ours, pending, layer.weight, layer.bias, layer.eps)
    check(ours, expected_sum)
    tolerance = 4e-6 if dtype is torch.float32 else 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(out, layer(ours), atol=tolerance, rtol=tolerance)
    reference = norm.bias_layer_norm_reference(x.clone(), pending, layer.weight, layer.bias, layer.eps)
    torch.testing.assert_close(out, reference, atol=tolerance, rtol=tolerance)
    assert norm.bias_layer_norm(ours[:0], pending, layer.weight, layer.bias, layer.eps).shape == (0, 200)
