"""llama-index-llms-openai-like. Its multi-modal class of old is gone: pictures are blocks of a message."""

from __future__ import annotations

from common import BASE, MODEL, QUESTION, SHAPES, Paint, run, see, streamed
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

llm = OpenAILike(
    model=MODEL,
    api_base=BASE,
    api_key="none",
    is_chat_model=True,
    is_function_calling_model=True,
    should_use_structured_outputs=True,
    max_tokens=200,
    max_retries=0,
)
MESSAGES = [ChatMessage(role="user", blocks=[TextBlock(text=QUESTION), ImageBlock(path=SHAPES)])]


def picture() -> None:
    see(llm.chat(MESSAGES).message.content)


def streaming() -> None:
    streamed([chunk.delta or "" for chunk in llm.stream_chat(MESSAGES)])


def structured() -> None:
    assert isinstance(llm.as_structured_llm(Paint).chat(MESSAGES).raw, Paint)


def paint(color: str) -> str:
    """Paint a wall."""
    return f"The wall is {color}."


def tools() -> None:
    tool = FunctionTool.from_defaults(paint, fn_schema=Paint)
    answer = llm.chat_with_tools([tool], chat_history=MESSAGES, tool_required=True)
    (call,) = llm.get_tool_calls_from_response(answer)
    assert tool.call(**call.tool_kwargs).content.startswith("The wall is ")
    *_, last = llm.stream_chat_with_tools([tool], chat_history=MESSAGES, tool_required=True)
    (again,) = llm.get_tool_calls_from_response(last)
    assert Paint(**again.tool_kwargs)


run(picture, streaming, structured, tools)
