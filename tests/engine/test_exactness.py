"""The real engine on tiny checkpoints, token by token beside transformers, whatever else the engine does meanwhile."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from sightline.config import EngineConfig
from sightline.engine.core import EngineCore
from sightline.engine.factory import build_core
from sightline.engine.setup import EngineSetup
from sightline.types import (
    EngineRequest,
    FinishReason,
    ImageRef,
    NeedPixels,
    Pixels,
    SamplingParams,
    TokenEvent,
    ids_to_bytes,
)
from tests import oracle, tiny

TOLERANCE = 2e-3
NEW_TOKENS = 10
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=5)


# -- prompts, and what transformers answers --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Prompt:
    """Expanded ids, positions and pictures of one prompt, from transformers' own processing."""

    ids: list[int]
    pictures: list[Image.Image]
    pixels: list[np.ndarray]
    images: tuple[ImageRef, ...]
    positions: np.ndarray | None
    delta: int

    def request(self, name: str, sampling: SamplingParams = GREEDY, salt: bytes = b"") -> EngineRequest:
        return EngineRequest(
            request_id=name,
            input_ids=ids_to_bytes(self.ids),
            sampling=sampling,
            positions=b"" if self.positions is None else ids_to_bytes(self.positions.reshape(-1)),
            position_delta=self.delta,
            images=self.images,
            cache_salt=salt,
        )


def model_dir() -> Path:
    return tiny.qwen2_vl()


@functools.cache
def make(*parts: int | tuple[int, int], seed: int = 0, picture_seed: int = 0) -> Prompt:
    """Numbers are so many random text tokens, pairs are pictures of that size."""
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    pictures: list[Image.Image] = []
    for part in parts:
        if isinstance(part, int):
            ids += rng.integers(0, tiny.NUM_TEXT_TOKENS, part).tolist()
        else:
            ids += [tiny.VISION_START, tiny.IMAGE_PAD, tiny.VISION_END]
            pictures.append(oracle.picture(*part, seed=picture_seed + len(pictures)))
    ids = oracle.expand(model_dir(), ids, pictures)
    pixels = [oracle.resized(model_dir(), picture) for picture in pictures]
    images, at = [], 0
    for p in pixels:
        grid = (1, p.shape[0] // 14, p.shape[1] // 14)
        num_tokens = grid[1] * grid[2] // 4
        at = ids.index(tiny.IMAGE_PAD, at)
        images.append(ImageRef(hashlib.blake2b(p.tobytes(), digest_size=32).digest(), at, num_tokens, grid))
        at += num_tokens
    positions, delta = oracle.positions(model_dir(), ids, pictures)
    return Prompt(ids, pictures, pixels, tuple(images), positions.astype(np.int32), delta)


@functools.cache
def truth(prompt: Prompt) -> tuple[list[int], torch.Tensor]:
    """transformers' greedy answer, and its log-probabilities at each step [NEW_TOKENS, vocab]."""
    answer = oracle.transformers_greedy(model_dir(), prompt.ids, prompt.pictures, NEW_TOKENS)
    logprobs = oracle.transformers_logprobs(model_dir(), [*prompt.ids, *answer[:-1]], prompt.pictures)
    return answer, logprobs[len(prompt.ids) - 1 :]


SHAPES: dict[str, tuple[int | tuple[int, int], ...]] = {
    "text": (40,),
    "one picture": (9, (100, 150), 12),
    "two pictures": (3, (100, 150), (220, 60), 20),
    "three pictures": ((64, 64), 5, (300, 40), 1, (90, 90), 7),
}


# -- the engine under test -------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """What came back for one choice."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    prompt_logprobs: list[Any] | None = None
    reason: FinishReason | None = None
    num_cached: int = 0


class Driver:
    """An `EngineCore` of a tiny checkpoint, and a client that answers its questions for pixels. run_dir: for more than one rank."""

    def __init__(self, folder: Path | None = None, run_dir: Path | None = None, **settings: Any) -> None:
        folder = folder or model_dir()
        config = EngineConfig(**{"model": str(folder), "device": "cpu", "max_total_tokens": 4096, **settings})
        if run_dir is not None:
            EngineSetup(config, folder).write(run_dir)
        self.core: EngineCore = build_core(config, folder, lambda progress: None, run_dir)[0]
        self.pixels: dict[bytes, np.ndarray] = {}
        self.answers: dict[tuple[str, int], Answer] = {}
        self.num_encodes = 0
        encoding = self.core.runner.encoding

        def counting(images: Sequence[ImageRef], pixels: Sequence[Any]) -> list[Any]:
            self.num_encodes += len(images)
            return encoding(images, pixels)

        self.core.runner.encoding = counting  # type: ignore[method-assign]

    def add(self, prompt: Prompt, name: str, sampling: SamplingParams = GREEDY, salt: bytes = b"") -> None:
        self.pixels |= {i.digest: p for i, p in zip(prompt.images, prompt.pixels, strict=True)}
        for index in range(sampling.n):
            self.answers[name, index] = Answer()
        self.core.add(prompt.request(name, sampling, salt))

    def step(self) -> None:
        for event in self.core.step():
            if isinstance(event, NeedPixels):
                for digest in event.digests:
                    self.core.put_pixels(digest, Pixels(self.pixels[digest]))
            else:
                self._receive(event)

    def _receive(self, event: TokenEvent) -> None:
        answer = self.answers[event.request_id, event.index]
        answer.ids += event.token_ids
        answer.logprobs += event.logprobs or []
        answer.reason = event.finish_reason
        answer.num_cached = event.num_cached_tokens
        if event.prompt_logprobs is not None:
            assert answer.prompt_logprobs is None
            answer.prompt_logprobs = event.prompt_logprobs
        assert event.error is None, event.error

    def run(self, between: Callable[[], None] = lambda: None) -> None:
        """Until idle; `between` is called after every step."""
        for _ in range(10_000):
            if self.core.idle:
                self.core.scheduler.assert_idle()
                return
            self.step()
            between()
        raise AssertionError("no end in sight")

    def ask(self, prompt: Prompt, sampling: SamplingParams = GREEDY, salt: bytes = b"") -> Answer:
        """One request alone."""
        name = f"ask-{len(self.answers)}"
        self.add(prompt, name, sampling, salt)
        self.run()
        return self.answers[name, 0]

    def limit_step(self, tokens: int) -> None:
        """Cut prefill into chunks of so many tokens."""
        scheduler = self.core.scheduler
        scheduler.config = dataclasses.replace(scheduler.config, max_step_tokens=tokens)


def check(answer: Answer, prompt: Prompt) -> None:
    """Equal to transformers: every id, and every log-probability that came with it."""
    ids, logprobs = truth(prompt)
    assert answer.ids == ids
    assert answer.reason is FinishReason.LENGTH
    assert len(answer.logprobs) == len(ids)
    for step, given in enumerate(answer.logprobs):
        row = logprobs[step]
        assert given.token_id == ids[step]
        assert abs(given.logprob - row[given.token_id].item()) < TOLERANCE
        assert len(given.top) == 5
        for rank, (token, value) in enumerate(given.top):
            assert abs(value - row[token].item()) < TOLERANCE
            assert abs(value - row.sort(descending=True).values[rank].item()) < TOLERANCE


@pytest.fixture(scope="module")
def driver() -> Driver:
    return Driver()


salts = (f"run {i}".encode() for i in range(10**9))


# -- alone, in company, in pieces ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_alone(driver: Driver, shape: str):
    prompt = make(*SHAPES[shape])
    check(driver.ask(prompt, salt=next(salts)), prompt)


def test_with_strangers(driver: Driver):
    """Prompts arrive one by one among sampling, branching and aborted strangers."""
    strangers = [make(20 + i, (60 + 9 * i, 90), i, seed=50 + i, picture_seed=70 + i) for i in range(4)]
    salt = next(salts)
    for i, shape in enumerate(SHAPES):
        driver.add(
            strangers[i], f"stranger {i}", SamplingParams(temperature=1.0, seed=i, n=2, max_tokens=20, top_p=0.9)
        )
        driver.step()
        driver.add(make(*SHAPES[shape]), f"strangers, {shape}", salt=salt)
        driver.step()
        if i == 2:
            driver.core.abort("stranger 1")
            driver.core.abort("stranger 2", 1)
    driver.run()
    for shape in SHAPES:
        check(driver.answers[f"strangers, {shape}", 0], make(*SHAPES[shape]))


@pytest.mark.parametrize("part", range(4))
def test_prefill_in_chunks_of_every_size(driver: Driver, part: int):
    prompt = make(5, (56, 84), 2, (84, 84), 3)
    try:
        for size in range(1 + part, len(prompt.ids) + 2, 4):
            driver.limit_step(size)
            check(driver.ask(prompt, salt=next(salts)), prompt)
    finally:
        driver.limit_step(2048)


def test_chunks_with_strangers():
    """Three prompts share steps of five tokens, so chunks begin and end anywhere and mix with decoding."""
    driver = Driver(chunked_prefill_size=5)
    for shape in SHAPES:
        driver.add(make(*SHAPES[shape]), shape)
        for _ in range(3):
            driver.step()
    driver.run()
    for shape in SHAPES:
        check(driver.answers[shape, 0], make(*SHAPES[shape]))


# -- the prompt's own log-probabilities ------------------------------------------------------------------------------------


def scoring(start: int = 0, **more: Any) -> SamplingParams:
    return msgspec.structs.replace(GREEDY, prompt_logprobs=3, prompt_logprobs_start=start, **more)


def check_scores(answer: Answer, prompt: Prompt, start: int = 0) -> None:
    """Equal to what transformers gives each of the prompt's tokens after those before it, and so is the answer."""
    check(answer, prompt)
    logprobs = oracle.transformers_logprobs(model_dir(), prompt.ids, prompt.pictures)
    first = max(start, 1)
    assert answer.prompt_logprobs is not None
    assert [entry.token_id for entry in answer.prompt_logprobs] == prompt.ids[first:]
    for row, entry in zip(logprobs[first - 1 :], answer.prompt_logprobs, strict=False):
        assert abs(entry.logprob - row[entry.token_id].item()) < TOLERANCE
        assert len(entry.top) == 3
        for rank, (token, value) in enumerate(entry.top):
            assert abs(value - row[token].item()) < TOLERANCE
            assert abs(value - row.sort(descending=True).values[rank].item()) < TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_of_a_prompt(driver: Driver, shape: str) -> None:
    prompt = make(*SHAPES[shape])
    check_scores(driver.ask(prompt, scoring(), salt=next(salts)), prompt)


def test_scores_with_a_prefix_that_is_cached(driver: Driver) -> None:
    """Only what nothing scored follows comes from the cache, and what is computed again is not kept twice."""
    prompt, salt = make(*SHAPES["two pictures"]), next(salts)
    check(driver.ask(prompt, salt=salt), prompt)
    last = len(prompt.ids) - 1
    for start, cached in ((0, 0), (1, 0), (16, 0), (17, 16), (40, 32), (last, (last - 1) // 16 * 16)):
        answer = driver.ask(prompt, scoring(start), salt=salt)
        check_scores(answer, prompt, start)
        assert answer.num_cached == cached
    assert driver.ask(prompt, scoring(len(prompt.ids)), salt=salt).prompt_logprobs == []
    assert driver.ask(prompt, salt=salt).num_cached == last // 16 * 16


@pytest.mark.parametrize("overlap", [False, True])
def test_scores_in_chunks_with_strangers(overlap: bool) -> None:
    """Steps of five tokens, several prompts and their answers in each; another choice of the same prompt has the same beginning."""
    driver = Driver(chunked_prefill_size=5)
    driver.core.overlap = overlap
    for shape in SHAPES:
        driver.add(make(*SHAPES[shape]), shape, scoring(n=2))
        driver.add(make(11, seed=7), f"stranger of {shape}")
        for _ in range(3):
            driver.step()
    driver.run()
    for shape in SHAPES:
        check_scores(driver.answers[shape, 0], make(*SHAPES[shape]))
        assert driver.answers[shape, 1].prompt_logprobs is None
        check(driver.answers[shape, 1], make(*SHAPES[shape]))


@pytest.mark.parametrize("overlap", [False, True])
def test_scores_of_a_prompt_that_is_set_back(driver: Driver, overlap: bool) -> None:
    """While its prompt is computed, and while it answers; with pages of it in the prefix cache."""
    prompt = make(*SHAPES["two pictures"])
    driver.limit_step(11)
    driver.core.overlap = overlap
    try:
        for at in range(1, 16, 3):
            steps = 0

            def retract(at: int = at) -> None:
                nonlocal steps
                steps += 1
                if steps == at and driver.core.scheduler.running:
                    driver.core.scheduler.retract(driver.core.scheduler.running[0])

            name = f"set back at {at} {overlap}"
            driver.add(prompt, name, scoring(), salt=next(salts))
            driver.run(retract)
            check_scores(driver.answers[name, 0], prompt)
    finally:
        driver.core.overlap = False
        driver.limit_step(2048)


# -- caches ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_prefix_cache_hit(shape: str):
    driver = Driver()
    prompt = make(*SHAPES[shape])
    first = driver.ask(prompt)
    encoded = driver.num_encodes
    again = driver.ask(prompt)
    assert (first.num_cached, again.num_cached) == (0, (len(prompt.ids) - 1) // 16 * 16)
    assert driver.num_encodes == encoded == len(prompt.images)
    check(again, prompt)


def test_a_prefix_that_ends_inside_a_picture(driver: Driver):
    """The same beginning and picture, another end; the shared pages stop within the picture."""
    salt = next(salts)
    first, second = make(9, (140, 140), 3), make(9, (140, 140), 30)
    assert second.ids[: len(first.ids) - 3] == first.ids[:-3]
    driver.ask(first, salt=salt)
    answer = driver.ask(second, salt=salt)
    assert answer.num_cached == (len(first.ids) - 3) // 16 * 16 > 0
    check(answer, second)


def test_another_picture_behind_the_same_ids(driver: Driver):
    salt = next(salts)
    one, other = make(9, (140, 140), 30), make(9, (140, 140), 30, picture_seed=5)
    assert one.ids == other.ids
    assert truth(one)[0] != truth(other)[0]
    driver.ask(one, salt=salt)
    answer = driver.ask(other, salt=salt)
    assert answer.num_cached == 0
    check(answer, other)


def test_the_cached_answer_is_a_prefix_too(driver: Driver):
    """A conversation: the second prompt is the first, its answer and more."""
    salt = next(salts)
    first = make(9, (100, 150), 12)
    ids, _ = truth(first)
    driver.ask(first, salt=salt)
    more = [*first.ids, *ids, *range(30)]
    positions, delta = oracle.positions(model_dir(), more, first.pictures)
    second = dataclasses.replace(first, ids=more, positions=positions.astype(np.int32), delta=delta)
    answer = driver.ask(second, salt=salt)
    assert answer.num_cached == (len(first.ids) + NEW_TOKENS - 1) // 16 * 16 > len(first.ids)
    check(answer, second)


@pytest.mark.parametrize("budget_gb", [0.25, 0.0])
def test_vision_cache_without_prefix_cache(budget_gb: float):
    driver = Driver(disable_radix_cache=True, vision_cache_gb=budget_gb)
    prompt = make(*SHAPES["two pictures"])
    for _ in range(3):
        answer = driver.ask(prompt)
        assert answer.num_cached == 0
        check(answer, prompt)
    assert driver.num_encodes == (2 if budget_gb else 6)


# -- retraction ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radix", [True, False], ids=["prefix cache", "no prefix cache"])
def test_retracted_at_every_step(radix: bool):
    driver = Driver(disable_radix_cache=not radix)
    prompt = make(*SHAPES["one picture"])
    driver.limit_step(11)
    for at in range(1, 20):
        steps = 0

        def retract(at: int = at) -> None:
            nonlocal steps
            steps += 1
            if steps == at and driver.core.scheduler.running:
                driver.core.scheduler.retract(driver.core.scheduler.running[0])

        driver.add(prompt, f"retract {at}", salt=next(salts))
        driver.run(retract)
        check(driver.answers[f"retract {at}", 0], prompt)
    assert driver.core.snapshot().retractions > 10


@pytest.mark.parametrize("radix", [True, False], ids=["prefix cache", "no prefix cache"])
def test_retraction_when_memory_runs_out(radix: bool):
    """Room for about two prompts; each grows by several pages."""
    driver = Driver(max_total_tokens=176, context_length=128, disable_radix_cache=not radix)
    longer = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    for i in range(4):
        driver.add(make(14 + i, seed=90 + i), f"grows {i}", longer)
    for shape in SHAPES:
        driver.add(make(*SHAPES[shape]), shape)
    driver.run()
    assert driver.core.snapshot().retractions > 0
    for shape in SHAPES:
        check(driver.answers[shape, 0], make(*SHAPES[shape]))
    alone = Driver()
    for i in range(4):
        assert driver.answers[f"grows {i}", 0].ids == alone.ask(make(14 + i, seed=90 + i), longer).ids


# -- sampling --------------------------------------------------------------------------------------------------------------


def test_a_seeded_answer_is_the_same_in_every_circumstance():
    sampling = SamplingParams(
        temperature=1.0, top_p=0.95, seed=7, n=2, max_tokens=24, frequency_penalty=0.5, min_tokens=24, ignore_eos=True
    )
    prompt = make(*SHAPES["one picture"])
    roomy, tight = Driver(), Driver(max_total_tokens=176, context_length=128, chunked_prefill_size=7)
    roomy.add(prompt, "a", sampling)
    roomy.run()
    expected = [roomy.answers["a", i].ids for i in range(2)]
    assert expected[0] != expected[1]
    assert all(len(ids) == 24 for ids in expected)
    for i in range(3):
        tight.add(make(14 + i, seed=90 + i), f"grows {i}", SamplingParams(max_tokens=60, ignore_eos=True))
    tight.add(prompt, "a", sampling)
    tight.run()
    assert [tight.answers["a", i].ids for i in range(2)] == expected
    assert tight.core.snapshot().retractions > 0
    # The second choice found the first one's prompt in the prefix cache.
    assert roomy.answers["a", 1].num_cached == (len(prompt.ids) - 1) // 16 * 16
    assert roomy.num_encodes == 1


def test_stopping(driver: Driver):
    prompt = make(*SHAPES["text"])
    ids, _ = truth(prompt)
    stop = next(token for i, token in enumerate(ids) if i >= 3 and token not in ids[:i])
    end = ids.index(stop)
    halted = driver.ask(
        prompt, SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, stop_token_ids=(stop,))
    )
    assert halted.ids == ids[: end + 1]
    assert halted.reason is FinishReason.STOP
    forced = driver.ask(prompt, SamplingParams(temperature=0.0, logit_bias={tiny.IM_END: 100.0}, min_tokens=4))
    assert forced.ids[4:] == [tiny.IM_END]
    assert tiny.IM_END not in forced.ids[:4]
    ignored = driver.ask(
        prompt, SamplingParams(temperature=0.0, logit_bias={tiny.IM_END: 100.0}, max_tokens=6, ignore_eos=True)
    )
    assert ignored.ids == [tiny.IM_END] * 6
