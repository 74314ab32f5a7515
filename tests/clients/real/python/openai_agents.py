"""openai-agents: a loop with a tool, over chat completions and over responses."""

from __future__ import annotations

import os

os.environ["OPENAI_AGENTS_DISABLE_TRACING"] = "1"

import asyncio

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool
from common import BASE, DATA, MODEL, QUESTION, Color, Paint, run, see, streamed
from openai import AsyncOpenAI

LOOP = asyncio.new_event_loop()
client = AsyncOpenAI(base_url=BASE, api_key="none", max_retries=0)
MODELS = [OpenAIChatCompletionsModel(MODEL, client), OpenAIResponsesModel(MODEL, client)]
ITEMS = [
    {
        "role": "user",
        "content": [
            {"type": "input_text", "text": QUESTION},
            {"type": "input_image", "image_url": f"data:image/png;base64,{DATA}", "detail": "auto"},
        ],
    }
]
SETTINGS = {"temperature": 0, "max_tokens": 200}


def agent(model: object, **more: object) -> Agent:
    more = {"model_settings": ModelSettings(**SETTINGS), **more}
    return Agent(name="tester", model=model, **more)


def picture() -> None:
    for model in MODELS:
        see(LOOP.run_until_complete(Runner.run(agent(model), ITEMS)).final_output)


def streaming() -> None:
    async def pieces(model: object) -> list[str]:
        events = Runner.run_streamed(agent(model), ITEMS).stream_events()
        data = [event.data async for event in events if event.type == "raw_response_event"]
        return [each.delta for each in data if each.type == "response.output_text.delta"]

    for model in MODELS:
        streamed(LOOP.run_until_complete(pieces(model)))


def structured() -> None:
    for model in MODELS:
        result = LOOP.run_until_complete(Runner.run(agent(model, output_type=Paint), ITEMS))
        assert isinstance(result.final_output, Paint)


def tools() -> None:
    painted: list[str] = []

    @function_tool
    def paint(color: Color) -> str:
        """Paint a wall."""
        painted.append(color)
        return "done"

    for model in MODELS:
        painted.clear()
        settings = ModelSettings(**SETTINGS, tool_choice="required", parallel_tool_calls=False)
        result = LOOP.run_until_complete(Runner.run(agent(model, tools=[paint], model_settings=settings), ITEMS))
        assert len(painted) == 1
        assert result.final_output


run(picture, streaming, structured, tools)
