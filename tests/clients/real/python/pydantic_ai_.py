"""pydantic-ai: agents with pictures, outputs and tools."""

from __future__ import annotations

from common import BASE, MODEL, QUESTION, SHAPES, Color, Paint, run, see
from pydantic_ai import Agent, BinaryContent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

PROVIDER = OpenAIProvider(base_url=BASE, api_key="none")
model = OpenAIChatModel(MODEL, provider=PROVIDER)
PROMPT = [QUESTION, BinaryContent(data=SHAPES.read_bytes(), media_type="image/png")]
SETTINGS = {"temperature": 0, "max_tokens": 200, "parallel_tool_calls": False}


def picture() -> None:
    result = Agent(model, model_settings=SETTINGS).run_sync(PROMPT)
    see(result.output)
    assert result.usage.input_tokens > 64


def streaming() -> None:
    result = Agent(model, model_settings=SETTINGS).run_stream_sync(PROMPT)
    pieces = list(result.stream_text(delta=True, debounce_by=None))
    assert len(pieces) > 1
    see("".join(pieces))


def structured() -> None:
    assert isinstance(Agent(model, output_type=NativeOutput(Paint)).run_sync(PROMPT).output, Paint)


def tools() -> None:
    """Its ordinary output type is a tool that must be called; a function as output is called with the arguments."""

    def paint(color: Color) -> str:
        """Paint a wall."""
        return f"The wall is {color}."

    assert isinstance(Agent(model, output_type=Paint, model_settings=SETTINGS).run_sync(PROMPT).output, Paint)
    painted = Agent(model, output_type=paint, model_settings=SETTINGS).run_sync(PROMPT)
    assert painted.output.startswith("The wall is ")
    optional = Agent(model, tools=[paint], model_settings=SETTINGS).run_sync(PROMPT)
    assert optional.output


def responses() -> None:
    other = OpenAIResponsesModel(MODEL, provider=PROVIDER)
    see(Agent(other, model_settings={"temperature": 0}).run_sync(PROMPT).output)
    assert isinstance(Agent(other, output_type=Paint, model_settings=SETTINGS).run_sync(PROMPT).output, Paint)


run(picture, streaming, structured, tools, responses)
