"""Slices of a large picture and prompts take turns in the steps that decode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest

from sightline.cache.page_pool import PagePool
from sightline.cache.vision_cache import VisionCache
from sightline.engine.core import EngineCore, Sampled
from sightline.engine.encode_queue import BESIDE_LARGE, LARGE
from sightline.engine.scheduler import ScheduledRow, Scheduler, SchedulerConfig
from sightline.models import Encoding
from sightline.types import EngineRequest, FinishReason, ImageRef, NeedPixels, SamplingParams, ids_to_bytes

PARTS, SLICE = 12, 3.0


class Step(NamedTuple):
    """What a step computed, and parts of pictures encoded before it and behind the step before."""

    num_decode: int
    num_prompt_tokens: int
    parts: int


class Recorder:
    """A `Runner` that notes its steps."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.parts = 0
        self.begun: list[list[bytes]] = []
        self.bad: set[bytes] = set()

    def new_state(self, sampling: SamplingParams, prompt_ids: np.ndarray, index: int) -> None:
        return None

    def encoding(self, images: Sequence[ImageRef], pixels: Sequence[Any]) -> Encoding[list[str]]:
        self.begun.append([image.digest for image in images])
        for _ in range(PARTS):
            self.parts += 1
            yield 1.0
        if any(image.digest in self.bad for image in images):
            raise ValueError("no picture")
        return ["features"] * len(images)

    def slice_flops(self) -> float:
        return SLICE

    def forward(self, rows: Sequence[ScheduledRow], num_decode: int) -> int:
        self.steps.append(Step(num_decode, sum(row.q_len for row in rows[num_decode:]), self.parts))
        self.parts = 0
        return sum(row.sample for row in rows)

    def sample(self, step: int) -> None:
        pass

    def collect(self, step: int) -> list[Sampled]:
        return [Sampled(1)] * step


class World:
    """A core over a `Recorder`, with room for so many features."""

    def __init__(self, num_features: int) -> None:
        config = SchedulerConfig(
            page_size=16,
            max_step_tokens=4096,
            max_mixed_tokens=64,
            max_running=256,
            max_encode_tokens=1024,
            image_token_bytes=1,
        )
        self.runner = Recorder()
        self.scheduler = Scheduler(config, PagePool(4001), None, VisionCache(num_features), encode_beside=True)
        self.core = EngineCore(self.scheduler, self.runner, eos_token_ids=[], context_length=8192)  # type: ignore[arg-type]

    def add(self, name: str, length: int, *images: ImageRef) -> None:
        """A prompt of so many tokens, with its pictures' pixels."""
        ids = ids_to_bytes(np.zeros(length, np.int32))
        sampling = SamplingParams(max_tokens=100, ignore_eos=True)
        self.core.add(EngineRequest(request_id=name, input_ids=ids, sampling=sampling, images=images))
        for image in images:
            self.core.put_pixels(image.digest, "pixels")


def steps_while_encoding(num_features: int) -> list[Step]:
    """One request decodes, a picture of so many features arrives, and prompts of text all the time."""
    world = World(1 << 20)
    picture = ImageRef(b"p" * 32, 1, num_features, (1, 1, num_features))
    world.add("decodes", 8)
    world.core.step()
    world.add("with a picture", num_features + 2, picture)
    for number in range(40):
        world.add(f"text {number}", 50)
    first = len(world.runner.steps)
    while not world.scheduler.vision_cache.is_filled(picture.digest):
        world.core.step()
    return world.runner.steps[first:]


def test_a_picture_that_is_half_encoded_for_nobody_makes_room_for_the_next():
    """Its request went, and nobody decodes beside whom it would go on."""
    world = World(5)
    first, second = (ImageRef(name * 32, 1, 5, (1, 1, 5)) for name in (b"p", b"q"))
    world.add("decodes", 8)
    world.core.step()
    world.add("goes", 8, first)
    world.core.step()
    assert 0 < world.runner.steps[-1].parts < PARTS
    for name in ("goes", "decodes"):
        world.core.abort(name)
    world.add("stays", 8, second)
    for _ in range(PARTS):
        world.core.step()
        assert not world.core.stalled
    assert world.scheduler.vision_cache.is_filled(second.digest)


def test_a_bad_picture_is_tried_ahead_once_and_ends_its_request_when_its_turn_comes():
    world = World(1 << 20)
    bad = ImageRef(b"b" * 32, 1, 500, (1, 1, 500))
    world.runner.bad = {bad.digest}
    world.add("decodes", 8)
    world.core.step()
    world.add("takes ten steps", 640)
    world.add("fails", 502, bad)
    ended: dict[str, Any] = {}
    ahead = 0
    for _ in range(60):
        if any(request.request_id == "fails" for request in world.scheduler.waiting):
            ahead = world.runner.begun.count([bad.digest])
        for event in world.core.step():
            if isinstance(event, NeedPixels):
                world.core.put_pixels(bad.digest, "pixels")
            elif event.finish_reason is not None:
                ended[event.request_id] = event.finish_reason
    assert ended == {"fails": FinishReason.ERROR}
    # each time once more at once, as every picture that fails
    assert ahead == 2
    assert world.runner.begun.count([bad.digest]) == 4
    assert not world.scheduler.never_ahead


@pytest.mark.parametrize("num_features", [LARGE, LARGE + 1])
def test_prompts_and_slices_share_steps_unless_the_picture_is_large(num_features: int):
    steps = steps_while_encoding(num_features)
    assert sum(step.parts for step in steps) == PARTS
    assert all(step.num_decode for step in steps), "decoding never stops"
    both = [step for step in steps if step.parts and step.num_prompt_tokens]
    # the step in which the picture is first seen knows of no slice yet
    slices = [bool(step.parts) for step in steps[1:]]
    if num_features > LARGE:
        assert not both
        # ended by a slice without a part
        assert slices == [True, False] * (PARTS // round(SLICE * BESIDE_LARGE)) + [False], "they take turns"
        # the first knows of no picture yet
        assert {step.num_decode + step.num_prompt_tokens for step in steps[1:] if step.num_prompt_tokens} == {
            int(64 * BESIDE_LARGE)
        }
    else:
        assert len(both) >= PARTS // SLICE - 1
