"""Shares of models: ranks as threads, more of them than key heads; what a rank reads; and the releases."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sightline.layers.parameter import collect_slots
from sightline.models import loader
from sightline.models.loader import architecture, model_class_and_config, read_config
from sightline.parallel import Group, Shard
from tests import released, tiny, tiny_llava
from tests.models.harness import Harness, load


class Threads:
    """`size` groups of one process, which meet at a barrier."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=30)
        self._given: list[Any] = [None] * size

    def group(self, rank: int) -> Group:
        return _Member(self, rank)

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        """What every rank gives."""
        self._given[rank] = x.clone()
        self._barrier.wait()
        given = list(self._given)
        self._barrier.wait()
        return given


class _Member(Group):
    def __init__(self, threads: Threads, rank: int) -> None:
        super().__init__(rank, threads.size)
        self._threads = threads

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.copy_(torch.stack(self._threads.exchange(self.rank, x)).sum(0))

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._threads.exchange(self.rank, x), dim=-1)


# 4 query heads and 2 key heads: each of four ranks has one query head, and two share a key head
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_ranks_together_are_the_model(size: int, tied: bool) -> None:
    folder = tiny_llava.text("qwen2", tied=tied)
    ids = torch.randint(0, tiny.NUM_TEXT_TOKENS, (37,), generator=torch.Generator().manual_seed(1)).tolist()

    def logprobs(group: Group) -> Tensor:
        harness = Harness(load(folder, group=group))
        assert harness.cache.k[0].shape[2] == max(1, 2 // group.size)
        return harness.logprobs(harness.sequence(folder, ids), chunk=16)

    expected = logprobs(Group())
    threads = Threads(size)
    with ThreadPoolExecutor(size) as pool:
        ranks = list(pool.map(lambda rank: logprobs(threads.group(rank)), range(size)))
    for got in ranks:
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_a_rank_reads_its_share_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.qwen2_vl()
    read: dict[str, int] = {}
    safe_open = loader.safe_open

    class Spy:
        def __init__(self, file: Any) -> None:
            self._file = file
            self.keys = file.keys

        def get_tensor(self, name: str) -> Tensor:
            tensor: Tensor = self._file.get_tensor(name)
            read[name] = tensor.nbytes
            return tensor

        def get_slice(self, name: str) -> Any:
            return _SpySlice(name, self._file.get_slice(name), read)

        def __enter__(self) -> Spy:
            self._file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._file.__exit__(*error)

    monkeypatch.setattr(loader, "safe_open", lambda *args, **options: Spy(safe_open(*args, **options)))
    bytes_read = []
    for group in (Group(), Group(0, 2), Group(1, 2)):
        read.clear()
        model = load(folder, group=group)
        bytes_read.append(dict(read))
        assert sum(p.nbytes for p in model.model.parameters()) + model.lm_head.weight.nbytes == sum(
            size for name, size in read.items() if not name.startswith("visual.")
        )
    whole, *halves = bytes_read
    for name, size in whole.items():
        is_divided = not (name.startswith("visual.") or "norm" in name)
        assert [half[name] for half in halves] == [size // 2 if is_divided else size] * 2, name


class _SpySlice:
    def __init__(self, name: str, view: Any, read: dict[str, int]) -> None:
        self._name, self._view, self._read = name, view, read
        self.get_shape = view.get_shape

    def __getitem__(self, index: Any) -> Tensor:
        tensor: Tensor = self._view[index]
        self._read[self._name] = tensor.nbytes
        return tensor


@pytest.mark.parametrize("kind", released.RELEASES)
def test_the_releases_can_be_divided(kind: str, tmp_path: Path) -> None:
    """Over 2 and 4 ranks. Each rank asks the checkpoint for the same tensors, and together they hold all of each."""
    released.write(kind, tmp_path)
    model_class, config, _ = model_class_and_config(tmp_path, architecture(read_config(tmp_path)))
    assert {2, 4} <= set(config.group_sizes)
    with torch.device("meta"):
        whole = {name: slot.shape for name, slot in collect_slots(model_class(config)).items()}
        for size in (2, 4):
            models = [collect_slots(model_class(config, Group(rank, size))) for rank in (0, size - 1)]
            for slots in models:
                assert {name: slot.shape for name, slot in slots.items()} == whole
            # what is divided ends where the tensor ends
            for name, slot in models[1].items():
                if slot.part is not None:
                    assert slot.part[-1].stop == whole[name][len(slot.part) - 1], name


def test_shares() -> None:
    assert [Group(r, 4).padded_shard(10) for r in range(4)] == [Shard(3 * r, 3, 10) for r in range(4)]
    assert [Group(r, 4).padded_shard(10).length for r in range(4)] == [3, 3, 3, 1]
    assert [Group(r, 4).kv_shard(2).start for r in range(4)] == [0, 0, 1, 1]
    assert [Group(r, 2).kv_shard(4).start for r in range(2)] == [0, 2]
    with pytest.raises(AssertionError):
        Group(0, 3).shard(4)
