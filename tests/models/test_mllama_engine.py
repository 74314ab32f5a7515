"""Llama 3.2 Vision through the engine: pictures beside the text, whatever else the engine does meanwhile."""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sightline import Engine, SamplingParams
from sightline.config import EngineConfig
from sightline.engine import runner
from sightline.engine.core import EngineCore
from sightline.engine.cuda_graph import GraphKey
from sightline.engine.executor import GraphSizes
from sightline.engine.factory import build_core
from sightline.engine.pictures import View, beside_text, in_text, views
from sightline.types import EngineRequest, FinishReason, ImageRef, NeedPixels, Pixels, TokenEvent, ids_to_bytes
from tests import mllama_oracle, oracle, tiny_mllama
from tests.models.test_mllama import FOUR, ONE, PROMPTS, THREE, TWO

NEW_TOKENS = 8
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=3)
MODEL = tiny_mllama.mllama
# 2 cross layers, keys and values, 17 tokens, 2 heads of 16, float32
TILE_BYTES = 2 * 2 * 17 * 2 * 16 * 4
Part = int | tuple[int, int]


class Prompt:
    """Numbers are so many random text tokens, pairs are pictures of that size."""

    def __init__(self, *parts: Part, seed: int = 0, picture_seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.ids = [tiny_mllama.BOS]
        self.pictures: list[Image.Image] = []
        self.pixels: dict[bytes, np.ndarray] = {}
        images = []
        for part in parts:
            if isinstance(part, int):
                self.ids += rng.integers(0, tiny_mllama.NUM_TEXT_TOKENS, part).tolist()
                continue
            picture = oracle.picture(*part, seed=picture_seed + len(images))
            tiles, grid = mllama_oracle.tiles(MODEL(), picture)
            digest = hashlib.blake2b(tiles.tobytes(), digest_size=32).digest()
            images.append(ImageRef(digest, len(self.ids), 1, grid))
            self.pictures.append(picture)
            self.pixels[digest] = tiles
            self.ids.append(tiny_mllama.IMAGE)
        self.images = tuple(images)

    @functools.cached_property
    def truth(self) -> tuple[list[int], torch.Tensor]:
        """The judge's greedy answer, and its log-probabilities at each step [NEW_TOKENS, vocab]."""
        answer = mllama_oracle.greedy(MODEL(), self.ids, self.pictures, NEW_TOKENS)
        logprobs = mllama_oracle.logprobs(MODEL(), [*self.ids, *answer[:-1]], self.pictures)
        return answer, logprobs[len(self.ids) - 1 :]

    def then(self, ids: Sequence[int]) -> Prompt:
        """This prompt with more text."""
        other = Prompt()
        other.__dict__ |= {k: v for k, v in self.__dict__.items() if k != "truth"}
        other.ids = [*self.ids, *ids]
        return other


@functools.cache
def make(*parts: Part, seed: int = 0, picture_seed: int = 0) -> Prompt:
    return Prompt(*parts, seed=seed, picture_seed=picture_seed)


SHAPES: dict[str, Prompt] = {
    name: make(*[sizes.pop(0) if part == "i" else int(part) for part in parts])
    for name, (original, parts) in PROMPTS.items()
    for sizes in [list(original)]
}


class Answer:
    def __init__(self) -> None:
        self.ids: list[int] = []
        self.logprobs: list[Any] = []
        self.reason: FinishReason | None = None
        self.num_cached = 0


class Driver:
    """An `EngineCore`, and a client that answers its questions for pixels."""

    def __init__(self, **settings: Any) -> None:
        config = EngineConfig(**{"model": str(MODEL()), "device": "cpu", "max_total_tokens": 4096, **settings})
        self.core: EngineCore = build_core(config, MODEL(), lambda progress: None)[0]
        self.pixels: dict[bytes, np.ndarray] = {}
        self.answers: dict[tuple[str, int], Answer] = {}

    @property
    def num_encodes(self) -> int:
        return self.core.stats.images_encoded

    def add(self, prompt: Prompt, name: str, sampling: SamplingParams = GREEDY, salt: bytes = b"") -> None:
        self.pixels |= prompt.pixels
        self.answers |= {(name, index): Answer() for index in range(sampling.n)}
        ids = ids_to_bytes(prompt.ids)
        self.core.add(
            EngineRequest(request_id=name, input_ids=ids, sampling=sampling, images=prompt.images, cache_salt=salt)
        )

    def step(self) -> None:
        for event in self.core.step():
            if isinstance(event, NeedPixels):
                for digest in event.digests:
                    self.core.put_pixels(digest, Pixels(self.pixels[digest]))
            else:
                self._receive(event)
        self.core.scheduler.vision_cache.check_integrity()

    def _receive(self, event: TokenEvent) -> None:
        assert event.error is None, event.error
        answer = self.answers[event.request_id, event.index]
        answer.ids += event.token_ids
        answer.logprobs += event.logprobs or []
        answer.reason = event.finish_reason
        answer.num_cached = event.num_cached_tokens

    def run(self, between: Callable[[], None] = lambda: None) -> None:
        for _ in range(3000):
            if self.core.idle:
                self.core.scheduler.assert_idle()
                return
            self.step()
            between()
        raise AssertionError("no end in sight")

    def ask(self, prompt: Prompt, sampling: SamplingParams = GREEDY, salt: bytes = b"") -> Answer:
        name = f"ask-{len(self.answers)}"
        self.add(prompt, name, sampling, salt)
        self.run()
        return self.answers[name, 0]


def check(answer: Answer, prompt: Prompt) -> None:
    ids, logprobs = prompt.truth
    assert answer.ids == ids
    assert answer.reason is FinishReason.LENGTH
    for step, given in enumerate(answer.logprobs):
        for token, value in ((given.token_id, given.logprob), *given.top):
            assert abs(value - logprobs[step, token].item()) < 2e-4


salts = (f"run {i}".encode() for i in range(10**9))


@pytest.fixture(scope="module")
def driver() -> Driver:
    return Driver()


@pytest.mark.parametrize("shape", SHAPES)
def test_alone(driver: Driver, shape: str) -> None:
    check(driver.ask(SHAPES[shape], salt=next(salts)), SHAPES[shape])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17])
def test_prefill_in_chunks_with_strangers(size: int) -> None:
    """Requests with and without pictures share steps of few tokens, so chunks begin and end anywhere."""
    driver = Driver(chunked_prefill_size=size)
    shapes = ["text", "three, two of them adjacent", "turns", "picture at the end"]
    for shape in shapes:
        driver.add(SHAPES[shape], shape)
        driver.step()
    driver.add(make(7, THREE, picture_seed=60), "stranger", SamplingParams(temperature=1.0, seed=1, n=2, max_tokens=9))
    driver.run()
    for shape in shapes:
        check(driver.answers[shape, 0], SHAPES[shape])


def test_aborts_among_strangers(driver: Driver) -> None:
    salt = next(salts)
    for i, shape in enumerate(SHAPES):
        sampling = SamplingParams(temperature=1.0, seed=i, n=2, max_tokens=20)
        driver.add(make(5, TWO, i, ONE, seed=50 + i, picture_seed=70 + i), f"stranger {i}", sampling)
        driver.add(SHAPES[shape], f"among, {shape}", salt=salt)
        driver.step()
        if i > 2:
            driver.core.abort(f"stranger {i - 2}")
    driver.run()
    for shape in SHAPES:
        check(driver.answers[f"among, {shape}", 0], SHAPES[shape])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_second_request_encodes_nothing(shape: str) -> None:
    driver = Driver()
    prompt = SHAPES[shape]
    first = driver.ask(prompt)
    encoded, kept = driver.num_encodes, driver.core.scheduler.vision_cache.num_bytes
    again = driver.ask(prompt)
    assert (first.num_cached, again.num_cached) == (0, (len(prompt.ids) - 1) // 16 * 16)
    assert driver.num_encodes == encoded == len({image.digest for image in prompt.images})
    tiles = {image.digest: image.grid[1] * image.grid[2] for image in prompt.images}
    assert driver.core.scheduler.vision_cache.num_bytes == kept == sum(tiles.values()) * TILE_BYTES
    values = [driver.core.scheduler.vision_cache.get(digest) for digest in tiles]
    assert sum(value.nbytes for value in values) == kept
    check(first, prompt)
    check(again, prompt)


def test_the_picture_is_needed_behind_its_cached_placeholder() -> None:
    """The prefix cache covers the placeholder, but the vision cache has dropped the picture: it is asked for again."""
    driver = Driver()
    prompt = make(3, FOUR, 30)
    driver.ask(prompt)
    assert driver.core.scheduler.vision_cache.clear() == 1
    answer = driver.ask(prompt.then([5, 6, 7]))
    assert answer.num_cached == (len(prompt.ids)) // 16 * 16 > 4
    assert driver.num_encodes == 2
    check(answer, prompt.then([5, 6, 7]))


def test_a_conversation() -> None:
    """The second turn is the first with more text and another picture; only that one is encoded."""
    driver = Driver()
    driver.ask(make(9, TWO, 30))
    second = make(9, TWO, 30, 8, THREE, 4)
    answer = driver.ask(second)
    assert answer.num_cached == 32
    assert driver.num_encodes == 2
    check(answer, second)


def test_text_before_a_picture_is_shared_whatever_the_picture(driver: Driver) -> None:
    salt = next(salts)
    one, other = make(40, TWO, 9), make(40, FOUR, 9, picture_seed=31)
    driver.ask(one, salt=salt)
    answer = driver.ask(other, salt=salt)
    assert answer.num_cached == 32
    check(answer, other)


def test_another_picture_behind_the_same_ids(driver: Driver) -> None:
    salt = next(salts)
    one, other = make(2, ONE, 40), make(2, ONE, 40, picture_seed=31)
    assert one.ids == other.ids
    assert one.truth[0] != other.truth[0]
    driver.ask(one, salt=salt)
    answer = driver.ask(other, salt=salt)
    assert answer.num_cached == 0
    check(answer, other)


@pytest.mark.parametrize("radix", [True, False], ids=["prefix cache", "no prefix cache"])
def test_retracted_at_every_step(radix: bool) -> None:
    driver = Driver(disable_radix_cache=not radix, chunked_prefill_size=11)
    prompt = SHAPES["three, two of them adjacent"]
    for at in range(1, 12):
        steps = 0

        def retract(at: int = at) -> None:
            nonlocal steps
            steps += 1
            if steps == at and driver.core.scheduler.running:
                driver.core.scheduler.retract(driver.core.scheduler.running[0])
                assert driver.core.scheduler.vision_cache.num_pinned == 0

        driver.add(prompt, f"retract {at}", salt=next(salts))
        driver.run(retract)
        check(driver.answers[f"retract {at}", 0], prompt)
    assert driver.core.snapshot().retractions > 5


def test_retraction_when_memory_runs_out() -> None:
    driver = Driver(max_total_tokens=176, context_length=160)
    for i in range(3):
        driver.add(make(14 + i, ONE, seed=90 + i), f"grows {i}", SamplingParams(max_tokens=60, ignore_eos=True))
    for shape in ("turns", "two adjacent", "text"):
        driver.add(SHAPES[shape], shape)
    driver.run()
    assert driver.core.snapshot().retractions > 0
    for shape in ("turns", "two adjacent", "text"):
        check(driver.answers[shape, 0], SHAPES[shape])


def test_choices_share_the_picture(driver: Driver) -> None:
    prompt, encoded = SHAPES["four tiles"], driver.num_encodes
    driver.add(
        prompt, "choices", SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, n=3), next(salts)
    )
    driver.run()
    assert [driver.answers["choices", i].ids for i in range(3)] == [prompt.truth[0]] * 3
    assert driver.num_encodes - encoded <= 1


# ---- memory ----


def crowd() -> dict[str, Prompt]:
    """Requests with groups of pictures, some shared."""
    prompts = {str(i): make(2, TWO, ONE, 3, THREE, ONE, 2, seed=i, picture_seed=10 * i) for i in range(3)}
    return prompts | {"same": make(2, TWO, 5, ONE, TWO, 2), "large": SHAPES["the same twice"]}


@pytest.mark.parametrize("tiles", [0, 1, 3, 5, 6])
def test_budgets_that_hold_few_tiles(tiles: int) -> None:
    """Groups larger than the budget are guests, and no two requests wait for each other's pictures."""
    driver = Driver(vision_cache_gb=tiles * TILE_BYTES / 2**30, chunked_prefill_size=4)
    for name, prompt in crowd().items():
        driver.add(prompt, name)
    driver.run()
    for name, prompt in crowd().items():
        check(driver.answers[name, 0], prompt)


def test_pictures_of_a_group_held_one_by_one_would_wait_for_ever() -> None:
    """The mutation that the test above must notice."""
    driver = Driver(vision_cache_gb=3 * TILE_BYTES / 2**30, chunked_prefill_size=4)

    def singly(images: Sequence[ImageRef], start: int, end: int) -> list[tuple[ImageRef, ...]]:
        return [(image,) for group in beside_text(images, start, end) for image in group]

    driver.core.scheduler._needs = singly
    for name, prompt in crowd().items():
        driver.add(prompt, name)
    with pytest.raises(AssertionError, match="no end in sight"):
        driver.run()


def held_while_decoding(needs: Any = None) -> list[int]:
    """How many pictures are held after each step, when all others are dropped after each."""
    driver = Driver()
    if needs is not None:
        driver.core.scheduler._needs = needs
    prompt = make(3, ONE, 4, TWO, 2)
    cache = driver.core.scheduler.vision_cache
    pinned = []

    def look() -> None:
        cache.clear()
        pinned.append(cache.num_pinned)
        assert len(cache) == cache.num_pinned

    driver.add(prompt, "held")
    driver.run(look)
    check(driver.answers["held", 0], prompt)
    return pinned


def test_a_picture_is_held_while_its_rows_are_decoded() -> None:
    # first it is asked for, at last it is let go
    assert held_while_decoding() == [0, *[1] * (NEW_TOKENS - 1), 0]


def test_a_picture_let_go_with_its_placeholder_is_missed() -> None:
    """The mutation: what is right for pictures in the text."""
    with pytest.raises(AssertionError, match="KeyError"):
        held_while_decoding(in_text)


VIEW_MUTATIONS: dict[str, Callable[[Sequence[ImageRef], View], View]] = {
    "only the newest picture": lambda images, view: view._replace(images=view.images[-1:]),
    "every picture so far": lambda images, view: view._replace(images=tuple(images)),
    "the placeholder sees nothing": lambda images, view: view._replace(start=view.start + 1),
}


@pytest.mark.parametrize("mutation", VIEW_MUTATIONS)
def test_wrong_views_show(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = make(3, ONE, 9, FOUR, TWO, 9)
    prompt.truth  # noqa: B018 (before the mutation)

    def mutated(images: Sequence[ImageRef], start: int, end: int) -> list[View]:
        begun = [image for image in images if image.offset < end]
        return [VIEW_MUTATIONS[mutation](begun, view) for view in views(images, start, end)]

    monkeypatch.setattr(runner, "views", mutated)
    with pytest.raises(AssertionError):
        check(Driver().ask(prompt), prompt)


# ---- CUDA graphs: what they compute, launch by launch in Triton's interpreter ----


def as_graphs_compute(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> list[GraphKey]:
    """The driver's steps, where they have a graph, as those compute them. Returns which these were."""
    backend = pytest.importorskip("sightline.attention.triton", reason="no triton on this machine").TritonBackend()
    executor = driver.core.runner.executor
    with monkeypatch.context() as patch:
        patch.setattr(executor, "backend", backend)
        graphs = executor.new_graphs(GraphSizes(max_batch=8, max_running=8, max_mixed=16, max_pages=16))
    ran: list[GraphKey] = []
    monkeypatch.setattr(graphs, "_capture", ran.append)
    monkeypatch.setattr(executor, "graphs", graphs)
    return ran


def test_graphs_of_steps_in_which_rows_see_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that see none, one, two and three pictures share steps; rows go, and padding takes their places."""
    driver = Driver()
    ran = as_graphs_compute(driver, monkeypatch)
    shapes = ["text", "one tile", "two adjacent", "three, two of them adjacent", "turns"]
    for i, shape in enumerate(shapes):
        driver.add(SHAPES[shape], shape)
        if i == 3:
            for _ in range(6):
                driver.step()
    driver.run()
    for shape in shapes:
        check(driver.answers[shape, 0], SHAPES[shape])
    assert {key.tokens for key in ran if key.sees} == {1, 4}


def test_a_row_that_sees_more_pictures_than_a_graph_has_places_for(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    ran = as_graphs_compute(driver, monkeypatch)
    eight, nine = (make(3, *[ONE] * n, 4) for n in (8, 9))
    check(driver.ask(nine), nine)
    assert not any(key.sees for key in ran)
    check(driver.ask(eight), eight)
    assert {key for key in ran if key.sees} == {GraphKey(1, sees=True)}


# ---- penalties: the placeholder is an id that the output head does not have ----


def test_penalties_and_biases_with_a_picture(driver: Driver) -> None:
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=6,
        ignore_eos=True,
        repetition_penalty=1.3,
        frequency_penalty=0.5,
        logit_bias={tiny_mllama.IMAGE: 5.0, 7: 1.0},
        stop_token_ids=(tiny_mllama.IMAGE,),
        min_tokens=3,
    )
    assert len(driver.ask(SHAPES["one tile"], sampling).ids) == 6


# ---- the offline engine: files in, text out ----


def test_offline_engine_greedy_equals_the_judge() -> None:
    pictures = [oracle.picture(*size, seed=i) for i, size in enumerate((TWO, (200, 300)))]
    with Engine(MODEL(), device="cpu", max_total_tokens=4096) as engine:
        content: list[Any] = [{"type": "text", "text": "What is "}]
        for picture in pictures:
            file = io.BytesIO()
            picture.save(file, "PNG")
            content += [{"type": "image", "image": file.getvalue()}, {"type": "text", "text": " and this?"}]
        prompts: list[Any] = [
            ([{"role": "user", "content": content}], pictures),
            ([{"role": "user", "content": "How many shapes are there?"}], []),
        ]
        sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0)
        answers = engine.chat([messages for messages, _ in prompts], sampling)
        for answer, (messages, own) in zip(answers, prompts, strict=True):
            assert answer.num_image_tokens == len(own)
            prompt = engine._run(engine.pipeline.chat(messages))
            ids = prompt.input_ids.tolist()
            assert ids.count(tiny_mllama.BOS) == 1
            assert ids.count(tiny_mllama.IMAGE) == len(own)
            expected = mllama_oracle.greedy(MODEL(), ids, own, NEW_TOKENS)
            assert [token.token_id for token in answer.outputs[0].logprobs] == expected
