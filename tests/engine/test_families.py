"""Every family in a pool so small that requests are retracted and computed again: transformers' answers all the same."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
import torch

from sightline import Engine
from sightline.prompt.pipeline import PromptPipeline
from tests.gpu.families import FAMILIES, Judge, conversations

ANSWER = 40
# The authors' layouts of LLaVA are loaded into the same modules: one of them, whose placeholder is another, stands for all.
FAMILIES_WITH_PICTURES = [
    name for name, kind in FAMILIES.items() if kind.pictures and ("authors" not in name or name.startswith("LLaVA 1.5"))
]


@pytest.mark.parametrize("family", FAMILIES_WITH_PICTURES)
def test_retracted_and_right(family: str) -> None:
    talks, folder = conversations(pictures=True), FAMILIES[family].make()
    pipeline = PromptPipeline(folder, allow_local=True)
    longest = max(len(asyncio.run(pipeline.chat(messages)).input_ids) for messages in talks.values())
    # room for the longest request alone
    context = -(-(longest + ANSWER + 1) // 16) * 16
    settings = {"context_length": context, "max_total_tokens": context, "chunked_prefill_size": 48}
    sampling = msgspec.structs.replace(FAMILIES[family].sampling, max_tokens=ANSWER)
    with Engine(folder, device="cpu", dtype="float32", **settings) as engine:
        # prompts of two pages that grow to five
        growing = [[{"role": "user", "content": f"{i} shapes?"}] for i in range(12)]
        outputs = engine.chat([*talks.values(), *growing], sampling)
        assert isinstance(outputs, list)
        assert engine.stats.retractions > 0
        assert {len(output.outputs[0].token_ids) for output in outputs} == {ANSWER}
        Judge(family, "cpu", torch.float32).check(engine, talks, outputs[: len(talks)])
