"""Where a prompt goes: to whoever holds most of it, to nobody who is far behind, and in turn when all are alike."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from sightline.config import EngineConfig
from sightline.engine.replicas import device_env
from sightline.engine.routing import BLOCK, SLACK, Footprint, Router, footprint, load
from sightline.errors import DeviceError
from sightline.types import ImageRef


def prompt(seed: int, length: int = 10 * BLOCK, pictures: dict[int, int] | None = None, salt: bytes = b"") -> Footprint:
    """pictures: offset -> which; each fills two blocks with equal placeholders."""
    ids = np.random.default_rng(seed).integers(0, 1000, length, dtype=np.int32)
    images = []
    for offset, which in (pictures or {}).items():
        ids[offset : offset + 2 * BLOCK] = 7
        images.append(ImageRef(bytes([which]) * 32, offset, 2 * BLOCK, (1, 1, 1)))
    return footprint(ids, images, salt)


def router(method: str = "cache_aware", capacity: int = 10**6) -> Router[int]:
    return Router(method, prefix_tokens=capacity, picture_tokens=capacity)  # type: ignore[arg-type]


def test_a_known_prompt_goes_where_it_was() -> None:
    r = router()
    for seed in range(8):
        r.record(prompt(seed), seed % 4)
    loads = {0: 3, 1: 3, 2: 3, 3: 0}
    assert [r.choose(prompt(seed), loads) for seed in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]


def test_a_longer_prompt_goes_where_its_beginning_is() -> None:
    r = router()
    r.record(prompt(1), 2)
    ids = np.random.default_rng(1).integers(0, 1000, 10 * BLOCK, dtype=np.int32)
    longer = footprint(np.concatenate([ids, np.arange(3 * BLOCK, dtype=np.int32)]), ())
    assert r.reused(longer, 2) == pytest.approx(10 / 13)
    assert r.choose(longer, {0: 0, 1: 0, 2: 0}) == 2


def test_a_difference_at_the_front_leaves_nothing_in_common() -> None:
    r = router()
    ids = np.arange(10 * BLOCK, dtype=np.int32)
    r.record(footprint(ids, ()), 0)
    assert r.reused(footprint(ids, ()), 0) == 1.0
    ids[0] += 1
    assert r.reused(footprint(ids, ()), 0) == 0.0


def test_a_picture_behind_another_text_counts() -> None:
    r = router()
    r.record(prompt(1, pictures={BLOCK: 1}), 1)
    assert r.reused(prompt(2, pictures={3 * BLOCK + 5: 1}), 1) == pytest.approx(2 / 10)
    assert r.reused(prompt(2, pictures={3 * BLOCK + 5: 2}), 1) == 0.0
    # Inside the known prefix it counts once.
    assert r.reused(prompt(1, pictures={BLOCK: 1}), 1) == 1.0


def test_other_pictures_and_other_tenants_are_other_prompts() -> None:
    r = router()
    r.record(prompt(1, pictures={0: 1}, salt=b"a"), 0)
    assert r.reused(prompt(1, pictures={0: 2}, salt=b"a"), 0) == 0.0
    assert prompt(1, salt=b"a").blocks != prompt(1, salt=b"b").blocks


def test_load_decides_beyond_the_bound() -> None:
    r = router()
    r.record(prompt(1), 0)
    assert r.choose(prompt(1), {0: SLACK - 1, 1: 0}) == 0
    assert r.choose(prompt(1), {0: SLACK + 1, 1: 0}) == 1
    # The busier all are, the more of a difference is borne.
    assert r.choose(prompt(1), {0: 100 + SLACK + 49, 1: 100}) == 0
    assert r.choose(prompt(1), {0: 100 + SLACK + 51, 1: 100}) == 1


def test_prompts_that_are_still_to_be_computed_count_for_more() -> None:
    assert load(5, 5) == 5
    assert load(2, 0) > load(4, 4)
    # Four known prompts at once stay together; a fifth need not be waited for.
    r = router()
    r.record(prompt(1), 0)
    assert r.choose(prompt(1), {0: load(4, 0), 1: 0}) == 0
    assert r.choose(prompt(1), {0: load(9, 0), 1: 0}) == 1


def test_a_short_common_beginning_does_not_gather_everything() -> None:
    """A system prompt that all share: a tenth of each prompt, and worth a tenth of the bound."""
    r = router()
    loads = Counter(dict.fromkeys(range(4), 0))
    rest = np.random.default_rng(0)
    for _ in range(400):
        ids = np.concatenate([np.arange(BLOCK), rest.integers(0, 1000, 9 * BLOCK)]).astype(np.int32)
        mark = footprint(ids, ())
        chosen = r.choose(mark, loads)
        r.record(mark, chosen)
        loads[chosen] += 1
    assert max(loads.values()) - min(loads.values()) <= 2


def test_what_was_evicted_is_forgotten() -> None:
    r = router(capacity=10 * BLOCK)
    r.record(prompt(1), 0)
    r.record(prompt(2), 0)
    assert r.reused(prompt(1), 0) == 0.0
    assert r.reused(prompt(2), 0) == 1.0
    # The end of a prompt goes first: half of it is a prefix still.
    r.record(prompt(3, length=5 * BLOCK), 0)
    assert r.reused(prompt(2), 0) == pytest.approx(0.5)
    r.forget(0)
    assert r.reused(prompt(2), 0) == 0.0


def test_methods_without_memory() -> None:
    turns = router("round_robin")
    assert [turns.choose(prompt(1), {0: 9, 1: 0, 2: 0}) for _ in range(6)] == [0, 1, 2, 0, 1, 2]
    shortest = router("shortest_queue")
    shortest.record(prompt(1), 0)
    assert shortest.choose(prompt(1), {0: 2, 1: 1, 2: 3}) == 1
    assert {shortest.choose(prompt(1), {0: 1, 1: 1}) for _ in range(2)} == {0, 1}
    with pytest.raises(ValueError):
        shortest.choose(prompt(1), {})


def test_each_replica_sees_its_own_device() -> None:
    def env(replica: int, **outside: str) -> dict[str, str]:
        return device_env(EngineConfig(dp_size=2), replica, outside)

    assert env(1) == {"CUDA_VISIBLE_DEVICES": "1"}
    assert env(0, CUDA_VISIBLE_DEVICES="3, 5") == {"CUDA_VISIBLE_DEVICES": "3"}
    assert env(1, CUDA_VISIBLE_DEVICES="GPU-a,GPU-b") == {"CUDA_VISIBLE_DEVICES": "GPU-b"}
    assert env(1, CUDA_VISIBLE_DEVICES="") == {}
    assert device_env(EngineConfig(dp_size=2, tp_size=2), 1, {}) == {"CUDA_VISIBLE_DEVICES": "2,3"}
    four = {"CUDA_VISIBLE_DEVICES": "7,6,1,0"}
    assert device_env(EngineConfig(dp_size=2, tp_size=2), 1, four) == {"CUDA_VISIBLE_DEVICES": "1,0"}
    assert device_env(EngineConfig(dp_size=2, device="cpu"), 1, {"CUDA_VISIBLE_DEVICES": "0"}) == {}
    with pytest.raises(DeviceError, match="dp-size 2 needs 2 GPUs"):
        env(0, CUDA_VISIBLE_DEVICES="0")
