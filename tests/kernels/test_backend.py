"""The Triton backend beside the reference backend, on mixed steps over one cache."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="no triton on this machine")

from sightline.attention.backend import AttentionBatch, KVCache
from sightline.attention.torch_sdpa import TorchSDPABackend
from sightline.attention.triton import TritonBackend
from sightline.kernels import prefill_attention
from sightline.layers.rotary import RotaryEmbedding, apply_rotary
from tests.models.harness import PAGE_SIZE, make_batch

NUM_PAGES = 64
HEADS, KV_HEADS, DIM = 6, 2, 32


def new_cache(device: torch.device, dtype: torch.dtype = torch.float32) -> KVCache:
    cache = KVCache.allocate(
        num_layers=2,
        num_pages=NUM_PAGES,
        page_size=PAGE_SIZE,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=dtype,
        device=device,
    )
    for tensor in (*cache.k, *cache.v):
        tensor.fill_(float("nan"))
    return cache


def pages_for(kv_lens: list[int], rng: np.random.Generator) -> list[list[int]]:
    free = rng.permutation(np.arange(1, NUM_PAGES)).tolist()
    return [[free.pop() for _ in range(-(-n // PAGE_SIZE))] for n in kv_lens]


def random_qkv(rows: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    qkv = torch.randn(rows, HEADS + 2 * KV_HEADS, DIM).to(device, dtype)
    q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
    return q, k, v


@pytest.mark.parametrize(("seed", "dtype"), [*((seed, torch.float32) for seed in range(2)), (0, torch.bfloat16)])
def test_equals_the_reference_backend(seed: int, dtype: torch.dtype, device: torch.device) -> None:
    rng = np.random.default_rng(seed)
    backends = (TorchSDPABackend(), TritonBackend())
    caches = (new_cache(device, dtype), new_cache(device, dtype))
    tolerance = 2e-5 if dtype is torch.float32 else 2e-2
    done = [0] * 5
    pages = pages_for([120] * 5, rng)
    # prompts; chunks beside decode rows; decode rows alone; one left
    for work in (
        [(0, 17), (1, 40)],
        [(0, 1), (1, 20), (2, 16), (3, 1 + seed)],
        [(0, 1), (1, 1), (2, 1), (4, 60)],
        [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1)],
        [(4, 1)],
    ):
        for i, n in work:
            done[i] += n
        q_lens = [n for _, n in work]
        batch = make_batch(q_lens, [done[i] for i, _ in work], [pages[i] for i, _ in work], str(device))
        for backend in backends:
            backend.prepare(batch)
        for layer in range(2):
            q, k, v = random_qkv(sum(q_lens), device, dtype)
            expected, out = (b.forward(q, k, v, layer, c, batch) for b, c in zip(backends, caches, strict=True))
            torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    for ours, theirs in zip(caches[1].k + caches[1].v, caches[0].k + caches[0].v, strict=True):
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def test_rotation_and_write_in_one_launch(device: torch.device) -> None:
    rng = np.random.default_rng(0)
    batch = make_batch([1, 30], [1, 30], pages_for([1, 30], rng), str(device))
    caches = (new_cache(device), new_cache(device))
    rotary = RotaryEmbedding(DIM, 1e4).to(device)(torch.randint(0, 99, (31,), device=device))
    qkv = torch.randn(31, (HEADS + 2 * KV_HEADS) * DIM).to(device)
    heads = qkv.unflatten(1, (-1, DIM))
    turned = apply_rotary(heads[:, : HEADS + KV_HEADS], rotary)
    reference, backend = TorchSDPABackend(), TritonBackend()
    reference.prepare(batch)
    backend.prepare(batch)
    q, k, v = turned[:, :HEADS], turned[:, HEADS:], heads[:, HEADS + KV_HEADS :]
    expected = reference.forward(q, k, v, 1, caches[0], batch)
    out = backend.rotate_and_forward(qkv, rotary.cos, rotary.sin, 1, caches[1], batch)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(caches[1].k[1], caches[0].k[1], equal_nan=True)
    assert torch.equal(caches[1].v[1].nan_to_num(), caches[0].v[1].nan_to_num())


@pytest.mark.parametrize(("many", "num_tiles"), [(1, 2), (10**6, 4)])
def test_tiles_of_a_graph_are_those_of_its_size(
    many: int, num_tiles: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decode row and prompts of 70 and 45 tokens in a graph of 120 rows, with large tiles and with small ones."""
    monkeypatch.setattr(prefill_attention, "_MANY_ROWS", many)
    q_lens, kv_lens, num_rows = [1, 70, 45], [9, 70, 60], 120
    real = make_batch(q_lens, kv_lens, pages_for(kv_lens, np.random.default_rng(0)), str(device))
    cache = new_cache(device, torch.bfloat16)
    for tensor in (*cache.k, *cache.v):
        tensor.copy_(torch.randn(tensor.shape))
    backend, reference = TritonBackend(), TorchSDPABackend()
    tiles = backend.plan_tiles([0, *q_lens[1:]], kv_lens, num_rows, HEADS, cache)
    # of 256 // 3 or 128 // 3 tokens
    assert len(tiles) == num_tiles
    slots = torch.full((num_rows,), -1, device=device)
    slots[: sum(q_lens)] = real.slot_mapping
    graph = replace(real, slot_mapping=slots, tiles=torch.from_numpy(tiles).to(device))
    q, k, v = random_qkv(num_rows, device, torch.bfloat16)
    backend.prepare(graph)
    out = backend.forward(q, k, v, 0, cache, graph)[: sum(q_lens)]
    reference.prepare(real)
    expected = reference.forward(*(x[: sum(q_lens)] for x in (q, k, v)), 0, cache, real)
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)


def test_padding_rows_of_a_graph_change_nothing(device: torch.device) -> None:
    """Two rows in a batch of four: kv_len 0, slot -1, page 0."""
    rng = np.random.default_rng(0)
    real = make_batch([1, 1], [1, 1], pages_for([20, 20], rng), str(device))
    padded = AttentionBatch(
        cu_seqlens_q=torch.arange(5, dtype=torch.int32, device=device),
        kv_lens=torch.cat([real.kv_lens, torch.zeros_like(real.kv_lens)]),
        page_table=torch.cat([real.page_table, torch.zeros_like(real.page_table)]),
        slot_mapping=torch.cat([real.slot_mapping, torch.full_like(real.slot_mapping, -1)]),
        q_lens_cpu=[1] * 4,
        kv_lens_cpu=[1, 1, 0, 0],
        num_decode=4,
    )
    cache = new_cache(device)
    backend = TritonBackend()
    backend.prepare(padded)
    q, k, v = random_qkv(4, device)
    k[2:], v[2:], q[2:] = float("nan"), float("nan"), float("nan")
    out = backend.forward(q, k, v, 0, cache, padded)
    # one key each: attention is its value
    torch.testing.assert_close(out[:2], v[:2].repeat_interleave(HEADS // KV_HEADS, dim=1))
    assert out[2:].eq(0).all()
    assert cache.k[0].isfinite().flatten(2).all(-1).sum() == 2


def test_a_server_without_a_gpu_does_not_load_triton() -> None:
    code = "import sys, sightline.engine.factory, sightline.models.qwen2_vl; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
