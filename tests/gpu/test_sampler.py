"""The sampler draws the same tokens on a GPU as on a CPU: seeds mean the same on both."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sightline.engine.sampler import Sampler, SamplingState
from sightline.types import SamplingParams
from tests.engine.test_sampler import EOS, KNOBS, PROMPT, packed

VOCAB = 4000


def answers(device: str, knobs: dict[str, Any], steps: int = 6) -> list[list[int]]:
    """Tokens of eight choices: four with the knobs, two greedy ones and two without anything between them."""
    sampler = Sampler(VOCAB, torch.device(device), 0)
    rows = [knobs, {}, knobs, {"temperature": 0.0}, knobs, {"temperature": 0.0, "logprobs": 3}, {}, knobs]
    states: list[SamplingState] = [
        sampler.new_state(SamplingParams(seed=i, **row), PROMPT, EOS, 0) for i, row in enumerate(rows)
    ]
    tokens = []
    for step in range(steps):
        logits = 3 * torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(step))
        states[0].mask = packed(torch.arange(VOCAB) % 3 > 0)
        out = sampler.sample(logits.to(device), states)
        assert out.logprobs[5] is not None
        assert all(token % 3 for token in out.token_ids[:1])
        tokens.append(out.token_ids)
    return tokens


@pytest.mark.parametrize("knobs", KNOBS, ids=lambda k: ",".join(f"{a}={b}" for a, b in k.items()) or "none")
def test_the_same_tokens_as_on_a_cpu(knobs: dict[str, Any]):
    assert answers("cuda", knobs) == answers("cpu", knobs)


@pytest.mark.parametrize("knobs", [{}, {"top_p": 0.5}, {"top_k": 4}], ids=str)
def test_a_row_of_nan_does_not_hurt_its_neighbours(knobs: dict[str, Any]):
    """An index out of range would take the whole context down."""
    sampler = Sampler(VOCAB, torch.device("cuda"), 0)
    states = [sampler.new_state(SamplingParams(seed=1, **knobs), PROMPT, EOS, 0) for _ in range(2)]
    logits = torch.randn(2, VOCAB, device="cuda")
    logits[0] = float("nan")
    tokens = sampler.sample(logits, states).token_ids
    assert all(0 <= token < VOCAB for token in tokens)
