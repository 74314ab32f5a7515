"""The kernels for Hopper. Their language has no interpreter: without such a card they are compiled for one, no more."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="no triton on this machine")

from sightline.kernels import vision_attention as portable
from sightline.kernels.vision_attention import vision_attention, vision_attention_reference

# In a process of its own: under TRITON_INTERPRET, which other tests here may run with, nothing is compiled.
_COMPILE = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from sightline.kernels.vision_attention_hopper import _vision_hopper_kernel, hopper_tile

tile = hopper_tile(int(sys.argv[1]))
rows = lambda n: f"tensordesc<bf16[1, {tile.block_n}, {n}],{gl.NVMMASharedLayout(2 * n, 16, 3)!r}>"
constants = dict(HEAD_DIM=80, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, STAGES=tile.stages, num_warps=tile.num_warps)
signature = dict(q="*bf16", out="*bf16", k_main=rows(64), k_rest=rows(16), v_main=rows(64), v_rest=rows(16))
signature |= dict(num_patches="i32", scale="fp32", stride="i32", stride_out="i32") | dict.fromkeys(constants, "constexpr")
aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in ("q", "out", "stride", "stride_out")}
source = GluonASTSource(_vision_hopper_kernel, signature, constants, aligned)
kernel = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tile.num_warps})
assert "wgmma.mma_async" in kernel.asm["ptx"] and "cp.async.bulk.tensor" in kernel.asm["ptx"]
print("shared", kernel.metadata.shared)
"""


@pytest.mark.parametrize("num_patches", [1296, 5476])
def test_it_compiles_for_hopper_and_fits(num_patches: int) -> None:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", _COMPILE, str(num_patches)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    # two programs share a multiprocessor's 227 KiB
    assert int(done.stdout.split()[1]) < 113 * 1024


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("head_dim", "num_patches", "num_pictures"), [(80, 1296, 3), (72, 729, 5), (80, 5476, 1), (80, 4, 2)]
)
def test_it_equals_torch_and_the_portable_kernel(
    head_dim: int, num_patches: int, num_pictures: int, dtype: torch.dtype, device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if torch.cuda.get_device_capability(device)[0] != 9:
        pytest.skip("no Hopper card")
    qkv = torch.randn(num_patches * num_pictures, 3, 16, head_dim).to(device, dtype)
    # a picture beside it that is not a number harms nobody
    qkv[num_patches:] = float("nan")
    q, k, v = qkv.unbind(1)
    result = vision_attention(q, k, v, num_pictures)[:num_patches]
    expected = vision_attention_reference(*(t[:num_patches].float() for t in (q, k, v)), 1)
    torch.testing.assert_close(result.float(), expected, atol=1e-2, rtol=1e-2)
    monkeypatch.setattr(portable, "_on_hopper", lambda q: False)
    other = vision_attention(q, k, v, num_pictures)[:num_patches]
    torch.testing.assert_close(result, other, atol=1e-2, rtol=1e-2)


def test_a_triton_without_the_language_leaves_the_portable_kernel(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "sightline.kernels.vision_attention_hopper", None)
    monkeypatch.delattr("sightline.kernels.vision_attention_hopper", raising=False)
    portable._hopper.cache_clear()
    assert portable._hopper() is None
    assert "portable kernel" in caplog.text
    portable._hopper.cache_clear()
