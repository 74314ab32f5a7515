"""Pictures that wait for the encoder. Beside decoding they are encoded in slices between the steps, so that nobody waits long for
the next token however large a picture is; alone, at once."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from sightline.types import ImageRef

logger = logging.getLogger("sightline.engine")

# Between two steps that decode: less than such a step takes while prompts come in.
SLICE_SECONDS = 0.015
# Of a slice of a large picture, and of the rows of a step between two of them: all the others wait through both.
BESIDE_LARGE = 2 / 3
# Slices that a large picture takes more than, or features, as long as none like it has been encoded: one of 1500 x 1500 pixels has
# 2809. While one is encoded, slices and prompts take turns in the steps that decode, so that none is as long as both.
_FEW_SLICES, LARGE = 2, 2048
_MAX_KINDS = 256


class Encoded(NamedTuple):
    """What became of a picture: its features, or why there are none (no error: nobody wanted it any more)."""

    image: ImageRef
    features: Any = None
    error: Exception | None = None


class PictureRunner(Protocol):
    """What the queue needs of a model."""

    def encoding(self, images: Sequence[ImageRef], pixels: Sequence[Any]) -> Any:
        """A `sightline.models.Encoding` of these pictures."""

    def slice_flops(self) -> float | None:
        """How much of it may run between two steps of decoding; None for all."""


@dataclass
class _Job:
    """Pictures that are encoded together. work: once it has begun. flops: of it. again: it failed before."""

    images: list[ImageRef]
    pixels: list[Any]
    again: bool = False
    work: Any = None
    flops: float = 0.0
    digests: set[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.digests = {image.digest for image in self.images}

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for pictures of equal shapes, which take as much work."""
        return tuple((image.grid, image.num_tokens) for image in self.images)


class EncodeQueue:
    """First in, first out, but for pictures that a step cannot do without. What has begun is ended first.

    wanted: whether any request still holds a digest; a job nobody wants is dropped before it begins. more_is_large: features.
    """

    def __init__(self, runner: PictureRunner, wanted: Callable[[bytes], bool], more_is_large: int = LARGE) -> None:
        self._runner = runner
        self._wanted = wanted
        self._more_is_large = more_is_large
        self._jobs: deque[_Job] = deque()
        self._flops: dict[tuple[Any, ...], float] = {}

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def add(self, images: Sequence[ImageRef], pixels: Sequence[Any]) -> None:
        """Pictures to be encoded together."""
        self._jobs.append(_Job(list(images), list(pixels)))

    @property
    def large(self) -> bool:
        """Whether what is encoded next is."""
        if not self._jobs:
            return False
        job = self._begun or self._jobs[0]
        flops, limit = self._flops.get(job.kind), self._runner.slice_flops()
        if flops is None or limit is None:
            return sum(image.num_tokens for image in job.images) > self._more_is_large
        return flops > _FEW_SLICES * limit

    @property
    def _begun(self) -> _Job | None:
        return next((job for job in self._jobs if job.work is not None), None)

    def advance(self, needed: Collection[bytes], slice: bool) -> list[Encoded]:
        """Encode all of `needed`, and with `slice`, which is for steps that decode, as much of the others. Returns what is finished.

        A job that fails is tried again at once, picture by picture.
        """
        done: list[Encoded] = []
        limit = self._runner.slice_flops()
        if limit is not None and self.large:
            limit *= BESIDE_LARGE
        missing = set(needed)
        spent = last = 0.0
        while self._jobs:
            sought = next((job for job in self._jobs if job.again or job.digests & missing), None)
            # the next part is most often as large as the last
            full = limit is not None and spent > 0 and spent + last > limit
            if sought is None and (full or not slice):
                break
            last, results = self._part(self._begun or sought or self._jobs[0])
            spent += last
            done += results
            missing -= {result.image.digest for result in results}
        return done

    def _part(self, job: _Job) -> tuple[float, list[Encoded]]:
        """Launch the next part of a job; what it finished, if it did."""
        if job.work is None and not any(map(self._wanted, job.digests)):
            self._jobs.remove(job)
            return 0.0, [Encoded(image) for image in job.images]
        try:
            if job.work is None:
                job.work = self._runner.encoding(job.images, job.pixels)
            flops = next(job.work)
            job.flops += flops
            return flops, []
        except StopIteration as end:
            self._jobs.remove(job)
            if len(self._flops) == _MAX_KINDS:
                self._flops.clear()
            self._flops[job.kind] = job.flops
            return 0.0, [Encoded(image, value) for image, value in zip(job.images, end.value, strict=True)]
        except Exception as error:
            self._jobs.remove(job)
            if job.again:
                return 0.0, [Encoded(image, error=error) for image in job.images]
            logger.exception("%d pictures could not be encoded; they are tried again one by one", len(job.images))
            alone = [_Job([image], [pixels], again=True) for image, pixels in zip(job.images, job.pixels, strict=True)]
            self._jobs.extendleft(reversed(alone))
            return 0.0, []
