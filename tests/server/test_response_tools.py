"""Tools in responses, as OpenAI's own client sees them: flat tools, call items, and an agent's loop without a memory."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from tests.server.conftest import data_url, picture

WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a city",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
TIME = {"type": "function", "name": "time", "description": "The time of day", "parameters": None, "strict": None}
QUESTION = {
    "role": "user",
    "content": [
        {"type": "input_text", "text": "How is the weather?"},
        {"type": "input_image", "image_url": data_url(picture(3)), "detail": "auto"},
    ],
}
FORCED: dict[str, Any] = {
    "model": "tiny",
    "input": [QUESTION],
    "tools": [WEATHER, TIME],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "max_output_tokens": 400,
}


@pytest.fixture(scope="module")
def client(tiny_server: str) -> OpenAI:
    return OpenAI(base_url=f"{tiny_server}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.mark.parametrize("seed", range(3))
def test_a_call_that_must_come_and_the_same_streamed(client: OpenAI, seed: int) -> None:
    given = {**FORCED, "extra_body": {"seed": seed}}
    answer = client.responses.create(**given)
    assert answer.status == "completed"
    assert (answer.tool_choice, answer.parallel_tool_calls, len(answer.tools)) == ("required", False, 2)
    (call,) = answer.output
    assert call.type == "function_call"
    assert call.name in ("weather", "time")
    assert call.name == "time" or json.loads(call.arguments)["city"] in ("Paris", "Rome")
    events = list(client.responses.create(**given, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = [event for event in events if event.type == "response.function_call_arguments.delta"]
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        *["function_call_arguments.delta"] * len(deltas),
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    opened, done = events[2].item, events[-2].item
    assert (opened.name, opened.arguments, opened.call_id) == (call.name, "", done.call_id)
    assert (done.name, done.arguments) == (call.name, call.arguments)
    assert "".join(event.delta for event in deltas) == events[-3].arguments == call.arguments
    assert {event.item_id for event in (*deltas, events[-3])} == {opened.id} == {done.id}
    assert events[-1].response.output[0] == done


def test_several_calls_are_several_items(client: OpenAI) -> None:
    for seed in range(20):
        extra = {"seed": seed, "temperature": 2.0}
        answer = client.responses.create(**{**FORCED, "parallel_tool_calls": True}, extra_body=extra)
        calls = [item for item in answer.output if item.type == "function_call"]
        if len(calls) > 1:
            assert len({call.call_id for call in calls}) == len({call.id for call in calls}) == len(calls)
            return
    pytest.fail("never two calls")


def test_a_call_that_is_cut_off_is_incomplete(client: OpenAI) -> None:
    """Its item has what came of the arguments, streamed and not."""
    name = "x" * 60
    schema = {"type": "object", "properties": {name: {"enum": ["y" * 60]}}, "required": [name]}
    given = {**FORCED, "tools": [{**TIME, "parameters": {**schema, "additionalProperties": False}}]}
    given |= {"max_output_tokens": 100, "temperature": 0}
    whole = client.responses.create(**given)
    events = list(client.responses.create(**given, stream=True))
    # A server that falls behind sends several tokens as one, but not all of so many.
    assert sum(event.type == "response.function_call_arguments.delta" for event in events) > 1
    for answer in (whole, events[-1].response):
        assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        (call,) = answer.output
        assert (call.type, call.name, call.status) == ("function_call", "time", "incomplete")
        assert call.arguments == whole.output[0].arguments
        assert re.match(r'\{\s*"xxx', call.arguments)
        with pytest.raises(ValueError, match=r"."):
            json.loads(call.arguments)
    assert [e.type.removeprefix("response.") for e in events[-3:]] == [
        "function_call_arguments.done",
        "output_item.done",
        "incomplete",
    ]


def test_a_named_and_an_allowed_tool(client: OpenAI) -> None:
    named = client.responses.create(**{**FORCED, "tool_choice": {"type": "function", "name": "time"}})
    assert [(item.name, json.loads(item.arguments)) for item in named.output] == [("time", {})]
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]}
    answer = client.responses.create(**{**FORCED, "tool_choice": allowed})
    assert {item.name for item in answer.output} == {"weather"}


def test_an_agents_loop_needs_no_memory(client: OpenAI) -> None:
    """What came out goes in again, with the tool's answer, text or a picture."""
    first = client.responses.create(**FORCED)
    items: list[Any] = [QUESTION, *(item.model_dump(exclude_none=True) for item in first.output)]
    result = {"type": "function_call_output", "call_id": first.output[0].call_id, "output": "17 degrees"}
    given = {"model": "tiny", "tools": [WEATHER, TIME], "max_output_tokens": 8, "temperature": 0}
    second = client.responses.create(**given, input=[*items, result])
    assert second.output[0].type == "message"
    assert second.usage.input_tokens > first.usage.input_tokens
    # The whole is a conversation that chat completions can have, too.
    call = first.output[0]
    function = {"name": call.name, "arguments": call.arguments}
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "How is the weather?"},
                {"type": "image_url", "image_url": {"url": data_url(picture(3))}},
            ],
        },
        {"role": "assistant", "tool_calls": [{"id": call.call_id, "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": call.call_id, "content": "17 degrees"},
    ]
    tools = [{"type": "function", "function": {k: v for k, v in t.items() if k != "type"}} for t in (WEATHER, TIME)]
    chat = client.chat.completions.create(model="tiny", messages=messages, tools=tools, max_tokens=8, temperature=0)
    assert chat.usage.prompt_tokens == second.usage.input_tokens
    assert chat.choices[0].message.content == second.output_text


def test_an_answer_without_calls_is_a_message(client: OpenAI) -> None:
    given = {"model": "tiny", "input": "hello", "tools": [WEATHER], "max_output_tokens": 12, "temperature": 0}
    answer = client.responses.create(**given)
    assert answer.output_text
    events = list(client.responses.create(**given, stream=True))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == answer.output_text
    assert client.responses.create(**{**given, "tool_choice": "none"}).output[0].type == "message"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "storm"}}, "tool_choice.name"),
        ({"tools": [WEATHER], "tool_choice": "required", "text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"max_tool_calls": 3}, "max_tool_calls"),
        ({"input": [QUESTION, {"type": "function_call", "name": "weather", "arguments": "{}"}]}, "input[1].call_id"),
        ({"input": [QUESTION, {"type": "function_call_output", "call_id": "c", "output": 3}]}, "input[1].output"),
        ({"input": [QUESTION, {"type": "web_search_call"}]}, "input[1].type"),
        (
            {
                "input": [
                    {"type": "function_call", "call_id": c, "name": "f", "arguments": a}
                    for c, a in (("a", "{}"), ("b", "{"))
                ]
            },
            "input[1].arguments",
        ),
    ],
)
def test_what_is_wrong_is_a_400_that_names_it(client: OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.responses.create(**{"model": "tiny", "input": "x", **fields})
    assert caught.value.param == param
