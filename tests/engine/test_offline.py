"""The offline Engine: one answer, many, streamed, awaited; the same core as the server's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sightline
from sightline import Engine, RequestOutput, SamplingParams
from sightline.errors import CheckpointError, ImageError, ModelNotFoundError, RequestError
from tests import tiny

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(tiny.qwen2_vl()) as engine:
        yield engine


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (90, 120, 3), dtype=np.uint8))


def messages(*parts: Any) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return [{"role": "user", "content": content}]


def test_public_names() -> None:
    assert sightline.Engine is Engine
    assert set(sightline.__all__) >= {"Engine", "RequestOutput", "SamplingParams"}
    with pytest.raises(AttributeError, match="no attribute"):
        sightline.Enginge  # noqa: B018


def test_one_answer(engine: Engine) -> None:
    output = engine.chat(messages("what is", noise(1), "?"), GREEDY)
    assert isinstance(output, RequestOutput)
    assert len(output.outputs[0].token_ids) == 6
    assert output.outputs[0].finish_reason == "length"
    assert output.num_image_tokens == 12
    assert output.text == engine.pipeline.tokenizer.decode(output.outputs[0].token_ids)


def test_many_answers_equal_single_ones(engine: Engine) -> None:
    conversations = [messages("first", noise(2)), messages("second"), messages(noise(3), noise(2), "third")]
    together = engine.chat(conversations, GREEDY)
    alone = [engine.chat(c, GREEDY) for c in conversations]
    assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in alone]
    assert len({tuple(o.outputs[0].token_ids) for o in together}) == 3


def test_stream_is_the_answer(engine: Engine) -> None:
    conversation = messages("stream", noise(4))
    deltas = list(engine.stream(conversation, GREEDY))
    assert "".join(d.text for d in deltas) == engine.chat(conversation, GREEDY).text
    assert deltas[-1].finish_reason == "length"
    assert sum(len(d.token_ids) for d in deltas) == 6


def test_stream_left_early_is_aborted(engine: Engine) -> None:
    long = SamplingParams(temperature=0.0, max_tokens=2000, ignore_eos=True)
    stream = engine.stream(messages("leave"), long)
    next(stream)
    # What a router of several engines goes by.
    assert (engine._engine.num_in_flight, engine._engine.num_begun) == (1, 1)
    stream.close()
    engine.chat(messages("after"), GREEDY)
    assert engine.stats.aborts >= 1
    assert engine.stats.pages_in_use == 0


def test_async_forms(engine: Engine) -> None:
    conversation = messages("await", noise(5))
    expected = engine.chat(conversation, GREEDY)

    async def run() -> None:
        answer = await engine.achat(conversation, GREEDY)
        assert isinstance(answer, RequestOutput)
        assert answer.text == expected.text
        texts = [d.text async for d in engine.astream(conversation, GREEDY)]
        assert "".join(texts) == expected.text
        raw = await engine.agenerate(["one", "two"], sampling=GREEDY)
        assert isinstance(raw, list)
        assert len(raw) == 2

    asyncio.run(run())


def test_raw_prompts_with_pictures(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    noise(6).save(path)
    slot = "<|vision_start|><|image_pad|><|vision_end|>"
    single = engine.generate(f"a{slot}b", [path], GREEDY)
    several = engine.generate([f"a{slot}b", "plain"], [[noise(6)], []], GREEDY)
    assert isinstance(single, RequestOutput)
    assert isinstance(several, list)
    assert several[0].outputs[0].token_ids == single.outputs[0].token_ids
    assert several[1].num_image_tokens == 0
    with pytest.raises(ValueError, match="2 prompts but 1"):
        engine.generate(["a", "b"], [[]], GREEDY)


def test_several_choices_and_logprobs(engine: Engine) -> None:
    sampling = SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=5, logprobs=2, ignore_eos=True)
    output = engine.chat(messages("choices", noise(7)), sampling)
    assert [o.index for o in output.outputs] == [0, 1, 2]
    for choice in output.outputs:
        assert choice.logprobs is not None
        assert [lp.token_id for lp in choice.logprobs] == choice.token_ids
        assert all(len(lp.top) == 2 for lp in choice.logprobs)
    again = engine.chat(messages("choices", noise(7)), sampling)
    assert [o.token_ids for o in again.outputs] == [o.token_ids for o in output.outputs]


def test_mistakes_reach_the_caller(engine: Engine) -> None:
    with pytest.raises(ImageError):
        engine.chat(messages(b"no picture"), GREEDY)
    with pytest.raises(RequestError, match="temperature"):
        engine.chat(messages("x"), SamplingParams(temperature=-1.0))
    with pytest.raises(RequestError, match="maximum context length"):
        engine.chat(messages("word " * 5000), GREEDY)
    # And the engine goes on.
    assert engine.chat(messages("x"), GREEDY).text


def test_what_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        Engine(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen2VLForConditionalGeneration"]}')
    with pytest.raises((CheckpointError, ModelNotFoundError)):
        Engine(tmp_path)


def test_closing_twice_is_harmless() -> None:
    engine = Engine(tiny.qwen2_vl())
    engine.close()
    engine.close()


def test_pictures_resized_by_the_engine_get_the_same_answers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens on a GPU, with the kernel's torch equal: the source travels, the engine makes the views."""
    pytest.importorskip("triton", reason="no triton on this machine")
    from sightline.engine import encoder
    from sightline.kernels import resize

    made: list[Any] = []
    render = encoder.render
    monkeypatch.setattr(resize, "resize_axis", resize.resize_axis_reference)
    monkeypatch.setattr(encoder, "render", lambda source, views: made.append(views) or render(source, views))
    conversation = messages("where", noise(41), noise(42), "?")
    logprobs = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=2)
    with Engine(tiny.qwen2_vl()) as other:
        assert other._engine is not None
        other._engine._device_renders = True
        answer = other.chat(conversation, logprobs)
    assert len(made) == 2
    assert answer.outputs == engine.chat(conversation, logprobs).outputs
    assert len(made) == 2
