"""Times each kernel at the shapes of a 7B model (Qwen2-VL) beside torch: `python -m sightline.bench.kernels [--tune]`.

Needs a CUDA device. A measurement is the median of replays of a CUDA graph, each behind a write that pushes everything out
of the L2 cache, as the other layers of a model would. --tune tries other tiles for the two attention kernels.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sightline.bench.report import environment, table
from sightline.kernels import norm, rope
from sightline.kernels.activation import silu_and_mul, silu_and_mul_reference
from sightline.kernels.decode_attention import Split, decode_attention, decode_plan
from sightline.kernels.prefill_attention import Tile, prefill_attention, prefill_tile, prefill_tiles

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, DIM, PAGE = 3584, 18944, 28, 4, 128, 16
VISION_WIDTH, VISION_HEADS = 1280, 16
DTYPE = torch.bfloat16
Row = tuple[str, str, str, str, str]

DECODE = [*((batch, [1500] * batch) for batch in (1, 8, 32, 64, 128, 256)), (1, [300]), (1, [8000])]
MIXED = [100 + 7900 * i // 31 for i in range(32)]
# (new tokens, keys) of each sequence
PREFILL = [[(1453, 1453)], [(1453, 1453)] * 5, [(408, 408)] * 20, [(8192, 8192)], [(2048, 6144)], [(64, 1517)] * 16]
TILES = [
    Tile(m, n, w, s)
    for m, n, w, s in ((128, 64, 8, 3), (128, 64, 8, 5), (128, 128, 8, 2), (64, 64, 4, 3), (64, 64, 4, 5))
]
SPLITS = [
    Split(*s) for s in ((64, 4, 3, 3), (64, 4, 3, 4), (64, 4, 4, 4), (32, 4, 4, 4), (32, 4, 3, 6), (128, 8, 2, 3))
]


class Clock:
    """Measures on the current device."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def __call__(self, work: Callable[..., object], *arguments: Any, **named: Any) -> float:
        """Median microseconds of work(*arguments, **named)."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            work(*arguments, **named)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work(*arguments, **named)
        pairs = []
        for _ in range(self.repeats):
            self.flush.zero_()
            pairs.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
            pairs[-1][0].record()
            graph.replay()
            pairs[-1][1].record()
        torch.cuda.synchronize()
        return statistics.median(1000 * first.elapsed_time(last) for first, last in pairs)


def random(*shape: int) -> Tensor:
    """Standard normal."""
    return torch.randn(shape, dtype=DTYPE, device="cuda")


def paged(kv_lens: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(k, v, page_table, kv_lens) with the pages of all sequences shuffled."""
    counts = [-(-n // PAGE) for n in kv_lens]
    pages = (torch.randperm(sum(counts)) + 1).to(torch.int32)
    page_table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    for line, own in zip(page_table, pages.split(counts), strict=True):
        line[: len(own)] = own
    k, v = (random(sum(counts) + 1, PAGE, KV_HEADS, DIM) for _ in range(2))
    return k, v, page_table.cuda(), torch.tensor(kv_lens, dtype=torch.int32, device="cuda")


def row(name: str, shape: str, ours: float, other: float | None, rate: str) -> Row:
    """A line of the table."""
    return name, shape, f"{ours:.1f}", "" if other is None else f"{other:.1f}", rate


def rate(amount: float, microseconds: float, unit: str) -> str:
    """amount: bytes or floating-point operations."""
    scale = 1e3 if unit == "GB/s" else 1e6
    return f"{amount / microseconds / scale:.0f} {unit}"


def decode_rows(clock: Clock, split: Split | None) -> list[Row]:
    """torch's equal has all keys side by side, without pages, and equal lengths only."""
    rows = []
    for batch, kv_lens in [*DECODE, (len(MIXED), MIXED)]:
        k, v, page_table, lens = paged(kv_lens)
        q = random(batch, HEADS, DIM)
        plan = decode_plan(lens, HEADS, KV_HEADS, DIM, DTYPE, how=split)
        ours = clock(decode_attention, q, k, v, page_table, lens, plan=plan)
        other = None
        if split is None and len(set(kv_lens)) == 1:
            k, v = (random(batch, KV_HEADS, kv_lens[0], DIM) for _ in range(2))
            other = clock(scaled_dot_product_attention, q.view(batch, KV_HEADS, -1, DIM), k, v)
        name = "decode attention" if split is None else f"decode {tuple(split)}"
        keys = f"{kv_lens[0]}" if len(set(kv_lens)) == 1 else f"{min(kv_lens)}..{max(kv_lens)}"
        size = sum(kv_lens) * KV_HEADS * DIM * 2 * DTYPE.itemsize
        rows.append(row(name, f"B={batch} keys={keys}", ours, other, rate(size, ours, "GB/s")))
    return rows


def prefill_rows(clock: Clock, tile: Tile | None) -> list[Row]:
    """torch's equal is its FlashAttention over packed rows, which cannot have a history."""
    rows = []
    for work in PREFILL:
        q_lens, kv_lens = ([pair[i] for pair in work] for i in range(2))
        k, v, page_table, lens = paged(kv_lens)
        chosen = tile or prefill_tile(k, sum(q_lens) * HEADS)
        plan = torch.from_numpy(prefill_tiles(q_lens, kv_lens, group=HEADS // KV_HEADS, tile=chosen)).cuda()
        offsets = torch.tensor([0, *q_lens]).cumsum(0).to("cuda", torch.int32)
        q = random(sum(q_lens), HEADS, DIM)
        ours = clock(prefill_attention, q, k, v, offsets, lens, page_table, plan, tile=chosen)
        other = None
        if tile is None and q_lens == kv_lens:
            k, v = (random(sum(q_lens), KV_HEADS, DIM) for _ in range(2))
            other = clock(packed_attention, q, k, v, offsets, max(q_lens))
        name = "prefill attention" if tile is None else f"prefill {tuple(tile)}"
        pairs = sum(n * (m - n) + n * (n + 1) // 2 for n, m in work)
        shape = f"{len(work)} x {q_lens[0]} of {kv_lens[0]}"
        rows.append(row(name, shape, ours, other, rate(4.0 * HEADS * DIM * pairs, ours, "TFLOP/s")))
    return rows


def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
    """torch's FlashAttention over packed sequences without history."""
    return torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, max_len, max_len, 0.0, True, False, scale=q.shape[-1] ** -0.5
    )[0]


def elementwise_rows(clock: Clock) -> list[Row]:
    """Bytes are those that must be read and written once."""
    rows = []
    width = (HEADS + 2 * KV_HEADS) * DIM
    weight = random(HIDDEN)
    inv_freq = torch.rand(DIM // 2, device="cuda")
    axis = torch.arange(DIM // 2, device="cuda") // 22
    for count in (1, 64, 256, 8192):
        x, gate_up, qkv = random(count, HIDDEN), random(count, 2 * INTERMEDIATE), random(count, width)
        positions = torch.randint(0, 8000, (3, count), device="cuda")
        cos, sin = rope.rotary_tables(positions, inv_freq, axis)
        k, v = (random(count // PAGE + 2, PAGE, KV_HEADS, DIM) for _ in range(2))
        slots = torch.randperm(count, device="cuda") + PAGE
        own = qkv.view(count, -1, DIM)[:, HEADS : HEADS + KV_HEADS]
        size = count * DTYPE.itemsize
        cases: list[tuple[str, Callable[..., object], Callable[..., object], tuple[Any, ...], int]] = [
            ("rms norm", norm.rms_norm, norm.rms_norm_reference, (x, weight, 1e-6), 2 * HIDDEN * size),
            ("silu x up", silu_and_mul, silu_and_mul_reference, (gate_up,), 3 * INTERMEDIATE * size),
            ("tables", rope.rotary_tables, rope.rotary_tables_reference, (positions, inv_freq, axis), 8 * DIM * count),
            ("rotate + write", rope.rotate_and_write, rotate_in_torch, (qkv, cos, sin, k, v, slots), 2 * width * size),
            ("write", rope.write_kv, write_in_torch, (own, own, k, v, slots), 4 * KV_HEADS * DIM * size),
        ]
        for name, ours, other, arguments, amount in cases:
            mine = clock(ours, *arguments)
            rows.append(row(name, f"T={count}", mine, clock(other, *arguments), rate(amount, mine, "GB/s")))
    return rows


def vision_rows(clock: Clock) -> list[Row]:
    """The rotation of the vision tower."""
    count = 5476
    qkv = random(count, 3 * VISION_WIDTH)
    angles = torch.rand(1, count, device="cuda").mul(74).long()
    half = VISION_WIDTH // VISION_HEADS // 2
    axis = torch.zeros(half, dtype=torch.int64, device="cuda")
    cos, sin = rope.rotary_tables(angles, torch.rand(half, device="cuda"), axis)
    ours = clock(rope.rotate_heads, qkv, cos, sin, 2 * VISION_HEADS)
    other = clock(rope.rotate_heads_reference, qkv, cos, sin, 2 * VISION_HEADS)
    size = 2 * count * 2 * VISION_WIDTH * DTYPE.itemsize
    return [row("rotate (vision)", f"N={count}", ours, other, rate(size, ours, "GB/s"))]


def rotate_in_torch(qkv: Tensor, cos: Tensor, sin: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """`rotate_and_write_reference` for rows that all have slots, without a look at the host."""
    rope.rotate_heads_reference(qkv, cos, sin, HEADS + KV_HEADS)
    heads = qkv.view(qkv.shape[0], -1, DIM)
    write_in_torch(heads[:, HEADS : HEADS + KV_HEADS], heads[:, HEADS + KV_HEADS :], k, v, slots)


def write_in_torch(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Likewise."""
    k_cache.flatten(0, 1).index_copy_(0, slots, k)
    v_cache.flatten(0, 1).index_copy_(0, slots, v)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table."""
    parser = argparse.ArgumentParser(prog="python -m sightline.bench.kernels", description="Time the GPU kernels.")
    parser.add_argument("--tune", action="store_true", help="try other tiles for the attention kernels instead")
    parser.add_argument("--repeats", type=int, default=30, help="replays of each measurement (30)")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA device")
    torch.manual_seed(0)
    clock = Clock(options.repeats)
    rows: list[Row] = []
    if options.tune:
        for split in SPLITS:
            rows += decode_rows(clock, split)
        for tile in TILES:
            rows += prefill_rows(clock, tile)
    else:
        rows = [*decode_rows(clock, None), *prefill_rows(clock, None), *elementwise_rows(clock), *vision_rows(clock)]
    facts = {**environment(("torch", "triton")), "gpu": torch.cuda.get_device_name()}
    print(", ".join(f"{key}: {value}" for key, value in facts.items()))
    print(table(("kernel", "shape", "us", "torch us", "rate"), rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
