"""The queue of pictures before the encoder, over an encoder that counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sightline.engine.encode_queue import LARGE, Encoded, EncodeQueue
from sightline.models import Encoding
from sightline.types import ImageRef

A, B, C = (ImageRef(name * 32, 0, 1, (1, 1, 1)) for name in (b"a", b"b", b"c"))


class Counting:
    """Each picture takes four parts of one operation; `slice` of them may run beside decoding."""

    def __init__(self, slice: float | None = 3.0) -> None:
        self.slice = slice
        self.parts = 0
        self.begun: list[list[ImageRef]] = []
        self.bad: list[ImageRef] = []

    def encoding(self, images: Sequence[ImageRef], pixels: Sequence[Any]) -> Encoding[list[Any]]:
        self.begun.append(list(images))
        for _ in range(4 * len(images)):
            self.parts += 1
            yield 1.0
        if any(image in self.bad for image in images):
            raise ValueError("no picture")
        return [f"features of {p}" for p in pixels]

    def slice_flops(self) -> float | None:
        return self.slice


def queue(runner: Counting, *pictures: ImageRef, gone: Sequence[ImageRef] = ()) -> EncodeQueue:
    unwanted = {image.digest for image in gone}
    waiting = EncodeQueue(runner, lambda digest: digest not in unwanted)
    for image in pictures:
        waiting.add([image], [image.digest[:1].decode()])
    return waiting


def names(done: Sequence[Encoded]) -> list[Any]:
    return [result.features for result in done]


def test_beside_decoding_a_slice_at_a_time():
    runner = Counting(slice=3.0)
    waiting = queue(runner, A, B)
    parts, finished = [], []
    while waiting:
        before = runner.parts
        finished += names(waiting.advance((), True))
        parts.append(runner.parts - before)
    assert finished == ["features of a", "features of b"]
    assert parts == [3, 3, 2]


def test_without_decoding_only_what_the_step_needs():
    runner = Counting()
    waiting = queue(runner, A, B, C)
    assert waiting.advance((), False) == []
    assert names(waiting.advance({B.digest}, False)) == ["features of b"]
    assert runner.parts == 4


def test_what_a_step_needs_goes_before_what_has_not_begun_and_beyond_a_slice():
    runner = Counting(slice=2.0)
    waiting = queue(runner, A, B, C)
    waiting.advance((), True)
    assert names(waiting.advance({C.digest}, True)) == ["features of a", "features of c"]
    assert runner.begun == [[A], [C]]
    assert runner.parts == 8


def test_an_encoder_of_unknown_speed_works_at_once():
    assert len(queue(Counting(slice=None), A, B, C).advance((), True)) == 3


def test_a_bad_picture_fails_alone_and_is_tried_twice():
    runner = Counting(slice=None)
    runner.bad = [B]
    waiting = EncodeQueue(runner, lambda digest: True)
    waiting.add([A, B, C], ["a", "b", "c"])
    done = waiting.advance((), True)
    assert [(result.image, result.features, str(result.error)) for result in done] == [
        (A, "features of a", "None"),
        (B, None, "no picture"),
        (C, "features of c", "None"),
    ]
    assert runner.begun == [[A, B, C], [A], [B], [C]]
    assert not waiting


def test_pictures_that_nobody_wants_any_more_are_not_begun():
    runner = Counting(slice=None)
    assert queue(runner, A, B, gone=[A]).advance((), True) == [Encoded(A), Encoded(B, "features of b")]
    assert runner.begun == [[B]]


def test_what_failed_is_tried_again_in_the_same_step_however_small_a_slice_is():
    runner = Counting(slice=1.0)
    runner.bad = [A]
    waiting = queue(runner, A, B)
    while not runner.begun or runner.parts < 4:
        assert waiting.advance((), True) == []
    done = waiting.advance((), True)
    assert [str(result.error) for result in done] == ["no picture"]
    assert runner.begun == [[A], [A]]


def test_a_picture_of_many_features_is_large_while_it_is_next():
    big = ImageRef(b"d" * 32, 0, LARGE + 1, (1, 1, 1))
    runner = Counting(slice=3.0)
    waiting = queue(runner, A, big, B)
    sizes, parts = [], []
    while waiting:
        sizes.append(waiting.large)
        before = runner.parts
        waiting.advance((), True)
        parts.append(runner.parts - before)
    # its slices are two thirds of the others: the last of A and two of the large one, then its other two, and its end with two of B
    assert sizes == [False, False, True, True, False]
    assert parts == [3, 3, 2, 2, 2]
    assert not waiting.large


def test_what_one_picture_took_says_whether_the_next_of_its_kind_is_large():
    """Tokens alone do not: a family may make many of little work."""
    for num_tokens, slice, before, after in ((LARGE + 1, 3.0, True, False), (7, 1.0, False, True)):
        first, second = (ImageRef(name * 32, 0, num_tokens, (1, 1, 1)) for name in (b"d", b"e"))
        waiting = queue(Counting(slice=slice), first)
        assert waiting.large == before
        while waiting:
            waiting.advance((), True)
        waiting.add([second], ["e"])
        assert waiting.large == after
