"""Paged attention against its torch equal: scattered pages, ragged lengths, NaN wherever nobody has written."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="no triton on this machine")

from sightline.kernels.decode_attention import (
    decode_attention,
    decode_attention_reference,
    decode_splits,
    decode_workspace,
)
from sightline.kernels.prefill_attention import (
    prefill_attention,
    prefill_attention_reference,
    prefill_splits,
    prefill_tile,
    prefill_tiles,
)
from sightline.kernels.vision_attention import vision_attention, vision_attention_reference

PAGE = 16
# (query heads, key heads, head_dim)
SHAPES = [(2, 2, 64), (4, 2, 80), (14, 2, 128), (14, 2, 16), (20, 1, 32)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
NAN = float("nan")


class Paged:
    """Random keys and values of sequences of `kv_lens`; everything else in the cache, page 0 too, is NaN."""

    def __init__(
        self, kv_lens: Sequence[int], num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        counts = [-(-n // PAGE) for n in kv_lens]
        num_pages = sum(counts) + 3
        free = (torch.randperm(num_pages - 1) + 1).tolist()
        self.k, self.v = (torch.full((num_pages, PAGE, num_kv_heads, head_dim), NAN) for _ in range(2))
        # behind a sequence's own pages its row names the null page
        self.table = torch.zeros(len(kv_lens), max(*counts, 1) + 2, dtype=torch.int32)
        for i, (kv_len, count) in enumerate(zip(kv_lens, counts, strict=True)):
            pages = [free.pop() for _ in range(count)]
            self.table[i, :count] = torch.tensor(pages, dtype=torch.int32)
            for position in range(kv_len):
                for cache in (self.k, self.v):
                    cache[pages[position // PAGE], position % PAGE] = torch.randn(num_kv_heads, head_dim)
        self.k, self.v = (cache.to(device, dtype) for cache in (self.k, self.v))
        self.table = self.table.to(device)
        self.kv_lens = torch.tensor(kv_lens, dtype=torch.int32, device=device)


def queries(rows: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A view into wider rows, as the merged projection gives them."""
    return torch.randn(rows, num_heads + 3, head_dim).to(device, dtype)[:, 1 : num_heads + 1]


def check(out: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[out.dtype]
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.float32) for shape in SHAPES), (SHAPES[2], torch.bfloat16), (SHAPES[1], torch.float16)],
    ids=str,
)
def test_decode(shape: tuple[int, int, int], dtype: torch.dtype, num_splits: int, device: torch.device) -> None:
    num_heads, num_kv_heads, head_dim = shape
    paged = Paged([1, 15, 16, 17, 300, 0, 129], num_kv_heads, head_dim, dtype, device)
    q = queries(7, num_heads, head_dim, dtype, device)
    out = decode_attention(q, paged.k, paged.v, paged.table, paged.kv_lens, num_splits=num_splits)
    check(out, decode_attention_reference(q, paged.k, paged.v, paged.table, paged.kv_lens))
    assert out[5].eq(0).all()


def test_decode_splits_fill_the_device_and_depend_on_shapes_alone(device: torch.device) -> None:
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    assert 4 * decode_splits(1, 4, 8192, 64, device) >= processors
    assert decode_splits(256, 4, 8192, 64, device) == 1
    assert decode_splits(1, 4, 100, 64, device) <= 2


def test_decode_merges_many_splits(device: torch.device) -> None:
    """More than the merging kernel takes at once, the greatest score in the last."""
    paged = Paged([700, 40, 3], 1, 64, torch.float32, device)
    q = queries(3, 2, 64, torch.float32, device)
    last = paged.table[0, 699 // PAGE]
    paged.k[last, 699 % PAGE] = q[0, :1]
    out = decode_attention(q, paged.k, paged.v, paged.table, paged.kv_lens, num_splits=24)
    check(out, decode_attention_reference(q, paged.k, paged.v, paged.table, paged.kv_lens))


def test_decode_writes_its_rows_alone(device: torch.device) -> None:
    """`out` may be a part of a larger tensor, and the workspace larger than needed and full of anything."""
    paged = Paged([40, 0], 2, 64, torch.float32, device)
    q = queries(2, 4, 64, torch.float32, device)
    whole = torch.full((4, 4, 64), 7.0, device=device)
    workspace = decode_workspace(8, 4, 4, 64, device).fill_(NAN)
    decode_attention(q, paged.k, paged.v, paged.table, paged.kv_lens, out=whole[1:3], num_splits=2, workspace=workspace)
    check(whole[1:3], decode_attention_reference(q, paged.k, paged.v, paged.table, paged.kv_lens))
    assert whole[0].eq(7).all()
    assert whole[3].eq(7).all()


def test_a_captured_decode_serves_other_lengths(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    lengths = [[1, 300, 0, 77], [290, 4, 33, 0]]
    worlds = [Paged(n, 2, 128, torch.bfloat16, device) for n in lengths]
    width = max(w.table.shape[1] for w in worlds)
    table = torch.zeros(4, width, dtype=torch.int32, device=device)
    kv_lens = torch.zeros(4, dtype=torch.int32, device=device)
    pages = max(w.k.shape[0] for w in worlds)
    k, v = (torch.full((pages, PAGE, 2, 128), NAN, dtype=torch.bfloat16, device=device) for _ in range(2))
    q = queries(4, 14, 128, torch.bfloat16, device)
    decode_attention(q, k, v, table, kv_lens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, k, v, table, kv_lens)
    for world in worlds:
        k[: world.k.shape[0]] = world.k
        v[: world.v.shape[0]] = world.v
        table.zero_()[:, : world.table.shape[1]] = world.table
        kv_lens.copy_(world.kv_lens)
        graph.replay()
        check(out, decode_attention_reference(q, k, v, table, kv_lens))


@pytest.mark.parametrize(
    ("shape", "dtype", "num_splits"),
    [
        *((shape, torch.float32, 1) for shape in SHAPES),
        (SHAPES[2], torch.bfloat16, 1),
        (SHAPES[1], torch.float16, 1),
        (SHAPES[0], torch.float32, 4),
        (SHAPES[2], torch.float32, 3),
        (SHAPES[2], torch.bfloat16, 4),
    ],
    ids=str,
)
def test_prefill(shape: tuple[int, int, int], dtype: torch.dtype, num_splits: int, device: torch.device) -> None:
    """With splits of which some rows of a tile see nothing, too: those of 64 tokens behind 10."""
    num_heads, num_kv_heads, head_dim = shape
    q_lens, kv_lens = [1, 15, 16, 17, 0, 12, 3, 64], [1, 15, 16, 17, 0, 300, 130, 74]
    paged = Paged(kv_lens, num_kv_heads, head_dim, dtype, device)
    q = queries(sum(q_lens), num_heads, head_dim, dtype, device)
    cu_seqlens = torch.tensor([0, *torch.tensor(q_lens).cumsum(0)], dtype=torch.int32, device=device)
    tile = prefill_tile(paged.k, 0)
    tiles = torch.from_numpy(prefill_tiles(q_lens, kv_lens, group=num_heads // num_kv_heads, tile=tile)).to(device)
    out = prefill_attention(
        q, paged.k, paged.v, cu_seqlens, paged.kv_lens, paged.table, tiles, tile=tile, num_splits=num_splits
    )
    check(out, prefill_attention_reference(q, paged.k, paged.v, cu_seqlens, paged.kv_lens, paged.table))


def test_keys_of_a_chunk_are_split_where_its_tiles_do_not_fill_the_device() -> None:
    tile = prefill_tile(torch.empty(1, PAGE, 4, 128, dtype=torch.bfloat16), 0)
    splits = [prefill_splits(n, 28, 4, tile, 132) for n in (1, 32, 145, 256, 400, 2000)]
    assert splits == [16, 16, 3, 2, 1, 1]


def test_tiles_cover_every_row_once_the_longest_walk_first() -> None:
    q_lens, kv_lens = [0, 5, 40, 1, 100], [9, 5, 400, 77, 100]
    tile = prefill_tile(torch.empty(1, PAGE, 4, 128, dtype=torch.bfloat16), 0)
    tiles = prefill_tiles(q_lens, kv_lens, group=7, tile=tile).tolist()
    step = tile.block_m // 7
    rows = [(i, r) for i, first in tiles for r in range(first, min(first + step, q_lens[i]))]
    assert sorted(rows) == [(i, r) for i, n in enumerate(q_lens) for r in range(n)]
    walks = [kv_lens[i] - q_lens[i] + first for i, first in tiles]
    assert walks == sorted(walks, reverse=True)
    assert prefill_tiles([], [], group=7, tile=tile).shape == (0, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("head_dim", "num_patches", "num_pictures"), [(80, 70, 2), (72, 129, 1), (64, 64, 1), (24, 9, 3)]
)
def test_vision_attention(
    head_dim: int, num_patches: int, num_pictures: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Widths that are powers of two or not, whole and broken blocks of keys; pictures do not see each other."""
    num_heads, num_rows = 2, num_patches * num_pictures
    qkv = torch.randn(num_rows, 3, num_heads, head_dim).to(device, dtype)
    q, k, v = qkv.unbind(1)
    out = torch.full((num_rows + 1, num_heads * head_dim), 7.0, device=device, dtype=dtype)
    result = vision_attention(q, k, v, num_pictures, out[:num_rows])
    expected = vision_attention_reference(q.float(), k.float(), v.float(), num_pictures)
    tolerance = 2e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(result.float(), expected, atol=tolerance, rtol=tolerance)
    assert out[num_rows].eq(7).all()
    torch.testing.assert_close(vision_attention(q, k, v, num_pictures), result)
