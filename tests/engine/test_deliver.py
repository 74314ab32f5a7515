"""Tokens leave the core before the next step is sampled, which takes the host a while."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sightline.cache.page_pool import PagePool
from sightline.cache.vision_cache import VisionCache
from sightline.engine.core import EngineCore, Sampled
from sightline.engine.scheduler import ScheduledRow, Scheduler, SchedulerConfig
from sightline.types import EngineRequest, SamplingParams, ids_to_bytes


class Runner:
    """Notes what it is asked for."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def new_state(self, *args: Any) -> None:
        return None

    def forward(self, rows: Sequence[ScheduledRow], num_decode: int) -> int:
        self.log.append("forward")
        return len(rows)

    def sample(self, step: int) -> None:
        self.log.append("sample")

    def collect(self, step: int) -> list[Sampled]:
        self.log.append("collect")
        return [Sampled(1)] * step


def test_a_token_does_not_wait_for_the_next_steps_sampling() -> None:
    runner: Any = Runner()
    config = SchedulerConfig(page_size=16, max_step_tokens=64, max_running=4, max_encode_tokens=64, image_token_bytes=1)
    scheduler = Scheduler(config, PagePool(9), None, VisionCache(1))
    core = EngineCore(scheduler, runner, eos_token_ids=[], context_length=64, overlap=True)
    core.deliver = lambda tokens: runner.log.append(f"token {tokens[0].token_ids}")
    sampling = SamplingParams(max_tokens=2, ignore_eos=True)
    core.add(EngineRequest(request_id="r", input_ids=ids_to_bytes(np.zeros(3, np.int32)), sampling=sampling))
    while not core.idle:
        assert core.step() == []
    assert runner.log == [
        *("forward", "sample"),
        *("forward", "collect", "token [1]", "sample"),
        *("collect", "token [1]"),
    ]
