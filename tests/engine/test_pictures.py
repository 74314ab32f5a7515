"""What rows see of pictures beside the text, against the rule token by token."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.engine.pictures import beside_text, in_text, views
from sightline.types import ImageRef

# lengths of text before each picture, and of the picture's placeholders
prompts = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 2)), max_size=6)


def place(parts: list[tuple[int, int]]) -> list[ImageRef]:
    images: list[ImageRef] = []
    at = 0
    for i, (text, num_tokens) in enumerate(parts):
        images.append(ImageRef(bytes([i]) * 32, at + text, num_tokens, (1, 1, 1)))
        at += text + num_tokens
    return images


def seen(images: list[ImageRef], at: int) -> tuple[ImageRef, ...]:
    """The newest picture begun at or before the token, and back over those that adjoin."""
    begun = [image for image in images if image.offset <= at]
    if not begun:
        return ()
    first = len(begun) - 1
    while first and begun[first - 1].offset + begun[first - 1].num_tokens == begun[first].offset:
        first -= 1
    return tuple(begun[first:])


@given(prompts, st.integers(0, 25), st.integers(1, 25))
@settings(max_examples=500, deadline=None, derandomize=True)
def test_views_and_groups(parts: list[tuple[int, int]], start: int, length: int) -> None:
    images, end = place(parts), start + length
    found: dict[int, tuple[ImageRef, ...]] = {}
    for view in views(images, start, end):
        assert view.start < view.end
        assert not found or view.start > max(found)
        found |= dict.fromkeys(range(view.start, view.end), view.images)
    expected = {at: seen(images, at) for at in range(start, end)}
    assert found == {at: pictures for at, pictures in expected.items() if pictures}

    groups = beside_text(images, start, end)
    assert [g[0].offset for g in groups] == sorted(g[0].offset for g in groups)
    needed = {image.digest for pictures in expected.values() for image in pictures}
    held = {image.digest for group in groups for image in group}
    # whole groups are held, also those of which the stretch sees the beginning only
    assert needed <= held
    for group in groups:
        assert {image.digest for image in group} & needed
        assert seen(images, group[-1].offset) == group


@given(prompts, st.integers(0, 25), st.integers(1, 25))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_pictures_in_the_text(parts: list[tuple[int, int]], start: int, length: int) -> None:
    images = place(parts)
    touched = [
        (i,) for i in images if set(range(i.offset, i.offset + i.num_tokens)) & set(range(start, start + length))
    ]
    assert in_text(images, start, start + length) == touched
