"""The kernels for Hopper. Their language has no interpreter: without such a card they are compiled for one, no more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="no triton on this machine")

from sightline.kernels import common
from sightline.kernels.norm import rms_norm
from sightline.kernels.prefill_attention import (
    Tile,
    prefill_attention,
    prefill_attention_reference,
    prefill_tile,
    prefill_tiles,
)
from sightline.kernels.skinny_linear import skinny_linear, skinny_linear_reference
from sightline.kernels.vision_attention import vision_attention, vision_attention_reference
from sightline.layers.linear import MergedLinear
from sightline.layers.norm import RMSNorm
from sightline.layers.normed import normed_swiglu
from tests.kernels.test_attention import Paged, queries

# In a process of its own: under TRITON_INTERPRET, which other tests here may run with, nothing is compiled; and with a driver that
# pretends to have such a card.
_COMPILE = """
import os
import subprocess
from pathlib import Path
import torch
import triton
from triton.backends.nvidia.compiler import get_ptxas
from sightline.engine.ahead import launches_only_compile
from sightline.kernels.prefill_attention import prefill_attention, prefill_tile
from sightline.kernels.skinny_linear import skinny_linear
from sightline.kernels.swiglu_linear_hopper import swiglu_linear_hopper
from sightline.kernels.vision_attention import vision_attention
from tests.kernels.rehearsal import pretend

def tensor(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

def vision(num_patches, num_pictures=1):
    vision_attention(*tensor(num_patches * num_pictures, 3, 16, 80).unbind(1), num_pictures)

def prefill(num_rows, num_heads, num_kv_heads, num_splits=1):
    q, cache = tensor(num_rows, num_heads, 128), tensor(700, 16, num_kv_heads, 128)
    offsets, lens, pages, tiles = (tensor(*shape, dtype=torch.int32) for shape in ((2,), (1,), (1, 600), (500, 2)))
    prefill_attention(q, cache, cache, offsets, lens, pages, tiles, tile=prefill_tile(cache, 0), num_splits=num_splits)

def skinny(num_rows, inner, out, swiglu=False, **more):
    more = {name: tensor(*shape) for name, shape in more.items()}
    skinny_linear(tensor(num_rows, inner), tensor(2 * out if swiglu else out, inner), swiglu=swiglu, **more)

def swiglu(num_rows, inner, out):
    swiglu_linear_hopper(tensor(num_rows, inner), tensor(2 * out, inner))

def compile_and_look(source, **options):
    kernel = compile_kernel(source, **options)
    if "merge" in source.fn.__name__:
        return kernel
    assert "wgmma.mma_async" in kernel.asm["ptx"] and "cp.async.bulk.tensor" in kernel.asm["ptx"]
    print("shared", kernel.metadata.shared)
    # ptxas only warns when it makes products wait for each other
    text = Path(os.environ["TRITON_CACHE_DIR"], "kernel.ptx")
    text.write_text(kernel.asm["ptx"])
    command = [get_ptxas(90).path, "-v", "-arch=sm_90a", "-o", "/dev/null", text]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "registers" in done.stderr and "serialized" not in done.stderr, done.stderr
    return kernel

pretend()
compile_kernel, triton.compiler.compile = triton.compiler.compile, compile_and_look
with launches_only_compile():
    {launch}
"""
# of a multiprocessor's shared memory, 1 KiB is taken for each program
_SHARED = 228


@pytest.mark.parametrize(
    ("launch", "programs"),
    [
        ("vision(1296, 3)", 1),
        ("prefill(700, 28, 4)", 1),
        ("prefill(2000, 28, 4)", 1),
        ("prefill(70, 32, 8, 4)", 1),
        ("skinny(16, 3584, 4608, bias=[4608])", 1),
        ("skinny(64, 4096, 11008, swiglu=True)", 1),
        ("skinny(32, 3584, 18944, swiglu=True)", 1),
        ("swiglu(2048, 3584, 18944)", 1),
    ],
)
def test_it_compiles_for_hopper_and_fits(launch: str, programs: int, tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", _COMPILE.replace("{launch}", launch)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[1]) <= (_SHARED // programs - 1) * 1024


@pytest.fixture
def hopper(device: torch.device) -> torch.device:
    """A Hopper card."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        pytest.skip("no Hopper card")
    return device


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("head_dim", "num_patches", "num_pictures"), [(80, 1296, 3), (72, 729, 5), (80, 5476, 1), (80, 4, 2), (80, 256, 2)]
)
def test_it_equals_torch_and_the_portable_kernel(
    head_dim: int, num_patches: int, num_pictures: int, dtype: torch.dtype, hopper: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    qkv = torch.randn(num_patches * num_pictures, 3, 16, head_dim).to(hopper, dtype)
    # a picture beside it that is not a number harms nobody
    qkv[num_patches:] = float("nan")
    q, k, v = qkv.unbind(1)
    result = vision_attention(q, k, v, num_pictures)[:num_patches]
    expected = vision_attention_reference(*(t[:num_patches].float() for t in (q, k, v)), 1)
    torch.testing.assert_close(result.float(), expected, atol=1e-2, rtol=1e-2)
    monkeypatch.setattr(common, "_hopper_form", lambda name: None)
    other = vision_attention(q, k, v, num_pictures)[:num_patches]
    torch.testing.assert_close(result, other, atol=1e-2, rtol=1e-2)


def chunks(
    q_lens: list[int], kv_lens: list[int], heads: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """What `prefill_attention` takes before its tiles. Whatever nobody has written is NaN."""
    num_heads, num_kv_heads = heads
    paged = Paged(kv_lens, num_kv_heads, 128, dtype, device)
    offsets = torch.tensor([0, *torch.tensor(q_lens).cumsum(0)], dtype=torch.int32, device=device)
    return queries(sum(q_lens), num_heads, 128, dtype, device), paged.k, paged.v, offsets, paged.kv_lens, paged.table


def planned(q_lens: list[int], kv_lens: list[int], heads: tuple[int, int], tile: Tile, padding: int) -> Tensor:
    """With so many tiles of the last sequence, which is empty, behind the others."""
    tiles = torch.from_numpy(prefill_tiles(q_lens, kv_lens, group=heads[0] // heads[1], tile=tile))
    return torch.cat([tiles, torch.tensor([[len(q_lens) - 1, 0]] * padding, dtype=torch.int32)])


@pytest.mark.gpu
@pytest.mark.parametrize("longest", [300, 900])
@pytest.mark.parametrize(
    ("heads", "dtype", "num_splits"),
    [
        ((28, 4), torch.bfloat16, 1),
        ((28, 4), torch.float16, 3),
        ((32, 8), torch.bfloat16, 4),
        ((16, 2), torch.float16, 1),
        ((4, 4), torch.bfloat16, 1),
    ],
)
def test_prompts_equal_torch_and_the_portable_kernel(
    heads: tuple[int, int], dtype: torch.dtype, num_splits: int, longest: int, hopper: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Chunks with and without history, ends of every kind in pages and blocks, rows that see nothing of a split, tiles of padding;
    few rows and many."""
    q_lens = [1, 15, 16, 17, 12, 3, 64, longest, 129, 1, 0]
    kv_lens = [1, 15, 16, 17, 300, 130, 74, longest, 1333, 2049, 0]
    arguments = chunks(q_lens, kv_lens, heads, dtype, hopper)
    q, cache = arguments[:2]
    form = common.hopper_form("prefill_attention", cache)
    assert form is not None
    assert form.takes(cache)
    tile = prefill_tile(cache, 2 * 10**6)
    tiles = planned(q_lens, kv_lens, heads, tile, 3).to(hopper)
    out = torch.full((q.shape[0] + 1, *q.shape[1:]), 7.0, device=hopper, dtype=dtype)
    prefill_attention(*arguments, tiles, tile=tile, out=out[:-1], num_splits=num_splits)
    expected = prefill_attention_reference(*arguments)
    torch.testing.assert_close(out[:-1], expected, atol=1e-2, rtol=1e-2)
    assert out[-1].eq(7).all()
    monkeypatch.setattr(common, "_hopper_form", lambda name: None)
    other = prefill_attention(*arguments, tiles, tile=tile, num_splits=num_splits)
    torch.testing.assert_close(out[:-1], other, atol=1e-2, rtol=1e-2)


@pytest.mark.gpu
def test_a_captured_step_serves_other_prompts(hopper: torch.device) -> None:
    heads, lengths = (28, 4), [([700, 30, 0], [1453, 400, 0]), ([38, 692, 0], [700, 692, 0])]
    worlds = [chunks(*each, heads, torch.bfloat16, hopper) for each in lengths]
    static = [torch.zeros_like(a if a.numel() >= b.numel() else b) for a, b in zip(*worlds, strict=True)]
    tile = prefill_tile(static[1], 730 * heads[0])
    tiles = torch.tensor([[2, 0]] * 50, dtype=torch.int32, device=hopper)
    prefill_attention(*static, tiles, tile=tile)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = prefill_attention(*static, tiles, tile=tile)
    for world, each in zip(worlds, lengths, strict=True):
        for target, tensor in zip(static, world, strict=True):
            target[tuple(slice(n) for n in tensor.shape)] = tensor
        plan = planned(*each, heads, tile, 0)
        tiles.copy_(torch.tensor([[2, 0]] * 50))
        tiles[: len(plan)] = plan.to(hopper)
        graph.replay()
        torch.testing.assert_close(out, prefill_attention_reference(*world), atol=1e-2, rtol=1e-2)
        now = prefill_attention(*static, tiles, tile=tile)
        assert torch.equal(now, out)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("inner", "out", "swiglu", "dtype"),
    [
        # a share of K for each program
        (3584, 4608, False, torch.bfloat16),
        (3584, 2304, False, torch.bfloat16),
        (18944, 3584, False, torch.bfloat16),
        # rounds of tiles, and shares of those behind them
        (3584, 18944, True, torch.bfloat16),
        (4096, 11008, True, torch.bfloat16),
        # less than a tile, and less than a block of K
        (200, 80, False, torch.float16),
        (200, 72, True, torch.float16),
        (72, 32000, False, torch.float16),
    ],
)
def test_skinny_products_equal_torch(
    inner: int, out: int, swiglu: bool, dtype: torch.dtype, hopper: torch.device
) -> None:
    """Twice the same bits, also from a graph of several launches, in each of which the counters are left as they were found."""
    weight = (torch.randn(2 * out if swiglu else out, inner) * inner**-0.5).to(hopper, dtype)
    tolerance = 4 * torch.finfo(dtype).eps
    form = common.hopper_form("skinny_linear", weight)
    assert form is not None
    for num_rows in (2, 16, 17, 40):
        x = torch.randn(num_rows, inner + 8).to(hopper, dtype)[:, :inner]
        bias = None if swiglu else torch.randn(out).to(hopper, dtype)
        residual = torch.randn(num_rows, out).to(hopper, dtype)
        assert form.takes(x, weight, bias, swiglu)
        first = skinny_linear(x, weight, bias, residual=residual, swiglu=swiglu)
        expected = skinny_linear_reference(x, weight, bias, residual=residual, swiglu=swiglu)
        torch.testing.assert_close(first, expected, atol=tolerance, rtol=tolerance)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = [skinny_linear(x, weight, bias, residual=residual, swiglu=swiglu) for _ in range(5)]
        for _ in range(3):
            graph.replay()
        assert all(torch.equal(each, first) for each in again)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("inner", "out", "dtype"),
    [
        (3584, 18944, torch.bfloat16),
        # less than a tile of features, and less than a block of K
        (72, 40, torch.float16),
        (4096, 14344, torch.float16),
    ],
)
def test_products_that_end_with_swiglu_equal_torch(
    inner: int, out: int, dtype: torch.dtype, hopper: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From so many rows on that there are several tiles for each program, and one for some; nothing is written behind the last row."""
    with hopper:
        gate_up = MergedLinear(inner, {"gate_proj": out, "up_proj": out}).to(dtype)
        norm = RMSNorm(inner, 1e-6).to(dtype)
    gate_up.weight.copy_(torch.randn(2 * out, inner) * inner**-0.5)
    torch.nn.init.normal_(norm.weight)
    form = common.hopper_form("swiglu_linear", gate_up.weight)
    assert form is not None
    calls = []
    original = form.swiglu_linear_hopper
    monkeypatch.setattr(form, "swiglu_linear_hopper", lambda x, weight: calls.append(len(x)) or original(x, weight))
    tolerance = 4 * torch.finfo(dtype).eps
    for num_rows in (511, 512, 513, 700, 4097):
        x = torch.randn(num_rows, inner).to(hopper, dtype)
        expected = skinny_linear_reference(norm(x), gate_up.weight, swiglu=True)
        torch.testing.assert_close(normed_swiglu(norm, gate_up, x), expected, atol=tolerance, rtol=tolerance)
    assert calls == [512, 513, 700, 4097]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = [normed_swiglu(norm, gate_up, x) for _ in range(3)]
    for _ in range(3):
        graph.replay()
    assert all(torch.equal(each, normed_swiglu(norm, gate_up, x)) for each in again)


@pytest.mark.gpu
def test_kernels_that_begin_early_wait_for_what_they_read(hopper: torch.device) -> None:
    """A chain of products and norms in a graph, behind slow work on two streams that were one before."""
    weights = [(torch.randn(1024, 1024) / 32).to(hopper, torch.bfloat16) for _ in range(4)]
    gain, source = torch.ones(1024, device=hopper, dtype=torch.bfloat16), torch.zeros(2, 24, 1024, device=hopper)

    def slow(x: Tensor) -> Tensor:
        for _ in range(50):
            x = x.sin() + x
        return x.bfloat16()

    def chain(x: Tensor, y: Tensor) -> Tensor:
        for weight in weights:
            x = skinny_linear(rms_norm(x, gain, 1e-6), weight, residual=y)
        return x

    side = torch.cuda.Stream()
    chain(slow(source[0]), slow(source[1]))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            other = slow(source[1])
        mine = slow(source[0])
        torch.cuda.current_stream().wait_stream(side)
        out = chain(mine, other)
    for _ in range(20):
        source.copy_(torch.randn(source.shape))
        graph.replay()
        assert torch.equal(out, chain(slow(source[0]), slow(source[1])))


def test_other_products_stay_with_the_portable_kernel() -> None:
    pytest.importorskip("triton.experimental.gluon", reason="a triton without the language")
    from sightline.kernels.skinny_linear_hopper import takes

    x, weight = torch.zeros(4, 64, dtype=torch.bfloat16), torch.zeros(32, 64, dtype=torch.bfloat16)
    assert takes(x, weight, None, swiglu=True)
    assert takes(x, weight, weight[:, 0], swiglu=False)
    assert not takes(x, weight, weight[:16, 0], swiglu=True)
    assert not takes(x[:, 1:], weight[:, 1:], None, swiglu=False)
    assert not takes(x[:, :60].contiguous(), weight[:, :60].contiguous(), None, swiglu=False)
    assert not takes(x, weight[:24], None, swiglu=False)
    assert not takes(x.float(), weight.float(), None, swiglu=False)


def test_other_products_with_swiglu_stay_with_cublas() -> None:
    pytest.importorskip("triton.experimental.gluon", reason="a triton without the language")
    from sightline.kernels.swiglu_linear_hopper import takes

    x, weight = torch.zeros(600, 64, dtype=torch.bfloat16), torch.zeros(32, 64, dtype=torch.bfloat16)
    assert takes(x, weight)
    assert not takes(x[:, 1:], weight[:, 1:])
    assert not takes(x[:, :60].contiguous(), weight[:, :60].contiguous())
    assert not takes(x, weight[:24])
    assert not takes(x.float(), weight.float())


@pytest.mark.parametrize("name", ["vision_attention", "prefill_attention", "skinny_linear", "swiglu_linear"])
def test_a_triton_without_the_language_leaves_the_portable_kernel(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, f"sightline.kernels.{name}_hopper", None)
    common._hopper_form.cache_clear()
    assert common._hopper_form(name) is None
    assert "portable kernel" in caplog.text
    common._hopper_form.cache_clear()
