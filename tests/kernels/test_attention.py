"""Paged attention against its torch equal: scattered pages, ragged lengths, NaN wherever nobody has written."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="no triton on this machine")

from sightline.kernels import decode_attention as decode_kernels
from sightline.kernels.decode_attention import (
    DecodePlan,
    Split,
    decode_attention,
    decode_attention_reference,
    decode_plan,
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


def planned(paged: Paged, num_heads: int, programs: int, block_n: int = 32) -> DecodePlan:
    """Keys of all rows in so many programs for each multiprocessor, of which a CPU has one."""
    num_kv_heads, head_dim = paged.k.shape[2:]
    how = Split(block_n, 4, 2, programs)
    return decode_plan(paged.kv_lens, num_heads, num_kv_heads, head_dim, paged.k.dtype, how=how)


def items_of(plan: DecodePlan) -> list[list[int]]:
    """(row, first key, end of the keys, first item of the row, items of the row); nothing stands behind padding."""
    items = plan.items[: 6 * plan.capacity].view(-1, 6).tolist()
    live = [item[:5] for item in items if item[4]]
    assert [item[:5] for item in items[: len(live)]] == live
    return live


@pytest.mark.parametrize("programs", [1, 24])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.float32) for shape in SHAPES), (SHAPES[2], torch.bfloat16), (SHAPES[1], torch.float16)],
    ids=str,
)
def test_decode(shape: tuple[int, int, int], dtype: torch.dtype, programs: int, device: torch.device) -> None:
    num_heads, num_kv_heads, head_dim = shape
    paged = Paged([1, 15, 16, 17, 300, 0, 129], num_kv_heads, head_dim, dtype, device)
    q = queries(7, num_heads, head_dim, dtype, device)
    plan = planned(paged, num_heads, programs)
    out = decode_attention(q, paged.k, paged.v, paged.table, paged.kv_lens, plan=plan)
    check(out, decode_attention_reference(q, paged.k, paged.v, paged.table, paged.kv_lens))
    assert out[5].eq(0).all()


@pytest.mark.parametrize("seed", range(3))
def test_decode_of_any_lengths_twice_the_same_bits(seed: int, device: torch.device) -> None:
    """A row alone, a long one beside short ones, padding; in two layers with one plan, whose scratch is full of anything."""
    random = torch.Generator().manual_seed(seed)
    for lengths in (
        torch.randint(1, 900, (1,), generator=random),
        torch.tensor([0, 3, 700, 1, 20, 0, 0]),
        torch.randint(0, 120, (5,), generator=random) * torch.randint(0, 2, (5,), generator=random),
    ):
        layers = [Paged(lengths.tolist(), 2, 32, torch.float32, device) for _ in range(2)]
        q = queries(len(lengths), 6, 32, torch.float32, device)
        plan = planned(layers[0], 6, int(torch.randint(1, 40, (), generator=random)), 16)
        plan.parts.fill_(NAN)
        outs = []
        for layer in (*layers, layers[0]):
            outs.append(decode_attention(q, layer.k, layer.v, layer.table, layer.kv_lens, plan=plan))
            check(outs[-1], decode_attention_reference(q, layer.k, layer.v, layer.table, layer.kv_lens))
        assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("batch", [1, 7, 300])
def test_a_plan_gives_every_key_to_one_item(batch: int, device: torch.device) -> None:
    """More rows than the kernel looks at together, too; some of them padding."""
    lengths = torch.randint(0, 4000, (batch,)) * (torch.rand(batch) < 0.7)
    lengths[batch // 2] = 3999
    for programs in (1, 24, 1000):
        plan = decode_plan(lengths.to(device, torch.int32), 14, 2, 64, torch.bfloat16, how=Split(64, 4, 2, programs))
        items = items_of(plan)
        base = 0
        for row, kv_len in enumerate(lengths.tolist()):
            mine = [item for item in items if item[0] == row]
            assert items[base : base + len(mine)] == mine
            assert all(item[3:] == [base, len(mine)] for item in mine)
            bounds = [item[1] for item in mine] + [kv_len]
            assert [item[2] for item in mine] == bounds[1:]
            assert bounds[0] == 0
            assert all(a < b and a % 64 == 0 for a, b in itertools.pairwise(bounds))
            base += len(mine)
        assert base == len(items)
        empty = plan.items[: 6 * plan.capacity].view(-1, 6)[:, 5].tolist()
        assert sorted(row for row in empty if row >= 0) == torch.where(lengths == 0)[0].tolist()
        assert not plan.items[6 * plan.capacity :].any()


@pytest.mark.parametrize(
    ("lengths", "counts"),
    [
        # a short row, and a long one
        ([300], [3]),
        ([30000], [32]),
        # as many as run at once: 132
        ([1450] * 16, [8] * 16),
        ([1520] * 46 + [0] * 18, [2] * 46 + [0] * 18),
        ([7500] * 21 + [0] * 43, [6] * 21 + [0] * 43),
        # more rows than that, alike or not
        ([600, 550] * 100, [1] * 200),
        ([100] * 200 + [8000] * 4, [1] * 200 + [16] * 4),
        # no row counts for nothing, but a long one is not left to one program
        ([1] * 131 + [30000], [1] * 131 + [16]),
    ],
    ids=lambda n: f"{len(n)}x{max(n)}",
)
def test_a_plan_lets_all_run_at_once(
    lengths: list[int], counts: list[int], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_kernels, "multiprocessors", lambda device: 132)
    kv_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    plan = decode_plan(kv_lens, 28, 4, 128, torch.bfloat16, how=Split(64, 4, 2, 4))
    items = items_of(plan)
    assert [sum(item[0] == row for item in items) for row in range(len(lengths))] == counts


def test_decode_merges_many_items(device: torch.device) -> None:
    """More than are read together, the greatest score in the last."""
    paged = Paged([3000, 40, 3], 1, 64, torch.float32, device)
    q = queries(3, 2, 64, torch.float32, device)
    last = paged.table[0, 2999 // PAGE]
    paged.k[last, 2999 % PAGE] = q[0, :1]
    plan = planned(paged, 2, 24)
    assert items_of(plan)[0][4] > 8
    out = decode_attention(q, paged.k, paged.v, paged.table, paged.kv_lens, plan=plan)
    check(out, decode_attention_reference(q, paged.k, paged.v, paged.table, paged.kv_lens))


def test_decode_writes_its_rows_alone(device: torch.device) -> None:
    """`out` may be a part of a larger tensor."""
    paged = Paged([300, 0], 2, 64, torch.float32, device)
    q = queries(2, 4, 64, torch.float32, device)
    whole = torch.full((4, 4, 64), 7.0, device=device)
    decode_attention(q, paged.k, paged.v, paged.table, paged.kv_lens, out=whole[1:3], plan=planned(paged, 4, 8))
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
