"""Pieces of the scheduler that the simulation reaches only by chance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.cache.page_pool import PagePool
from sightline.cache.radix import RadixCache, page_keys
from sightline.cache.vision_cache import VisionCache
from sightline.engine.request import Request
from sightline.engine.scheduler import Scheduler, SchedulerConfig
from sightline.types import FinishReason, ImageRef, SamplingParams


def make(num_pages: int = 20, radix: bool = True, **config: int) -> Scheduler:
    pool = PagePool(num_pages + 1)
    values = {"page_size": 4, "max_step_tokens": 64, "max_running": 8, "max_encode_tokens": 64, "image_token_bytes": 1}
    return Scheduler(
        SchedulerConfig(**{**values, **config}), pool, RadixCache(pool, 4) if radix else None, VisionCache(1000)
    )


def request(prompt: list[int], images: tuple[ImageRef, ...] = (), name: str = "r") -> Request:
    return Request(
        request_id=name,
        index=0,
        prompt_ids=np.asarray(prompt, dtype=np.int32),
        sampling=SamplingParams(),
        max_tokens=100,
        sampling_state=None,
        images=images,
    )


def step(scheduler: Scheduler) -> list[tuple[str, int, int]]:
    """Schedule and pretend to compute; (name, start, length) of each row."""
    batch = scheduler.schedule()
    if batch is None:
        return []
    for image in batch.encode:
        scheduler.vision_cache.fill(image.digest, "features")
        del scheduler.pixels[image.digest]
    for row in batch.rows:
        scheduler.advance(row)
        if row.sample:
            row.request.output_ids.append(7)
    return [(row.request.request_id, row.start, row.q_len) for row in batch.rows]


@given(st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_keys_do_not_depend_on_where_the_prompt_ended(data: st.DataObject):
    """Pages that hold the end of a prompt, pictures in it included, and the beginning of an answer."""
    ids: list[int] = []
    images: list[ImageRef] = []
    for part in data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=8)):
        if part:
            images.append(ImageRef(bytes([part]) * 32, len(ids), 2 * part, (1, 1, 1)))
            ids += [99] * 2 * part
        else:
            ids.append(data.draw(st.integers(0, 2)))
    answer = data.draw(st.lists(st.integers(0, 2), max_size=10))
    asked = request(ids, tuple(images))
    asked.output_ids += answer
    whole = page_keys(np.asarray(ids + answer, dtype=np.int32), images, 4)
    for count in data.draw(st.permutations(range(len(whole) + 1))):
        assert make()._keys(asked, count) == whole[:count]


def test_decode_rows_stand_before_prefill():
    scheduler = make(max_step_tokens=6)
    scheduler.add(request([1, 2, 3], name="a"))
    assert step(scheduler) == [("a", 0, 3)]
    scheduler.add(request(list(range(10)), name="b"))
    scheduler.add(request([5, 6], name="c"))
    assert step(scheduler) == [("a", 3, 1), ("b", 0, 5)]
    assert step(scheduler) == [("a", 4, 1), ("b", 5, 5)]
    assert step(scheduler) == [("a", 5, 1), ("b", 10, 1), ("c", 0, 2)]


def test_the_newest_is_retracted_and_returns_first():
    scheduler = make(num_pages=6)
    for name in "ab":
        scheduler.add(request([ord(name)] * 7, name=name))
    step(scheduler)
    scheduler.add(request([1] * 20, name="late"))
    while not scheduler.num_retractions:
        assert step(scheduler)
    assert [r.request_id for r in scheduler.running] == ["a"]
    assert [r.request_id for r in scheduler.waiting] == ["b", "late"]
    for r in (*scheduler.running, *scheduler.waiting):
        scheduler.finish(r, FinishReason.ABORT)
    scheduler.assert_idle()


def test_a_request_without_its_pixels_lets_others_pass():
    scheduler = make()
    picture = ImageRef(b"p" * 32, 1, 4, (1, 1, 1))
    scheduler.add(request([1, 99, 99, 99, 99, 2], (picture,), "picture"))
    scheduler.add(request([1, 2, 3], name="text"))
    assert step(scheduler) == [("text", 0, 3)]
    assert [(r.request_id, d) for r, d in scheduler.pixel_requests] == [("picture", [picture.digest])]
    scheduler.put_pixels(picture.digest, "pixels")
    assert step(scheduler) == [("text", 3, 1), ("picture", 0, 6)]


def test_room_for_one_picture_serves_a_prompt_that_returns_to_it():
    """The first picture must not be held for its second showing while another one needs the room."""
    scheduler = make()
    scheduler.vision_cache.max_bytes = 4
    a, b = ImageRef(b"a" * 32, 0, 4, (1, 1, 1)), ImageRef(b"b" * 32, 4, 4, (1, 1, 1))
    again = ImageRef(a.digest, 8, 4, (1, 1, 1))
    scheduler.add(request([99] * 12, (a, b, again), "aba"))
    rows = []
    for _ in range(6):
        for digest in (a.digest, b.digest):
            scheduler.put_pixels(digest, "pixels")
        rows += step(scheduler)
    assert [row[1:] for row in rows[:4]] == [(0, 4), (4, 4), (8, 4), (12, 1)]


def test_beside_the_text_a_returning_request_decodes_only_with_its_picture():
    """Retracted with all tokens but the newest in the prefix cache, it needs no prefill; but its picture is gone."""
    scheduler = make(cross_attention=True, image_token_bytes=4)
    cache, stranger = scheduler.vision_cache, b"x" * 32
    cache.max_bytes = 4
    picture = ImageRef(b"p" * 32, 0, 1, (1, 1, 1))
    asked = request([99, 1, 2, 3, 4], (picture,))
    scheduler.add(asked)
    scheduler.put_pixels(picture.digest, "pixels")
    for _ in range(4):
        step(scheduler)
    assert (asked.num_computed, asked.num_tokens) == (8, 9)
    scheduler.retract(asked)
    assert cache.reserve(stranger, 4)
    cache.fill(stranger, "features")
    cache.pin(stranger)
    scheduler.put_pixels(picture.digest, "pixels")
    assert step(scheduler) == []
    assert scheduler.running == [asked]
    assert step(scheduler) == []
    cache.unpin(stranger)
    assert step(scheduler) == [("r", 8, 1)]
    assert asked.pinned == {picture.digest}


def test_beside_others_a_returning_request_decodes_when_its_picture_is_encoded():
    """As above, but somebody decodes meanwhile, so the picture is encoded in slices."""
    scheduler = make(cross_attention=True, image_token_bytes=4)
    scheduler.encode_beside = True
    picture = ImageRef(b"p" * 32, 0, 1, (1, 1, 1))
    other, asked = request([1, 2], name="other"), request([99, 1, 2, 3, 4], (picture,), name="asked")
    scheduler.add(other)
    scheduler.add(asked)
    scheduler.put_pixels(picture.digest, "pixels")
    while asked.num_tokens < 9:
        step(scheduler)
    assert asked.num_computed == 8
    scheduler.retract(asked)
    scheduler.vision_cache.clear()
    scheduler.put_pixels(picture.digest, "pixels")
    for encoded in ([picture], []):
        batch = scheduler.schedule()
        assert batch is not None
        assert batch.encode == encoded
        assert [row.request for row in batch.rows] == [other]
        scheduler.advance(batch.rows[0])
        other.output_ids.append(7)
    scheduler.vision_cache.fill(picture.digest, "features")
    batch = scheduler.schedule()
    assert batch is not None
    assert [(row.request, row.q_len) for row in batch.rows] == [(other, 1), (asked, 1)]


def prompts_with_pictures(room: int, max_encode_tokens: int = 4) -> tuple[Scheduler, list[ImageRef]]:
    """One request decodes; four prompts with a picture each wait. Three of their tokens fit into a step, the cache has `room`."""
    scheduler = make(max_mixed_tokens=4, max_encode_tokens=max_encode_tokens, num_pages=40)
    scheduler.vision_cache.max_bytes = room
    scheduler.encode_beside = True
    scheduler.add(request([1, 2], name="decodes"))
    step(scheduler)
    pictures = [ImageRef(bytes([i]) * 32, 0, 4, (1, 1, 1)) for i in range(4)]
    for i, picture in enumerate(pictures):
        scheduler.add(request([99] * 4 + [i] * 12, (picture,), name=f"{i}"))
        scheduler.put_pixels(picture.digest, "pixels")
    return scheduler, pictures


def encoded(scheduler: Scheduler) -> list[ImageRef]:
    """The pictures that are encoded in the next step."""
    before = set(scheduler.pixels)
    step(scheduler)
    gone = before - set(scheduler.pixels)
    return [ImageRef(digest, 0, 4, (1, 1, 1)) for digest in gone]


def test_while_one_prompt_is_computed_the_pictures_of_the_next_are_encoded():
    scheduler, pictures = prompts_with_pictures(room=100)
    # the first for its own prompt, and two steps' worth ahead
    assert [encoded(scheduler) for _ in range(5)] == [[p] for p in pictures[:3]] + [[], []]
    # the last when the second prompt has begun
    assert [encoded(scheduler) for _ in range(3)] == [[], pictures[3:], []]


def test_a_picture_ahead_of_its_time_takes_nobodys_place():
    scheduler, pictures = prompts_with_pictures(room=8)
    # the third has to wait until the prompt is beyond the first
    assert [encoded(scheduler) for _ in range(4)] == [[p] for p in pictures[:2]] + [[], [pictures[2]]]
    scheduler, pictures = prompts_with_pictures(room=3)
    # a guest of the cache, which one that nobody needs yet may not be
    assert [encoded(scheduler) for _ in range(4)] == [[pictures[0]], [], [], []]


def test_ahead_is_beside_decoding_alone():
    for beside, decodes, number in ((True, True, 3), (False, True, 1), (True, False, 1)):
        scheduler, pictures = prompts_with_pictures(room=100, max_encode_tokens=12)
        scheduler.encode_beside = beside
        if not decodes:
            scheduler.finish(scheduler.running[0], FinishReason.ABORT)
            scheduler.config = replace(scheduler.config, max_step_tokens=16)
        batch = scheduler.schedule()
        assert batch is not None
        assert batch.encode == pictures[:number]


def test_a_step_that_decodes_is_larger_the_more_prompts_wait():
    scheduler = make(
        num_pages=40_000, max_step_tokens=8192, max_mixed_tokens=3584, min_mixed_tokens=768, max_running=100
    )
    scheduler.add(request([1, 2], name="decodes"))
    step(scheduler)
    rows = []
    for number in range(40):
        scheduler.add(request([number] * 4000, name=f"{number}"))
        rows.append(sum(q_len for _, _, q_len in step(scheduler)))
    # as many as clear what waits in sixteen steps, in sizes that graphs have: never fewer than the least, which do for the first
    assert rows[:3] == [768] * 3
    assert {n % 256 for n in rows} == {0}
    assert rows == sorted(rows)
    assert rows[-1] == 3584
    for r in [*scheduler.waiting]:
        scheduler.finish(r, FinishReason.ABORT)
    assert sum(q_len for _, _, q_len in step(scheduler)) <= 768


def test_prompts_take_the_share_of_a_step_that_they_are_told():
    scheduler = make(num_pages=4000, max_step_tokens=8192, max_mixed_tokens=900, max_running=100)
    scheduler.add(request([1, 2], name="decodes"))
    step(scheduler)
    scheduler.add(request([3] * 5000))
    for share, rows in ((1.0, 900), (2 / 3, 600), (0.0, 1)):
        batch = scheduler.schedule(share)
        assert batch is not None
        assert sum(row.q_len for row in batch.rows) == rows
        for row in batch.rows:
            scheduler.advance(row)
        batch.rows[0].request.output_ids.append(7)
