"""The engine on a CUDA device gives the CPU's answers."""

from __future__ import annotations

import itertools

import pytest

from sightline import Engine, SamplingParams
from sightline.bench.compare import Plan, questions
from sightline.engine.output import RequestOutput
from tests import tiny


def answers(device: str) -> list[RequestOutput]:
    sampling = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    conversations = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": q.picture}, {"type": "text", "text": q.text}],
            }
        ]
        for q in itertools.islice(questions(Plan(model="", image_size=84)), 6)
    ]
    with Engine(tiny.qwen2_vl(), device=device, dtype="float32") as engine:
        outputs = engine.chat(conversations, sampling)
    assert isinstance(outputs, list)
    return outputs


@pytest.mark.timeout(300)
def test_tokens_and_logprobs_equal_the_cpus() -> None:
    for ours, reference in zip(answers("cuda"), answers("cpu"), strict=True):
        a, b = ours.outputs[0], reference.outputs[0]
        assert a.token_ids == b.token_ids
        assert a.logprobs is not None
        assert b.logprobs is not None
        assert ours.prompt_logprobs
        assert reference.prompt_logprobs
        pairs = zip([*ours.prompt_logprobs, *a.logprobs], [*reference.prompt_logprobs, *b.logprobs], strict=True)
        for x, y in pairs:
            assert abs(x.logprob - y.logprob) < 2e-3
