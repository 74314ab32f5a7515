"""instructor: a class out of a picture, by a tool and by a schema."""

from __future__ import annotations

import instructor
from common import BASE, MODEL, QUESTION, SHAPES, Paint, run
from instructor.processing.multimodal import Image
from openai import OpenAI

MESSAGES = [{"role": "user", "content": [QUESTION, Image.from_path(SHAPES)]}]


def ask(mode: instructor.Mode) -> Paint:
    client = instructor.from_openai(OpenAI(base_url=BASE, api_key="none", max_retries=0), mode=mode)
    given = {"model": MODEL, "response_model": Paint, "messages": MESSAGES, "max_retries": 0, "max_tokens": 200}
    answer, raw = client.chat.completions.create_with_completion(**given, temperature=0)
    assert raw.usage.prompt_tokens_details.model_extra["image_tokens"] > 0
    *_, last = client.chat.completions.create_partial(**given, temperature=0)
    assert last.color == answer.color
    return answer


def tools() -> None:
    assert ask(instructor.Mode.TOOLS)


def structured() -> None:
    assert ask(instructor.Mode.JSON_SCHEMA)


run(tools, structured)
