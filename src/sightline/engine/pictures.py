"""Which pictures a stretch of tokens needs. Two kinds of families: pictures stand in the text, or beside it.

In the text, a picture's features replace its placeholders and are needed while those are computed. Beside the text, they are
attended to: a picture is seen from its placeholder up to the next placeholder that does not adjoin it, and pictures whose
placeholders adjoin form a group. Its pictures are held and let go together: a request that held some and waited for the
others could wait for one that does the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sightline.types import ImageRef


def in_text(images: Sequence[ImageRef], start: int, end: int) -> list[tuple[ImageRef, ...]]:
    """Groups of one picture: those with a placeholder in start..end."""
    return [(i,) for i in images if i.offset < end and i.offset + i.num_tokens > start]


def beside_text(images: Sequence[ImageRef], start: int, end: int) -> list[tuple[ImageRef, ...]]:
    """Groups that a token of start..end sees."""
    groups = _groups(images)
    ends = [group[0].offset for group in groups[1:]]
    return [g for i, g in enumerate(groups) if g[0].offset < end and (i == len(ends) or ends[i] > start)]


class View(NamedTuple):
    """Tokens start..end see `images`."""

    start: int
    end: int
    images: tuple[ImageRef, ...]


def views(images: Sequence[ImageRef], start: int, end: int) -> list[View]:
    """What the tokens of start..end see beside the text, in order; those that see nothing are left out.

    The placeholders of a group see the pictures up to their own, later tokens the whole group.
    """
    result = []
    group: tuple[ImageRef, ...] = ()
    for i, image in enumerate(images):
        group = (*group, image) if i and _adjoins(images[i - 1], image) else (image,)
        first = max(start, image.offset)
        last = min(end, images[i + 1].offset) if i + 1 < len(images) else end
        if first < last:
            result.append(View(first, last, group))
    return result


def _adjoins(image: ImageRef, following: ImageRef) -> bool:
    return following.offset == image.offset + image.num_tokens


def _groups(images: Sequence[ImageRef]) -> list[tuple[ImageRef, ...]]:
    groups: list[list[ImageRef]] = []
    for image in images:
        if groups and _adjoins(groups[-1][-1], image):
            groups[-1].append(image)
        else:
            groups.append([image])
    return [tuple(group) for group in groups]
