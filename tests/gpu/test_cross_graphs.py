"""Decode steps in which rows see pictures beside the text are CUDA graphs, which say what launches say."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from sightline.engine.cuda_graph import GraphKey, StepGraphs
from sightline.engine.output import RequestOutput
from tests import oracle
from tests.gpu.families import FAR, NEW_TOKENS, Judge, Messages, conversations
from tests.gpu.test_families import ask, ids, start

FAMILY = "Llama 3.2 Vision"


def talks() -> dict[str, Messages]:
    """Rows that see none, one, two, eight pictures, and one that sees more than a graph has places for."""
    pictures = [{"type": "image", "image": oracle.picture(60 + 30 * i, 200 - 15 * i, seed=i)} for i in range(9)]
    many = {
        f"{n} adjoining": [{"role": "user", "content": [*pictures[:n], {"type": "text", "text": "Which is red?"}]}]
        for n in (8, 9)
    }
    return conversations(pictures=True) | many


def everything(device: str, **settings: Any) -> list[RequestOutput]:
    """All but the last at once, so that decode steps have rows of every kind; then each alone; then all with the last."""
    asked = talks()
    last = {"9 adjoining": asked.pop("9 adjoining")}
    with start(FAMILY, device, torch.float32, **settings) as engine:
        return [
            *ask(engine, FAMILY, asked),
            *(output for name, messages in asked.items() for output in ask(engine, FAMILY, {name: messages})),
            *ask(engine, FAMILY, asked | last),
        ]


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Counter[GraphKey]:
    """How often each graph was replayed."""
    counts: Counter[GraphKey] = Counter()
    run = StepGraphs.run

    def counting(self: StepGraphs, key: GraphKey, *args: Any, **named: Any) -> torch.Tensor:
        counts[key] += key in self._graphs
        return run(self, key, *args, **named)

    monkeypatch.setattr(StepGraphs, "run", counting)
    return counts


@pytest.mark.timeout(300)
def test_graphs_and_launches_say_the_same(device: str, replays: Counter[GraphKey]) -> None:
    on = everything(device)
    if device == "cuda":
        assert replays[GraphKey(1, sees=True)] > 20
        assert replays[GraphKey(8, sees=True)] > 0
    replays.clear()
    off = everything(device, disable_cuda_graph=True)
    assert not replays
    assert ids(on) == ids(off)
    for ours, theirs in zip(on, off, strict=True):
        pairs = zip(ours.outputs[0].logprobs or (), theirs.outputs[0].logprobs or (), strict=True)
        differences = [abs(a.logprob - b.logprob) for a, b in pairs]
        assert len(differences) == NEW_TOKENS
        assert max(differences) < FAR


@pytest.mark.timeout(300)
def test_in_bfloat16(device: str, replays: Counter[GraphKey], report: dict[str, str]) -> None:
    """Again and again, so that every step but the first of a size is a replay."""
    asked = talks()
    # beside it no step would be a graph's
    del asked["9 adjoining"]
    judge = Judge(FAMILY, device, torch.bfloat16)
    with start(FAMILY, device, torch.bfloat16) as engine:
        for _ in range(3):
            report[f"{FAMILY}, many pictures"] = judge.check(engine, asked, ask(engine, FAMILY, asked))
    if device == "cuda":
        assert sum(count for key, count in replays.items() if key.sees) > 0
