"""The bundled weights through the engine and through transformers: the same log-probabilities, the same golden answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import torch
from PIL import Image

from sightline import Engine, SamplingParams
from sightline.demo import golden, model_path
from tests import oracle

TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine() as engine:
        yield engine


@pytest.mark.parametrize("entry", golden(), ids=lambda entry: entry.name)
def test_golden_answer_and_its_logprobs(engine: Engine, entry) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=128, logprobs=3)
    output = engine.chat(entry.messages, sampling)
    assert output.text == entry.answer
    (choice,) = output.outputs
    prompt = asyncio.run_coroutine_threadsafe(engine.pipeline.chat(entry.messages), engine._loop).result()
    pictures = [
        Image.open(part["image"]).convert("RGB")
        for message in entry.messages
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == "image"
    ]
    ids = [*prompt.input_ids.tolist(), *choice.token_ids]
    with torch.inference_mode():
        reference = oracle.transformers_logprobs(model_path(), ids, pictures)
    assert choice.logprobs is not None
    for i, found in enumerate(choice.logprobs):
        row = reference[len(prompt.input_ids) - 1 + i]
        assert abs(found.logprob - float(row[found.token_id])) < TOLERANCE
        for token_id, logprob in found.top:
            assert abs(logprob - float(row[token_id])) < TOLERANCE
