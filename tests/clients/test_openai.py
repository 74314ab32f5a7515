"""openai-python beyond the brief's page: responses, completions, helpers for streams, counts, headers."""

from __future__ import annotations

from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from tests.clients.test_brief import FIRST, MODEL, QUESTION, data_url, is_first


@pytest.fixture
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="None", max_retries=0)


ITEMS = [
    {
        "role": "user",
        "content": [
            {"type": "input_text", "text": QUESTION},
            {"type": "input_image", "image_url": data_url(FIRST), "detail": "auto"},
        ],
    }
]


def test_a_response_about_a_picture(client: openai.OpenAI) -> None:
    response = client.responses.create(model=MODEL, input=ITEMS, temperature=0)  # type: ignore[arg-type]
    assert response.status == "completed"
    assert is_first(response.output_text)
    assert response.usage is not None
    counted = client.responses.input_tokens.count(model=MODEL, input=ITEMS)  # type: ignore[arg-type]
    assert counted.input_tokens == response.usage.input_tokens


def test_a_conversation_of_responses(client: openai.OpenAI) -> None:
    first = client.responses.create(model=MODEL, input=ITEMS, temperature=0)  # type: ignore[arg-type]
    question = {"role": "user", "content": "What color is the square?"}
    items = [*ITEMS, *(item.model_dump() for item in first.output), question]
    second = client.responses.create(model=MODEL, input=items, temperature=0)  # type: ignore[arg-type]
    assert "blue" in second.output_text
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(model=MODEL, input="And now?", previous_response_id=first.id)
    assert error.value.param == "previous_response_id"


def test_the_helper_for_streamed_responses(client: openai.OpenAI) -> None:
    """It checks the order of the events as it accumulates them."""
    with client.responses.stream(model=MODEL, input=ITEMS, temperature=0) as stream:  # type: ignore[arg-type]
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert is_first(final.output_text)


def test_the_helper_for_streamed_chats(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": data_url(FIRST)}}]
    messages = [{"role": "user", "content": parts}]
    options = {"include_usage": True}
    with client.chat.completions.stream(
        model=MODEL, messages=messages, temperature=0, stream_options=options
    ) as stream:  # type: ignore[arg-type]
        final = stream.until_done().get_final_completion()
    assert is_first(final.choices[0].message.content or "")
    assert final.usage is not None
    assert final.usage.completion_tokens > 0


def test_completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=4, temperature=0, echo=True, n=2)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert whole.choices[2].text.startswith("b")
    stream = client.completions.create(model=MODEL, prompt="a", max_tokens=4, temperature=0, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


def test_headers(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "hi"}]
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=messages,  # type: ignore[arg-type]
        max_tokens=1,
        extra_headers={"X-Request-Id": "mine"},
    )
    assert raw.headers["x-request-id"] == "mine"
    assert int(raw.headers["openai-processing-ms"]) >= 0
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=MODEL, messages=messages, temperature=9)  # type: ignore[arg-type]
    assert error.value.response.headers["x-should-retry"] == "false"


class Square(BaseModel):
    color: Literal["red", "green", "blue"]
    corners: Literal[3, 4]


def test_parsing_into_a_model(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": data_url(FIRST)}}]
    messages = [{"role": "user", "content": parts}]
    chat = client.chat.completions.parse(model=MODEL, messages=messages, temperature=0, response_format=Square)  # type: ignore[arg-type]
    assert isinstance(chat.choices[0].message.parsed, Square)
    response = client.responses.parse(model=MODEL, input=ITEMS, temperature=0, text_format=Square)  # type: ignore[arg-type]
    assert response.output_parsed == chat.choices[0].message.parsed
    with client.chat.completions.stream(
        model=MODEL, messages=messages, temperature=0, response_format=Square
    ) as stream:  # type: ignore[arg-type]
        assert stream.get_final_completion().choices[0].message.parsed == response.output_parsed
