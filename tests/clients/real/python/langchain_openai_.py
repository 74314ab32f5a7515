"""langchain-openai."""

from __future__ import annotations

from common import BASE, DATA, MODEL, QUESTION, Paint, run, see, streamed
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

llm = ChatOpenAI(base_url=BASE, api_key="none", model=MODEL, temperature=0, max_tokens=200, max_retries=0)
PICTURE = {"type": "image", "base64": DATA, "mime_type": "image/png"}
MESSAGES = [HumanMessage([{"type": "text", "text": QUESTION}, PICTURE])]


def picture() -> None:
    answer = llm.invoke(MESSAGES)
    see(answer.text)
    assert answer.usage_metadata["input_tokens"] > 64


def streaming() -> None:
    chunks = list(llm.stream(MESSAGES, stream_usage=True))
    streamed([chunk.text for chunk in chunks])
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.usage_metadata["output_tokens"] > 0
    assert whole.response_metadata["finish_reason"] == "stop"


def structured() -> None:
    for method in ("json_schema", "function_calling"):
        assert isinstance(llm.with_structured_output(Paint, method=method).invoke(MESSAGES), Paint)


@tool(args_schema=Paint)
def paint(color: str) -> str:
    """Paint a wall."""
    return f"The wall is {color}."


def tools() -> None:
    forced = llm.bind_tools([paint], tool_choice="any", parallel_tool_calls=False, strict=True)
    said = forced.invoke(MESSAGES)
    (call,) = said.tool_calls
    result = paint.invoke(call)
    assert isinstance(result, ToolMessage)
    assert result.content.startswith("The wall is ")
    assert llm.bind_tools([paint]).invoke([*MESSAGES, said, result]).text
    whole = None
    for chunk in forced.stream(MESSAGES):
        whole = chunk if whole is None else whole + chunk
    assert [each["args"] for each in whole.tool_calls] == [call["args"]]


def responses() -> None:
    other = ChatOpenAI(base_url=BASE, api_key="none", model=MODEL, temperature=0, use_responses_api=True)
    see(other.invoke(MESSAGES).text)
    streamed([chunk.text for chunk in other.stream(MESSAGES)])


run(picture, streaming, structured, tools, responses)
