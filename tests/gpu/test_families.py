"""Every family on the GPU, through the offline engine, beside transformers on the same card.

In float32 every greedy id must be transformers'. In bfloat16 it must be at clear steps (see `families.CLEAR`), and what was
measured is printed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sightline import Engine
from sightline.engine.output import RequestOutput
from tests.gpu.families import FAMILIES, Judge, Messages, conversations

DTYPES = [torch.float32, torch.bfloat16]
# One family for each way in which pictures and positions reach the model; in bfloat16 the two that differ most.
WAYS = [
    ("Qwen2-VL", torch.float32),
    ("Qwen2-VL", torch.bfloat16),
    ("Qwen2.5-VL", torch.float32),
    ("Llama 3.2 Vision", torch.float32),
    ("Llama 3.2 Vision", torch.bfloat16),
    ("OneVision", torch.float32),
]
VARIANTS: dict[str, dict[str, Any]] = {
    # a multiple of nothing, so chunks begin and end inside pages and pictures
    "in chunks": {"chunked_prefill_size": 27},
    "no caches": {"disable_radix_cache": True, "vision_cache_gb": 0.0},
    "no CUDA graphs": {"disable_cuda_graph": True},
    "no overlap": {"disable_overlap_schedule": True},
    "torch's attention": {"attention_backend": "torch"},
    "none of it": {"disable_cuda_graph": True, "disable_overlap_schedule": True, "disable_radix_cache": True},
}


SIZES = {"max_total_tokens": 8192, "max_running_requests": 8, "chunked_prefill_size": 2048}


def start(family: str, device: str, dtype: torch.dtype, **settings: Any) -> Engine:
    return Engine(
        FAMILIES[family].make(), device=device, dtype=str(dtype).removeprefix("torch."), **{**SIZES, **settings}
    )


def ask(engine: Engine, family: str, talks: dict[str, Messages]) -> list[RequestOutput]:
    """All at once."""
    outputs = engine.chat(list(talks.values()), FAMILIES[family].sampling)
    assert isinstance(outputs, list)
    return outputs


def ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def cold_and_cached(
    engine: Engine, family: str, judge: Judge, talks: dict[str, Messages]
) -> tuple[list[RequestOutput], list[RequestOutput], str]:
    """What is said to all of the talks at once, the same from the caches, and the judge's verdict on the former."""
    cold = ask(engine, family, talks)
    verdict = judge.check(engine, talks, cold)
    cached = ask(engine, family, talks)
    judge.check(engine, talks, cached)
    assert all(output.num_cached_tokens >= 16 for output in cached)
    assert engine.stats.pages_in_use == 0
    return cold, cached, verdict


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_crowd_again_and_alone(family: str, dtype: torch.dtype, device: str, report: dict[str, str]) -> None:
    """A batch from cold, the same from the caches, and one by one behind it."""
    talks = conversations(FAMILIES[family].pictures)
    judge = Judge(family, device, dtype)
    with start(family, device, dtype) as engine:
        cold, cached, verdict = cold_and_cached(engine, family, judge, talks)
        encoded = engine.stats.images_encoded
    with start(family, device, dtype, disable_radix_cache=True) as engine:
        alone = [output for name, messages in talks.items() for output in ask(engine, family, {name: messages})]
        judge.check(engine, talks, alone)
        # each picture once, whatever shows it; OneVision makes less of one that is not alone in its prompt
        assert engine.stats.images_encoded == encoded <= 4
    if dtype is torch.float32:
        assert ids(cold) == ids(cached) == ids(alone)
    else:
        report[family] = verdict


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("family", "dtype"), WAYS, ids=str)
def test_what_the_engine_does_meanwhile_changes_nothing(
    family: str, variant: str, dtype: torch.dtype, device: str
) -> None:
    talks = conversations(FAMILIES[family].pictures)
    with start(family, device, dtype, **VARIANTS[variant]) as engine:
        Judge(family, device, dtype).check(engine, talks, ask(engine, family, talks))
