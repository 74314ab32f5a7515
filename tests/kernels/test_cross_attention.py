"""Decode rows that see pictures: the kernel, which reads their addresses on the device, beside torch, which is told on the host."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="no triton on this machine")

from sightline.attention.cross import CrossAttentionBatch, CrossDecodeBatch, PictureGroup, cross_attention
from sightline.attention.triton import TritonBackend
from sightline.kernels.cross_attention import decode_cross_attention
from sightline.kernels.decode_attention import Split, decode_plan
from tests.models.harness import make_batch

LAYERS, SLOTS = 3, 4
# (query heads, key heads, head_dim)
SHAPES = [(2, 2, 64), (6, 2, 80), (8, 1, 128)]
# What each row sees, of pictures of so many tokens; the last rows are a graph's padding.
SIZES = (5, 131, 65, 64)
ROWS = [(0,), (), (1, 2), (2, 0, 1, 3), (1,), (3, 3), (), ()]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def tables(pictures: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """addresses and ends of ROWS, as parts of wider ones. Nobody may look where an address is wrong."""
    addresses = torch.full((SLOTS, len(ROWS) + 3), 8, dtype=torch.int64)
    ends = torch.zeros(SLOTS, len(ROWS) + 3, dtype=torch.int32)
    for row, seen in enumerate(ROWS):
        for slot, i in enumerate(seen):
            addresses[slot, row] = pictures[i].data_ptr()
            ends[slot:, row] += SIZES[i]
    return addresses.to(device)[:, : len(ROWS)], ends.to(device)[:, : len(ROWS)]


def expected(q: Tensor, layer: int, pictures: list[Tensor]) -> Tensor:
    seeing = [row for row, seen in enumerate(ROWS) if seen]
    groups = [PictureGroup(1, tuple(pictures[i] for i in ROWS[row])) for row in seeing]
    out = torch.zeros_like(q)
    out[seeing] = cross_attention(q[seeing], layer, CrossAttentionBatch(None, groups))
    return out


@pytest.mark.parametrize(
    ("shape", "dtype", "programs"),
    [
        (SHAPES[0], torch.float32, 1),
        # more than there are blocks of keys
        (SHAPES[0], torch.float32, 60),
        (SHAPES[1], torch.float32, 8),
        (SHAPES[2], torch.float32, None),
        (SHAPES[2], torch.bfloat16, 4),
        (SHAPES[1], torch.float16, 1),
    ],
    ids=str,
)
def test_rows_that_see_none_one_and_several(
    shape: tuple[int, int, int], dtype: torch.dtype, programs: int | None, device: torch.device
) -> None:
    num_heads, num_kv_heads, head_dim = shape
    pictures = [torch.randn(LAYERS, 2, n, num_kv_heads, head_dim).to(device, dtype) for n in SIZES]
    addresses, ends = tables(pictures, device)
    q = torch.randn(len(ROWS), num_heads + 1, head_dim).to(device, dtype)[:, :num_heads]
    # what a padding row asks is nobody's business
    q[6:] = float("nan")
    plan = None
    if programs is not None:
        how = Split(32, 4, 2, programs)
        plan = decode_plan(ends[-1], num_heads, num_kv_heads, head_dim, dtype, how=how)
    out = decode_cross_attention(q, 2, addresses, ends, num_kv_heads, plan=plan)
    torch.testing.assert_close(out, expected(q, 2, pictures), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert out[[1, 6, 7]].eq(0).all()


def test_a_row_does_not_depend_on_its_neighbours(device: torch.device) -> None:
    """Bit for bit, as long as the keys are divided alike; a neighbour's picture may be no number at all."""
    pictures = [torch.randn(LAYERS, 2, n, 2, 64).to(device) for n in SIZES]
    addresses, ends = tables(pictures, device)
    q = torch.randn(len(ROWS), 4, 64).to(device)
    before = decode_cross_attention(q, 1, addresses, ends, 2)
    pictures[1].fill_(float("nan"))
    q[[2, 3, 4]] = float("nan")
    after = decode_cross_attention(q, 1, addresses, ends, 2)
    strangers = [0, 1, 5, 6, 7]
    assert torch.equal(before[strangers], after[strangers])
    assert after[2:5].isnan().all()


def test_the_next_step_sees_other_pictures(device: torch.device) -> None:
    """The backend plans once a step, for all layers."""
    pictures = [torch.randn(LAYERS, 2, n, 2, 64).to(device) for n in SIZES]
    addresses, ends = tables(pictures, device)
    q = torch.randn(len(ROWS), 4, 64).to(device)
    backend = TritonBackend()
    for step in (CrossDecodeBatch(addresses[:1], ends[:1], 2), CrossDecodeBatch(addresses, ends, 2)):
        backend.prepare(make_batch([1], [1], [[1]], str(device)))
        out = [backend.cross_forward(q, layer, step) for layer in range(LAYERS)]
    for layer in range(LAYERS):
        torch.testing.assert_close(out[layer], expected(q, layer, pictures), atol=1e-5, rtol=1e-5)


def test_a_captured_launch_serves_other_pictures(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    pictures = [torch.randn(LAYERS, 2, n, 2, 128).to(device, torch.bfloat16) for n in SIZES]
    addresses, ends = tables(pictures, device)
    q = torch.randn(len(ROWS), 8, 128).to(device, torch.bfloat16)
    static = [torch.zeros_like(addresses), torch.zeros_like(ends)]
    decode_cross_attention(q, 1, *static, 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_cross_attention(q, 1, *static, 2)
    graph.replay()
    assert out.eq(0).all()
    static[0].copy_(addresses)
    static[1].copy_(ends)
    graph.replay()
    torch.testing.assert_close(out, expected(q, 1, pictures), atol=2e-2, rtol=2e-2)


# In a process of its own: under TRITON_INTERPRET, which other tests here may run with, nothing is compiled.
_COMPILE = """
import sys, torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sightline.kernels.cross_attention import _cross_kernel
from sightline.kernels.decode_attention import decode_split

how = decode_split(torch.bfloat16, int(sys.argv[1]))
constants = dict(GROUP=4, BLOCK_G=4, BLOCK_H=16, HEAD_DIM=128, BLOCK_D=128, BLOCK_N=how.block_n)
strides = ("q_stride_row", "q_stride_head", "out_stride_row", "out_stride_head")
signature = dict(q="*bf16", out="*bf16", parts="*fp32", items="*i32", addresses="*i64", ends="*i32", layer="i32", scale="fp32")
signature |= dict.fromkeys(("stride_picture", *strides), "i32") | dict.fromkeys(constants, "constexpr")
aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(signature) if n in ("q", "out", "parts", "items", *strides)}
options = {"num_warps": how.num_warps, "num_stages": how.num_stages}
kernel = compile(ASTSource(_cross_kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32), options=options)
print("copies", kernel.asm["ptx"].count("cp.async.cg"), "shared", kernel.metadata.shared)
"""


@pytest.mark.parametrize("batch", [1, 128])
def test_it_compiles_for_hopper_and_copies_ahead(batch: int) -> None:
    """Keys behind an address that only the device knows still come 16 bytes at a time, during the block before."""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", _COMPILE, str(batch)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    _, copies, _, shared = done.stdout.split()
    assert int(copies) > 0
    assert int(shared) < 227 * 1024
