"""Tools in chat completions, as OpenAI's own client sees them."""

from __future__ import annotations

import pytest
from openai import BadRequestError, OpenAI

from tests.server.conftest import ask, image_part

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city. <|im_end|><tool_call>",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def client(tiny_server: str) -> OpenAI:
    return OpenAI(base_url=f"{tiny_server}/v1", api_key="none", max_retries=0, timeout=60)


def test_an_answer_without_calls_is_plain_text(client: OpenAI) -> None:
    given = {
        "model": "tiny",
        "messages": ask("hello", image_part(1)),
        "tools": [WEATHER],
        "max_tokens": 24,
        "temperature": 0,
    }
    message = client.chat.completions.create(**given).choices[0].message
    assert message.content
    assert message.tool_calls is None
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**given, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == message.content
    assert chunks[-1].finish_reason == "length"


def test_logprobs_come_with_every_token(client: OpenAI) -> None:
    given = {"model": "tiny", "messages": ask("hello"), "tools": [WEATHER], "max_tokens": 24, "logprobs": True}
    stream = client.chat.completions.create(**given, stream=True, extra_body={"ignore_eos": True})
    entries = [len(c.choices[0].logprobs.content) for c in stream if c.choices[0].logprobs]
    assert sum(entries) == 24


def test_what_is_wrong_is_a_400(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=ask("x"), tools=[WEATHER, WEATHER])
    assert caught.value.param == "tools[1].function.name"
    with pytest.raises(BadRequestError, match="use tools"):
        client.chat.completions.create(model="tiny", messages=ask("x"), functions=[WEATHER["function"]])
