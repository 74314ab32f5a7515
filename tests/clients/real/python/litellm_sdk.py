"""LiteLLM's SDK, and through it the errors that its router decides by."""

from __future__ import annotations

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm
from common import BASE, MESSAGES, MODEL, Paint, run, see, streamed

PROVIDERS = ("hosted_vllm", "openai")
# For hosted_vllm it takes additionalProperties out of a tool, so the arguments are named as a whole.
PARAMETERS = {"type": "object", "enum": [{"color": "red"}, {"color": "blue"}]}
TOOL = {"type": "function", "function": {"name": "paint", "parameters": PARAMETERS}}


def given(provider: str) -> dict:
    return {
        "model": f"{provider}/{MODEL}",
        "api_base": BASE,
        "api_key": "none",
        "messages": MESSAGES,
        "temperature": 0,
        "max_tokens": 200,
        "num_retries": 0,
    }


def picture() -> None:
    for provider in PROVIDERS:
        answer = litellm.completion(**given(provider))
        see(answer.choices[0].message.content)
        assert answer.usage.prompt_tokens > 64


def streaming() -> None:
    for provider in PROVIDERS:
        chunks = list(litellm.completion(**given(provider), stream=True, stream_options={"include_usage": True}))
        streamed([chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices])
        whole = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
        see(whole.choices[0].message.content)
        assert whole.usage.completion_tokens > 0


def structured() -> None:
    for provider in PROVIDERS:
        answer = litellm.completion(**given(provider), response_format=Paint)
        assert Paint.model_validate_json(answer.choices[0].message.content)


def tools() -> None:
    for provider in PROVIDERS:
        more = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
        (call,) = litellm.completion(**given(provider), **more).choices[0].message.tool_calls
        assert Paint.model_validate_json(call.function.arguments)
        chunks = list(litellm.completion(**given(provider), **more, stream=True))
        (again,) = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
        assert again.function.arguments == call.function.arguments


def errors() -> None:
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}
    for provider in PROVIDERS:
        try:
            litellm.completion(**{**given(provider), "messages": [{"role": "user", "content": [broken]}]})
        except litellm.BadRequestError:
            continue
        raise AssertionError("a broken picture was taken")


run(picture, streaming, structured, tools, errors)
