"""The reference backend against attention written out by hand, on packed batches over scattered pages."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sightline.attention.backend import KVCache
from sightline.attention.torch_sdpa import TorchSDPABackend
from tests.models.harness import PAGE_SIZE, make_batch

HEAD_DIM = 16
NUM_PAGES = 96


class World:
    """Sequences with all their keys and values in plain lists, and the same in a paged cache of two layers."""

    def __init__(self, num_heads: int, num_kv_heads: int, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self.rng = np.random.default_rng(seed)
        self.num_heads, self.num_kv_heads, self.dtype = num_heads, num_kv_heads, dtype
        self.cache = KVCache.allocate(
            num_layers=2,
            num_pages=NUM_PAGES,
            page_size=PAGE_SIZE,
            num_kv_heads=num_kv_heads,
            head_dim=HEAD_DIM,
            dtype=dtype,
            device=torch.device("cpu"),
        )
        for tensor in (*self.cache.k, *self.cache.v):
            tensor.fill_(float("nan"))
        self.free = list(self.rng.permutation(np.arange(1, NUM_PAGES)))
        self.backend = TorchSDPABackend()
        self.pages: list[list[int]] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def random(self, *shape: int) -> Tensor:
        return torch.from_numpy(self.rng.standard_normal(shape)).to(self.dtype)

    def add(self, *, contiguous: bool = False) -> int:
        """A new, empty sequence."""
        if contiguous:
            self.free.sort(reverse=True)
        self.pages.append([])
        self.keys.append(self.random(2, 0, self.num_kv_heads, HEAD_DIM))
        self.values.append(self.random(2, 0, self.num_kv_heads, HEAD_DIM))
        return len(self.pages) - 1

    def remove(self, index: int) -> None:
        """Its pages go back, full of what another sequence must not see."""
        for page in self.pages[index]:
            for tensor in (*self.cache.k, *self.cache.v):
                tensor[page] = float("nan")
        self.free += self.pages[index]
        self.pages[index] = []

    def step(self, work: list[tuple[int, int]]) -> None:
        """Each sequence gets so many new tokens (1 first); both layers are compared with the oracle."""
        kv_lens = []
        for index, q_len in work:
            kv_len = self.keys[index].shape[1] + q_len
            while len(self.pages[index]) * PAGE_SIZE < kv_len:
                self.pages[index].append(int(self.free.pop()))
            for store in (self.keys, self.values):
                store[index] = torch.cat([store[index], self.random(2, q_len, self.num_kv_heads, HEAD_DIM)], dim=1)
            kv_lens.append(kv_len)
        q_lens = [q_len for _, q_len in work]
        batch = make_batch(q_lens, kv_lens, [self.pages[index] for index, _ in work])
        self.backend.prepare(batch)
        for layer in range(2):
            q = self.random(sum(q_lens), self.num_heads, HEAD_DIM)
            k = torch.cat([self.keys[i][layer, -n:] for i, n in work])
            v = torch.cat([self.values[i][layer, -n:] for i, n in work])
            out = self.backend.forward(q, k, v, layer, self.cache, batch)
            assert out.shape == q.shape
            expected = [
                naive(queries, self.keys[i][layer], self.values[i][layer])
                for queries, (i, _) in zip(q.split(q_lens), work, strict=True)
            ]
            tolerance = 1e-5 if self.dtype is torch.float32 else 2e-2
            torch.testing.assert_close(out.double(), torch.cat(expected), atol=tolerance, rtol=tolerance)


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [q_len, H, D], k, v [kv_len, Hk, D]: one query and one head after another, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty_like(q)
    group = q.shape[1] // k.shape[1]
    for row in range(q.shape[0]):
        seen = k.shape[0] - q.shape[0] + row + 1
        for head in range(q.shape[1]):
            scores = k[:seen, head // group] @ q[row, head] * q.shape[2] ** -0.5
            out[row, head] = scores.softmax(0) @ v[:seen, head // group]
    return out


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 2), (8, 1)])
@pytest.mark.parametrize("seed", range(6))
def test_random_mixes(num_heads: int, num_kv_heads: int, seed: int) -> None:
    world = World(num_heads, num_kv_heads, seed)
    rng = world.rng
    alive: list[int] = []
    for _ in range(12):
        while len(alive) < 3 or (len(alive) < 6 and rng.random() < 0.3):
            alive.append(world.add(contiguous=rng.random() < 0.3))
        decode = [i for i in alive if world.keys[i].shape[1] and rng.random() < 0.7]
        chunks = [i for i in alive if i not in decode and world.keys[i].shape[1] < 100 and rng.random() < 0.7]
        work = [(i, 1) for i in decode] + [(i, int(rng.integers(2, 40))) for i in chunks]
        if work:
            world.step(work)
        for i in list(alive):
            if rng.random() < 0.1:
                world.remove(i)
                alive.remove(i)


def test_decode_rows_of_equal_and_of_very_different_lengths() -> None:
    world = World(4, 2, 0)
    sequences = [world.add() for _ in range(4)]
    for i, length in zip(sequences, (33, 33, 33, 33), strict=True):
        world.step([(i, length)])
    world.step([(i, 1) for i in sequences])
    world.step([(sequences[0], 300)])
    world.step([(i, 1) for i in sequences])
    world.step([(sequences[1], 1)])


def test_new_prompts_of_one_length_share_a_call() -> None:
    world = World(4, 2, 0)
    sequences = [world.add() for _ in range(8)]
    world.step([(sequences[0], 7)])
    # a decode row, three equally long ones, one with history between, two more, a longer one
    lengths = (1, 12, 12, 12, 12, 12, 24)
    history = world.add()
    world.step([(history, 5)])
    order = [sequences[0], *sequences[1:4], history, *sequences[4:6], sequences[6]]
    world.step([(i, n) for i, n in zip(order, (*lengths[:4], 12, *lengths[4:]), strict=True)])
    plan = world.backend._plan
    assert plan is not None
    assert [(part.first, part.end, part.count) for part in plan.prefill] == [
        (1, 37, 3),
        (37, 49, 1),
        (49, 73, 2),
        (73, 97, 1),
    ]


def test_one_long_sequence_does_not_pad_the_others() -> None:
    world = World(4, 2, 0)
    sequences = [world.add() for _ in range(6)]
    world.step([(i, n) for i, n in zip(sequences, (5, 15, 16, 600, 310, 305), strict=True)])
    for _ in range(3):
        world.step([(i, 1) for i in sequences])
    plan = world.backend._plan
    assert plan is not None
    assert [group.keys.num_keys for group in plan.decode] == [603, 19]


def test_first_token_alone_is_a_decode_row() -> None:
    world = World(4, 2, 0)
    world.step([(world.add(), 1)])
    world.step([(0, 1), (world.add(), 1)])


def test_the_plan_does_not_outlive_its_step() -> None:
    """Equal shapes, other pages: a retracted sequence comes back elsewhere and a new one takes its pages."""
    world = World(4, 2, 0)
    a, b = world.add(), world.add()
    world.step([(a, 20), (b, 20)])
    world.step([(a, 1), (b, 1)])
    world.pages[a], world.pages[b] = world.pages[b], world.pages[a]
    world.keys[a], world.keys[b] = world.keys[b], world.keys[a]
    world.values[a], world.values[b] = world.values[b], world.values[a]
    world.step([(a, 1), (b, 1)])
    world.remove(a)
    c = world.add()
    world.step([(b, 1), (c, 20)])
    world.step([(b, 1), (c, 1)])


def test_another_cache() -> None:
    """One backend may serve a cache after another (a reload); it keeps no views of the old one."""
    world = World(4, 2, 0)
    world.step([(world.add(), 20)])
    other = World(4, 2, 1)
    other.backend = world.backend
    other.step([(other.add(), 20)])
    other.step([(0, 1)])


def test_bfloat16() -> None:
    world = World(8, 2, 0, torch.bfloat16)
    world.step([(world.add(), 20), (world.add(), 40)])
    world.step([(0, 1), (1, 1)])
    world.step([(0, 1), (1, 7)])
