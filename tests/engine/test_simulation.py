"""Seeded simulations of the whole engine, and proof that they find planted bugs.

SIMULATION_SEEDS=100000 runs that many; a failure names its seed, and SIMULATION_FIRST=<seed> begins there.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from sightline.cache.page_pool import PagePool
from sightline.cache.radix import RadixCache
from sightline.cache.vision_cache import VisionCache
from sightline.engine import scheduler as scheduler_module
from sightline.engine.core import EngineCore
from sightline.engine.encode_queue import EncodeQueue
from sightline.engine.scheduler import Scheduler
from tests.engine.simulation import Simulation

FIRST = int(os.environ.get("SIMULATION_FIRST", "0"))
NUM_SEEDS = int(os.environ.get("SIMULATION_SEEDS", "400"))
NUM_PARTS = 10


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Thousands of planned faults are not worth a log line each."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def simulate(seed: int) -> Simulation:
    simulation = Simulation(seed)
    try:
        simulation.run()
    except Exception as error:
        error.add_note(f"simulation seed {seed}: {simulation.work}")
        raise
    return simulation


@pytest.mark.timeout(0 if NUM_SEEDS > 400 else 120)
@pytest.mark.check(22, cases=NUM_SEEDS // NUM_PARTS)
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_every_answer_is_what_the_request_answers_alone(part: int):
    for seed in range(FIRST + part, FIRST + NUM_SEEDS, NUM_PARTS):
        simulate(seed)


def test_the_same_seed_is_the_same_run():
    for seed in (1, 2, 3):
        assert simulate(seed).trace.digest() == simulate(seed).trace.digest()


def test_the_simulation_goes_where_bugs_live():
    met: Counter[str] = Counter()
    for seed in range(200):
        met += simulate(seed).met
    for event in (
        "retraction",
        "prefix hit",
        "picture evicted",
        "picture reused",
        "pixels asked for",
        "error in encode",
        "error in forward",
        "error in sample",
        "abort waiting",
        "abort prefill",
        "abort decode",
        "abort waiting after retraction",
        "abort while asking for pixels",
        "pixels twice",
        "waited too long",
    ):
        assert met[event] > 0, f"never met: {event} (met {dict(met)})"


# -- planted bugs ----------------------------------------------------------------------------------------------------------


def leak_a_page(patch: pytest.MonkeyPatch) -> None:
    free = PagePool.free
    patch.setattr(PagePool, "free", lambda self, pages: free(self, list(pages)[1:]))


def forget_the_picture(patch: pytest.MonkeyPatch) -> None:
    keys = scheduler_module.page_keys
    patch.setattr(scheduler_module, "page_keys", lambda ids, images, size: keys(ids, (), size))


def forget_the_tenant(patch: pytest.MonkeyPatch) -> None:
    match, insert = RadixCache.match, RadixCache.insert
    patch.setattr(RadixCache, "match", lambda self, salt, keys: match(self, b"", keys))
    patch.setattr(RadixCache, "insert", lambda self, salt, keys, pages: insert(self, b"", keys, pages))


def lose_an_abort(patch: pytest.MonkeyPatch) -> None:
    abort = EngineCore.abort

    def waiting_only(self: EngineCore, request_id: str, index: int | None = None) -> list[Any]:
        busy = any(r.request_id == request_id and r.in_prefill for r in self.scheduler.running)
        return [] if busy else abort(self, request_id, index)

    patch.setattr(EngineCore, "abort", waiting_only)


def keep_computed_after_retraction(patch: pytest.MonkeyPatch) -> None:
    retract = Scheduler.retract

    def wrong(self: Scheduler, request: Any) -> None:
        retract(self, request)
        request.output_ids = request.output_ids[:-1]

    patch.setattr(Scheduler, "retract", wrong)


def keep_duplicate_pages(patch: pytest.MonkeyPatch) -> None:
    insert = RadixCache.insert

    def wrong(self: RadixCache, salt: bytes, keys: list[bytes], pages: list[int]) -> Any:
        return insert(self, salt, keys, pages)._replace(pages=list(pages))

    patch.setattr(RadixCache, "insert", wrong)


def evict_what_is_in_use(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RadixCache, "inc_lock", lambda self, node: None)
    patch.setattr(RadixCache, "dec_lock", lambda self, node: None)


def forget_to_unpin(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(VisionCache, "unpin", lambda self, digest: None)


def share_a_page_too_many(patch: pytest.MonkeyPatch) -> None:
    share = Scheduler._share_pages

    def wrong(self: Scheduler, request: Any) -> None:
        request.num_computed += 1
        share(self, request)
        request.num_computed -= 1

    patch.setattr(Scheduler, "_share_pages", wrong)


def encode_the_wrong_pixels(patch: pytest.MonkeyPatch) -> None:
    fill = VisionCache.fill
    patch.setattr(VisionCache, "fill", lambda self, digest, value: fill(self, digest, value[::-1]))


def lose_pixels(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EngineCore, "put_pixels", lambda self, digest, pixels: None)


def start_before_the_pictures_are_encoded(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EncodeQueue, "advance", lambda self, needed, slice: ADVANCE(self, (), slice))


def encode_for_nobody(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "wants", lambda self, digest: False)


def keep_the_place_of_what_is_not_encoded(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "not_encoded", lambda self, digest, failed: None)


ADVANCE = EncodeQueue.advance
PLANTED = [
    leak_a_page,
    forget_the_picture,
    forget_the_tenant,
    lose_an_abort,
    keep_computed_after_retraction,
    keep_duplicate_pages,
    evict_what_is_in_use,
    forget_to_unpin,
    share_a_page_too_many,
    encode_the_wrong_pixels,
    lose_pixels,
    start_before_the_pictures_are_encoded,
    encode_for_nobody,
    keep_the_place_of_what_is_not_encoded,
]


@pytest.mark.check(22, cases=1)
@pytest.mark.parametrize("plant", PLANTED, ids=lambda f: f.__name__)
def test_planted_bugs_are_found(plant: Any, monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch)
    for seed in range(60):
        try:
            simulate(seed)
        except Exception:
            return
    pytest.fail("60 simulations did not notice")
