"""openai-python, 2.x and 3.x."""

from __future__ import annotations

from common import BASE, DATA, MESSAGES, MODEL, QUESTION, TOOL, Paint, run, see, streamed
from openai import BadRequestError, OpenAI, pydantic_function_tool

client = OpenAI(base_url=BASE, api_key="none", max_retries=0)
ITEMS = [
    {
        "role": "user",
        "content": [
            {"type": "input_text", "text": QUESTION},
            {"type": "input_image", "image_url": f"data:image/png;base64,{DATA}", "detail": "auto"},
        ],
    }
]


def picture() -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0)
    see(answer.choices[0].message.content)
    assert answer.usage.prompt_tokens_details is not None


def streaming() -> None:
    given = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "stream_options": {"include_usage": True}}
    *chunks, last = client.chat.completions.create(**given, stream=True)
    streamed([chunk.choices[0].delta.content or "" for chunk in chunks])
    assert last.choices == []
    assert last.usage.completion_tokens > 0
    with client.chat.completions.stream(**given) as stream:
        see(stream.get_final_completion().choices[0].message.content)


def structured() -> None:
    given = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "response_format": Paint}
    parsed = client.chat.completions.parse(**given).choices[0].message.parsed
    assert isinstance(parsed, Paint)
    with client.chat.completions.stream(**given) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed


def tools() -> None:
    given = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "tool_choice": "required"}
    given |= {"tools": [pydantic_function_tool(Paint, name="paint")], "parallel_tool_calls": False, "max_tokens": 200}
    choice = client.chat.completions.parse(**given).choices[0]
    (call,) = choice.message.tool_calls
    assert isinstance(call.function.parsed_arguments, Paint)
    with client.chat.completions.stream(**given) as stream:
        (again,) = stream.get_final_completion().choices[0].message.tool_calls
    assert again.function.parsed_arguments == call.function.parsed_arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    said = choice.message.model_dump(include={"role", "tool_calls"})
    messages = [*MESSAGES, said, result]
    second = client.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL], max_tokens=20)
    assert second.choices[0].message.content


def responses() -> None:
    see(client.responses.create(model=MODEL, input=ITEMS, temperature=0).output_text)
    with client.responses.stream(model=MODEL, input=ITEMS, temperature=0) as stream:
        streamed([event.delta for event in stream if event.type == "response.output_text.delta"])
    parsed = client.responses.parse(model=MODEL, input=ITEMS, temperature=0, text_format=Paint)
    assert isinstance(parsed.output_parsed, Paint)


def errors() -> None:
    broken = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}]
    try:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": broken}])
    except BadRequestError as error:
        code = error.code
    else:
        raise AssertionError("a broken picture was taken")
    assert code == "invalid_image_format"


run(picture, streaming, structured, tools, responses, errors)
