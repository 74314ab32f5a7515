"""An engine of two ranks says what one of a single rank says, for every family and whatever it does meanwhile."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
import torch

from sightline import Engine, SamplingParams
from sightline.config import EngineConfig
from sightline.engine import rank_loop, workers
from sightline.engine import rank_messages as messages
from sightline.engine.cuda_graph import HostStep
from sightline.engine.executor import StepPlan
from sightline.engine.factory import check_group
from sightline.engine.workers import divide
from sightline.errors import DeviceError, RankError, SettingError
from sightline.parallel import Group
from sightline.prompt.pipeline import PromptPipeline
from sightline.types import FinishReason, ImageRef, Pixels, TokenEvent
from tests import oracle, tiny, tiny_llava, tiny_mllama
from tests.engine.test_exactness import Driver, Prompt, make
from tests.models.test_qwen2_5_vl import tiny_model as qwen2_5_vl

TOLERANCE = 1e-4
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=4)
SCORING = msgspec.structs.replace(GREEDY, prompt_logprobs=4)


class Family(NamedTuple):
    """A checkpoint, and how many of the vision cache's bytes there are: for all pictures, or for two of three."""

    make: Callable[[], Path]
    vision_cache: int = 1 << 28


FAMILIES = {
    "Qwen2-VL": Family(tiny.qwen2_vl),
    "Qwen2.5-VL, tied": Family(functools.partial(qwen2_5_vl, tied=True), 9_000),
    "Llama 3.2 Vision": Family(functools.partial(tiny_mllama.mllama, shards=2)),
    "LLaVA 1.5, authors' layout": Family(
        functools.partial(tiny_llava.llava, "llava", layout="original", tower="beside", pad=True)
    ),
    "LLaVA-NeXT, Mistral": Family(functools.partial(tiny_llava.llava, "next", text="mistral")),
    "OneVision": Family(functools.partial(tiny_llava.llava, "onevision", text="qwen2"), 40_000),
    # one key head for both ranks, a bias that must be added once, and a vocabulary that does not divide
    "Llama": Family(
        functools.partial(
            tiny_llava.text,
            "llama",
            overrides={"num_key_value_heads": 1, "attention_bias": True, "vocab_size": tiny.VOCAB_SIZE + 1},
        )
    ),
    "Qwen2, tied": Family(functools.partial(tiny_llava.text, "qwen2", tied=True)),
}


def prompts(model_dir: Path) -> dict[str, Prompt]:
    """Without a picture, with one, and with several between words."""

    def user(*parts: Any) -> list[dict[str, Any]]:
        content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
        return [{"role": "user", "content": content}]

    pipeline = PromptPipeline(model_dir, allow_local=True, secret=b"1" * 32)
    talks = {"text": user("How many shapes are there?"), "more text": user("Describe the image in one sentence. " * 3)}
    if pipeline.processor is not None:
        a, b, c = (oracle.picture(w, h, seed=i) for i, (w, h) in enumerate([(100, 150), (180, 60), (90, 110)]))
        talks["one picture"] = user(a, "What is in this picture?")
        talks["two pictures"] = user("First", b, "then", c, "which is red?")

    async def prepared(messages: list[dict[str, Any]]) -> Prompt:
        prompt = await pipeline.chat(messages)
        pixels = {digest: (await pipeline.decode(p)).array.copy() for digest, p in prompt.pictures.items()}
        return Prompt(
            prompt.input_ids.tolist(),
            [],
            [pixels[image.digest] for image in prompt.images],
            prompt.images,
            prompt.positions,
            prompt.position_delta,
        )

    return {name: asyncio.run(prepared(messages)) for name, messages in talks.items()}


@contextmanager
def driver(model_dir: Path, size: int, run_dir: Path, **settings: Any) -> Iterator[Driver]:
    engine = Driver(model_dir, run_dir, tp_size=size, num_threads=1, **settings)
    try:
        yield engine
    finally:
        engine.core.runner.close()
        engine.core.runner.executor.group.close()


def everything(engine: Driver, asked: dict[str, Prompt]) -> dict[str, Any]:
    """What is answered one after the other into a running batch, again from the caches, in chunks, with retractions, among strangers
    that go away, and with steps that are launched before the tokens of the last one are known, as on a GPU."""
    said: dict[str, Any] = {}

    def run(
        way: str, salt: bytes, between: Callable[[], None] = lambda: None, sampling: SamplingParams = GREEDY
    ) -> None:
        for name, prompt in asked.items():
            engine.add(prompt, f"{way}, {name}", sampling, salt)
            engine.step()
        engine.run(between)
        for name in asked:
            answer = engine.answers[f"{way}, {name}", 0]
            said[f"{way}, {name}"] = (answer.ids, answer.num_cached, (answer.prompt_logprobs or []) + answer.logprobs)
            assert len(answer.prompt_logprobs or ()) == (0 if sampling is GREEDY else len(asked[name].ids) - 1)

    run("cold", b"a")
    run("cached", b"a")
    engine.limit_step(7)
    run("in chunks", b"b")
    run("in chunks, scored", b"b", sampling=SCORING)
    steps = 0

    def retract() -> None:
        nonlocal steps
        steps += 1
        if steps % 5 == 0 and engine.core.scheduler.running:
            engine.core.scheduler.retract(engine.core.scheduler.running[-1])

    engine.limit_step(40)
    run("retracted", b"c", retract)
    for i, prompt in enumerate(asked.values()):
        engine.add(prompt, f"stranger {i}", SamplingParams(temperature=1.0, seed=i, max_tokens=20), b"d")
        engine.step()

    def go() -> None:
        for i in range(0, len(asked), 2):
            engine.core.abort(f"stranger {i}")

    run("among strangers", b"e", go)
    assert engine.core.snapshot().retractions > 0
    engine.core.overlap = True
    run("overlapped", b"f")
    engine.core.overlap = False
    return said


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_say_what_one_says(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owners: list[int] = []

    def dividing(sizes: list[int], count: int) -> list[int]:
        owners.extend(shares := divide(sizes, count))
        return shares

    monkeypatch.setattr(workers, "divide", dividing)
    model_dir, settings = FAMILIES[family].make(), {"vision_cache_gb": FAMILIES[family].vision_cache / 2**30}
    asked = prompts(model_dir)
    with driver(model_dir, 1, tmp_path, **settings) as engine:
        expected = everything(engine, asked)
        per_token = engine.core.runner.executor.model.kv_spec
    with driver(model_dir, 2, tmp_path, **settings) as engine:
        said = everything(engine, asked)
        own, cache = engine.core.runner.executor.model.kv_spec, engine.core.scheduler.vision_cache
        assert bool(cache.evictions) == (FAMILIES[family].vision_cache < 1 << 28)
        assert own.num_kv_heads == max(1, per_token.num_kv_heads // 2)
    assert said.keys() == expected.keys()
    for name, (ids, num_cached, logprobs) in said.items():
        assert (ids, num_cached) == expected[name][:2], name
        for ours, theirs in zip(logprobs, expected[name][2], strict=True):
            np.testing.assert_allclose(
                [ours.logprob, *(value for _, value in ours.top)],
                [theirs.logprob, *(value for _, value in theirs.top)],
                atol=TOLERANCE,
                rtol=0,
                err_msg=name,
            )
    assert any(num_cached for _, num_cached, _ in said.values())
    assert set(owners) == ({0, 1} if "one picture" in asked else set())


def test_what_fails_on_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture ends only its request, also where another rank finds out (the larger one is rank 0's, the broken one the other's).
    A step leaves the others in the middle of it, and ends the engine."""
    good, broken = make(3, (300, 200), 20), make(9, (90, 60), 12)
    with driver(tiny.qwen2_vl(), 2, tmp_path) as engine:
        core = engine.core
        ends = {}
        for name, prompt in (("good", good), ("broken", broken)):
            core.add(prompt.request(name))
            for image, pixels in zip(prompt.images, prompt.pixels, strict=True):
                core.put_pixels(image.digest, Pixels(pixels if name == "good" else pixels[:28]))
        while not core.idle:
            ends |= {e.request_id: e for e in core.step() if isinstance(e, TokenEvent) and e.finish_reason}
        assert ends["good"].finish_reason is FinishReason.LENGTH
        assert ends["broken"].finish_reason is FinishReason.ERROR
        assert "do not fit grid" in str(ends["broken"].error)
        # the ranks are still in step
        assert engine.ask(broken).reason is FinishReason.LENGTH

        def fail(*args: object) -> None:
            raise ValueError("no")

        monkeypatch.setattr(core.runner.executor, "run", fail)
        with pytest.raises(RankError, match="ValueError: no"):
            engine.ask(good)


@pytest.mark.parametrize("late", [False, True], ids=["at once", "after sums"])
def test_a_step_that_fails_alike_on_all_ranks_ends_only_the_request_that_breaks_it(
    late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that no rank can follow: of a picture that none has, or of more rows than it has, which is found out when the embeddings
    have been summed."""
    good, broken = make(30), make(9, (90, 60), 12)
    with driver(tiny.qwen2_vl(), 2, tmp_path) as engine:
        expected = engine.ask(good, GREEDY, b"a").ids
        core, group = engine.core, engine.core.runner.executor.group
        plan = core.runner._plan

        def wrong(*args: Any) -> StepPlan:
            made = plan(*args)
            parts = [p._replace(end=p.end + 1) if late else p._replace(digest=b"?") for p in made.pictures]
            return made._replace(pictures=parts)

        monkeypatch.setattr(core.runner, "_plan", wrong)
        ends = {}
        for name, prompt in (("first", good), ("broken", broken), ("last", good)):
            core.add(prompt.request(name, GREEDY, name.encode()))
        for image, pixels in zip(broken.images, broken.pixels, strict=True):
            core.put_pixels(image.digest, Pixels(pixels))
        tokens: dict[str, list[int]] = {"first": [], "broken": [], "last": []}
        before = group.num_collectives
        while not core.idle:
            for event in core.step():
                assert isinstance(event, TokenEvent)
                tokens[event.request_id] += event.token_ids
                if event.finish_reason:
                    ends[event.request_id] = event.finish_reason
        assert group.num_collectives > before
        assert ends == {"first": FinishReason.LENGTH, "broken": FinishReason.ERROR, "last": FinishReason.LENGTH}
        assert (tokens["first"], tokens["last"]) == (expected, expected)


@pytest.mark.parametrize(("came", "in_step"), [([5, 5], True), ([5, 4], False), ([6, 5], False), ([5, None], False)])
def test_ranks_are_in_step_when_all_have_begun_the_same_collectives(came: list[int | None], in_step: bool) -> None:
    """GPUs do not wait for each other where a collective is begun, so other counts can be answered. None: no answer."""
    rank_0: Any = object.__new__(workers.Workers)
    rank_0._group = SimpleNamespace(num_collectives=5)
    told: list[bytes] = []
    rank_0._sockets = [
        SimpleNamespace(
            send=told.append,
            poll=lambda milliseconds, count=count: count is not None,
            recv=lambda count=count: messages.encode(messages.Progress(count)),
        )
        for count in came
    ]
    assert rank_0._in_step() == in_step
    assert [messages.decode_to_rank(data) for data in told] == [messages.TellProgress()] * 2


def test_pictures_are_divided_by_their_size() -> None:
    assert divide([5, 9, 4, 1], 2) == [1, 0, 1, 0]
    assert divide([7], 4) == [0]
    assert divide([2, 2, 2], 3) == [0, 1, 2]


def test_a_rank_keeps_features_until_it_is_told_to_forget_them() -> None:
    executor: Any = SimpleNamespace(group=Group(1, 2), run=lambda plan, newest: None, encoder=_Ones(), features=None)
    answers: list[bytes] = []
    loop = rank_loop._Loop(executor, SimpleNamespace(send=answers.append))  # type: ignore[arg-type]
    images = [ImageRef(bytes([i]) * 32, 0, 2, (1, 2, 4)) for i in range(3)]

    def tell(message: Any, *frames: np.ndarray) -> None:
        loop._do(messages.encode(message), [frame.data for frame in frames])

    tell(
        messages.Encode([], 1, images, [0, 1, 1], [(2, 2), (2, 3)], [(), ()]),
        np.zeros(4, np.uint8),
        np.ones(6, np.uint8),
    )
    tell(messages.EncodePart(1))
    tell(messages.EncodeRest(1))
    assert [messages.decode_from_rank(answer) for answer in answers] == [messages.Encoded()]
    tell(messages.EndEncoding(1, exchange=True))
    assert {digest[0]: value for digest, value in loop._features.items()} == {0: "other", 1: (2, 2), 2: (2, 3)}
    host = HostStep(*[np.zeros(1, np.int64)] * 4, [1], [1], np.zeros((1, 1), np.int32), [0])
    tell(messages.Forward([images[0].digest, images[2].digest], StepPlan(host._replace(places=[-1]), 0, [], [], [])))
    assert list(loop._features) == [images[1].digest]
    assert not loop._encodings


class _Ones:
    """An encoder whose features are the pixels' shapes."""

    new_pixels = staticmethod(np.empty)

    def encoding(self, images: Any, pixels: Any) -> Any:
        yield 1.0
        yield 1.0
        return [p.array.shape for p in pixels]

    def exchange(self, images: Any, owners: Any, encoded: Any) -> Any:
        own = iter(encoded)
        return [next(own) if owner == 1 else "other" for owner in owners]


def test_the_offline_engine_has_ranks_too() -> None:
    """In processes of their own, with random weights that all ranks agree about."""
    with Engine(tiny.qwen2_vl(), device="cpu", tp_size=2, num_threads=1, load_format="dummy") as engine:
        answer = engine.generate("What", sampling=SamplingParams(max_tokens=5, ignore_eos=True))
        assert not isinstance(answer, list)
        assert len(answer.outputs[0].token_ids) == 5


def test_ranks_that_found_other_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = workers.Workers.connect
    monkeypatch.setattr(workers.Workers, "connect", lambda self, device: connect(self, torch.device("meta")))
    with pytest.raises(DeviceError, match="rank 1 found cpu, and rank 0 meta"), driver(tiny.qwen2_vl(), 2, tmp_path):
        pass


def test_an_engine_is_node_0() -> None:
    with pytest.raises(SettingError, match="an Engine is node 0"):
        Engine(tiny.qwen2_vl(), tp_size=2, nnodes=2, node_rank=1)
    with pytest.raises(SettingError, match="--nnodes 2: --tp-size 1 cannot be divided"):
        Engine(tiny.qwen2_vl(), nnodes=2)


@pytest.mark.parametrize("size", [3, 8])
def test_a_size_that_does_not_divide_the_model(size: int) -> None:
    with pytest.raises(SettingError, match=rf"--tp-size {size}: .* valid sizes: 1, 2, 4\."):
        check_group(EngineConfig(tp_size=size, device="cpu"), tiny.qwen2_vl())


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    check_group(EngineConfig(tp_size=2), tiny.qwen2_vl())
    with pytest.raises(DeviceError, match=r"needs 4 GPUs, and 2 can be seen .* valid sizes with those: 1, 2\."):
        check_group(EngineConfig(tp_size=4), tiny.qwen2_vl())
