"""Which graph runs a step, and how its numbers are laid out. The replay itself needs a GPU: tests/gpu."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sightline.attention.backend import KVCache
from sightline.attention.cross import CrossDecodeBatch
from sightline.engine.cuda_graph import GraphKey, HostStep, StepGraphs

PAGE = 16


class Backend:
    """One tile for every four tokens."""

    def plan_tiles(
        self, q_lens: Sequence[int], kv_lens: Sequence[int], num_rows: int, num_heads: int, cache: KVCache
    ) -> np.ndarray:
        tiles = [(i, first) for i, n in enumerate(q_lens) for first in range(0, n, 4)]
        return np.asarray(tiles, dtype=np.int32).reshape(-1, 2)


def make(cross_attention: bool, max_mixed: int = 512) -> StepGraphs:
    model: Any = nn.Module()
    model.cross_attention = cross_attention
    model.config = SimpleNamespace(hidden_size=8, vocab_size=10)
    cpu = torch.device("cpu")
    cache = KVCache.allocate(
        num_layers=1, num_pages=4, page_size=PAGE, num_kv_heads=1, head_dim=4, dtype=torch.float32, device=cpu
    )
    backend: Any = Backend()
    return StepGraphs(
        model,
        cache,
        backend,
        max_batch=32,
        max_running=100,
        max_mixed=max_mixed,
        max_pages=4,
        num_heads=2,
        device=cpu,
    )


@pytest.fixture
def graphs() -> StepGraphs:
    return make(cross_attention=False)


@pytest.fixture
def seeing() -> StepGraphs:
    """Of a model whose pictures stand beside the text."""
    return make(cross_attention=True)


@pytest.mark.parametrize(
    ("rows", "decode", "sequences", "sampled", "expected"),
    [
        (1, 1, 1, 1, (1, 0)),
        (9, 9, 9, 9, (16, 0)),
        (32, 32, 32, 32, (32, 0)),
        # more decode rows than the largest decode graph has: as a mixed step without prompts
        (40, 40, 40, 40, (64, 64)),
        (13, 0, 1, 1, (32, 16)),
        (100, 3, 5, 4, (128, 16)),
        # many rows to sample need as many tokens
        (70, 69, 70, 70, (128, 100)),
        (512, 10, 12, 12, (512, 16)),
        # too many rows, prompts, sampled rows
        (513, 10, 12, 12, None),
        (200, 10, 10 + 33, 12, None),
        (200, 101, 102, 101, None),
    ],
)
def test_which_graph(
    graphs: StepGraphs, rows: int, decode: int, sequences: int, sampled: int, expected: tuple[int, int] | None
) -> None:
    assert graphs.key(rows, decode, sequences, sampled) == (None if expected is None else GraphKey(*expected))


@pytest.mark.parametrize(
    ("rows", "decode", "num_seen", "expected"),
    [
        (9, 9, 0, GraphKey(16)),
        (9, 9, 1, GraphKey(16, sees=True)),
        (32, 32, 8, GraphKey(32, sees=True)),
        # too many pictures in a row, too many rows, and rows that do not decode
        (9, 9, 9, None),
        (40, 40, 1, None),
        (100, 3, 1, None),
        (100, 3, 0, GraphKey(128, 16)),
    ],
)
def test_which_graph_of_a_model_whose_rows_may_see_pictures(
    seeing: StepGraphs, rows: int, decode: int, num_seen: int, expected: GraphKey | None
) -> None:
    assert seeing.key(rows, decode, decode + (rows > decode), decode, num_seen) == expected
    assert expected is None or expected in seeing.planned


def test_steps_that_keep_a_device_busy_for_longer_than_their_launches_have_no_graph() -> None:
    graphs = make(cross_attention=False, max_mixed=8192)
    assert graphs.key(2048, 4, 6, 5) == GraphKey(2048, 16)
    assert graphs.key(2049, 4, 6, 5) is None


class Graph:
    """Writes down what happens to it."""

    log: ClassVar[list[str]] = []

    def capture_begin(self, **options: Any) -> None:
        self.log.append("begin")

    def capture_end(self) -> None:
        self.log.append("end")

    def replay(self) -> None:
        self.log.append("replay")


@pytest.fixture
def log(graphs: StepGraphs, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of graphs, and of the slots that a computation writes to."""
    monkeypatch.setattr(Graph, "log", [])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    views = graphs._inputs.views
    monkeypatch.setattr(graphs, "compute", lambda key: Graph.log.append(f"{views['slots'][:2].tolist()}"))
    return Graph.log


def _decode_step(num_rows: int) -> HostStep:
    return HostStep(
        ids=np.zeros(num_rows, dtype=np.int64),
        places=[-1] * num_rows,
        positions=np.zeros((3, num_rows), dtype=np.int64),
        slots=np.arange(num_rows) + 50,
        q_lens=[1] * num_rows,
        kv_lens=[1] * num_rows,
        page_table=np.ones((num_rows, 1), dtype=np.int32),
        sampled=list(range(num_rows)),
    )


def test_a_start_captures_some_graphs_and_idle_time_the_others(graphs: StepGraphs, log: list[str]) -> None:
    graphs.capture()
    decode, mixed = [GraphKey(n) for n in (1, 2, 4, 8, 16, 32)], [GraphKey(512, n) for n in (16, 64, 100)]
    assert sorted(graphs._graphs) == [*decode, *mixed]
    graphs.run(GraphKey(1), _decode_step(1), None)
    log.clear()
    assert graphs.capture_next()
    # what is computed then writes to no slot, least of all to those of the step before
    assert log == ["[-1, -1]", "begin", "[-1, -1]", "end"]
    while graphs.capture_next():
        pass
    assert list(graphs._graphs.keys() - graphs.planned) == []
    assert len(graphs._graphs) == len(graphs.planned)


def test_only_models_with_cross_attention_have_graphs_of_steps_that_see_pictures(
    graphs: StepGraphs, seeing: StepGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not any(key.sees for key in graphs.planned)
    assert [key for key in seeing.planned if not key.sees] == graphs.planned
    assert sorted(key.tokens for key in seeing.planned if key.sees) == seeing.decode_sizes
    captured: list[GraphKey] = []
    monkeypatch.setattr(seeing, "_prepare", captured.append)
    # a start waits for none of them, ranks that capture all at once do
    seeing.capture()
    assert not any(key.sees for key in captured)
    captured.clear()
    seeing.capture(whole=True)
    assert captured == seeing.planned


def test_ranks_capture_all_at_once(graphs: StepGraphs, log: list[str]) -> None:
    graphs.capture(whole=True)
    assert not graphs.capture_next()


def test_the_first_step_of_a_size_is_computed_and_then_captured(graphs: StepGraphs, log: list[str]) -> None:
    graphs.run(GraphKey(24), _decode_step(20), None)
    assert log == ["[50, 51]", "begin", "[50, 51]", "end"]
    graphs.run(GraphKey(24), _decode_step(18), None)
    assert log[4:] == ["replay"]


def test_the_layout_of_a_mixed_step(graphs: StepGraphs) -> None:
    """Two decode rows, then prompts of 5 and 3 tokens of which the second has a history; a graph for 16 sampled rows."""
    step = HostStep(
        ids=np.arange(10),
        places=[0, -1],
        positions=np.tile(np.arange(10) + 100, (3, 1)),
        slots=np.arange(10) + 50,
        q_lens=[1, 1, 5, 3],
        kv_lens=[7, 9, 5, 20],
        page_table=np.ones((4, 2), dtype=np.int32),
        sampled=[0, 1, 9],
    )
    inputs = graphs._inputs
    parts = inputs._split(np.full(inputs._ends[-1], -7, dtype=np.int32))
    graphs._fill(parts, step)
    graphs._fill_prompts(parts, step, 16, 32)
    assert not any((part == -7).any() for part in parts.values()), "something was left as it was"
    assert parts["ids"][:11].tolist() == [*range(10), 0]
    assert parts["places"][:3].tolist() == [0, -1, -1]
    assert parts["slots"][:11].tolist() == [*range(50, 60), -1]
    assert parts["sampled"][:4].tolist() == [0, 1, 9, 0]
    # decode rows, padding, then the prompts behind the graph's 16 places
    assert parts["kv_lens"][:19].tolist() == [7, 9, *[0] * 14, 5, 20, 0]
    assert parts["cu_seqlens"][16:20].tolist() == [2, 7, 10, 10]
    tiles = parts["tiles"].reshape(-1, 2).tolist()
    assert tiles[:3] == [[16, 0], [16, 4], [17, 0]]
    for sequence, first in tiles[3:]:
        assert first == 0
        length = parts["cu_seqlens"][sequence + 1] - parts["cu_seqlens"][sequence]
        assert length == parts["kv_lens"][sequence] == 0, "a padding tile of a sequence that has tokens"


def test_what_rows_see_is_laid_out_for_the_device(seeing: StepGraphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a step before leave nothing behind."""
    contexts: list[Any] = []

    def forward(hidden: Tensor, positions: Tensor, ctx: Any, rows: None) -> Tensor:
        contexts.append(ctx)
        return hidden

    model: Any = seeing._model
    model.uses_mrope, model.forward, model.logits = False, forward, lambda hidden: hidden.new_zeros(len(hidden), 10)
    model.embed = lambda ids, image_rows, features: torch.zeros(len(ids), 8)
    monkeypatch.setattr(seeing, "_capture", lambda key: None)
    seeing._backend.prepare = lambda batch: None  # type: ignore[method-assign]
    one, two, three = (torch.zeros(2, 2, n, 1, 4) for n in (5, 17, 9))
    everywhere = [(np.arange(8), (three, two, one))]
    groups = [(np.array([3, 0]), (one,)), (np.array([1]), (two, one, three))]
    for seen, num_rows in ((everywhere, 8), (groups, 5)):
        seeing.run(GraphKey(8, sees=True), _decode_step(num_rows), None, seen=seen)
    cross = contexts[-1].cross
    assert isinstance(cross, CrossDecodeBatch)
    assert cross.num_kv_heads == 1
    assert cross.ends.shape == cross.addresses.shape == (8, 8)
    assert cross.ends[:4].T.tolist() == [
        [5, 5, 5, 5], [17, 22, 31, 31], [0] * 4, [5, 5, 5, 5], *[[0] * 4] * 4,
    ]  # fmt: skip
    assert torch.equal(cross.ends[7], cross.ends[3])
    a, b, c = (t.data_ptr() for t in (one, two, three))
    assert cross.addresses[:4].T.tolist() == [[a, 0, 0, 0], [b, a, c, 0], [0] * 4, [a, 0, 0, 0], *[[0] * 4] * 4]
    seeing.run(GraphKey(8), _decode_step(5), None)
    assert contexts[-1].cross is None
