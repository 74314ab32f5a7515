"""POST /v1/chat/completions. The non-streaming answer is a fold over the same deltas as the streaming one."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from sightline.engine.output import CompletionOutput, RequestOutput
from sightline.prompt.pipeline import Prompt
from sightline.prompt.processor import PixelLimits
from sightline.server.exchange import Exchange, check_model, logprob_entries
from sightline.server.lifecycle import Lifecycle
from sightline.server.schema import ChatCompletionRequest
from sightline.types import FinishReason

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    lifecycle: Lifecycle = request.app.state.lifecycle
    body = ChatCompletionRequest.parse(await request.body())
    check_model(lifecycle, body.model)
    return await _Chat(lifecycle, body).respond(request, stream=bool(body.stream))


async def chat_prompt(lifecycle: Lifecycle, body: ChatCompletionRequest) -> Prompt:
    """The conversation as the engine takes it."""
    bounds = body.mm_processor_kwargs
    return await lifecycle.pipeline.chat(
        body.messages,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        template_kwargs=body.chat_template_kwargs,
        limits=PixelLimits(bounds.min_pixels, bounds.max_pixels) if bounds else PixelLimits(),
    )


class _Chat(Exchange):
    def __init__(self, lifecycle: Lifecycle, body: ChatCompletionRequest) -> None:
        sampling = body.sampling(lifecycle.sampling_defaults, lifecycle.pipeline.tokenizer.vocab_size)
        super().__init__(lifecycle, f"chatcmpl-{uuid.uuid4().hex}", [sampling], body.rid)
        self.request = body
        self.head: dict[str, Any] = {
            "id": self.request_id,
            "created": self.created,
            "model": lifecycle.model_name,
            "system_fingerprint": None,
            "service_tier": "default",
        }

    async def prompts(self) -> list[Prompt]:
        return [await chat_prompt(self.lifecycle, self.request)]

    def body(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The chat.completion object."""
        choices = [self._choice(output) for output in outputs[0].outputs]
        body = {**self.head, "object": "chat.completion", "choices": choices, "usage": self.usage()}
        return body if self.request.metadata is None else {**body, "metadata": self.request.metadata}

    def _choice(self, output: CompletionOutput) -> dict[str, Any]:
        logprobs = {"content": logprob_entries(self.tokenizer, output.logprobs), "refusal": None}
        return {
            "index": output.index,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": logprobs if self.request.logprobs else None,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }

    async def events(self) -> AsyncGenerator[dict[str, Any] | None]:
        """chat.completion.chunk objects, then None."""
        options = self.request.stream_options
        head = {**self.head, "object": "chat.completion.chunk"}
        opened: set[int] = set()

        def chunk(*choice: Any) -> dict[str, Any]:
            return self.chunk(head, [_choice(*choice)], options)

        async for _, delta in self.deltas():
            if delta.index not in opened:
                opened.add(delta.index)
                yield chunk(delta.index, {"role": "assistant", "content": "", "refusal": None})
            if delta.text or delta.logprobs:
                logprobs = None
                if self.request.logprobs:
                    logprobs = {"content": logprob_entries(self.tokenizer, delta.logprobs), "refusal": None}
                yield chunk(delta.index, {"content": delta.text}, logprobs)
            if delta.finish_reason is not None:
                yield chunk(delta.index, {}, None, delta.finish_reason, delta.stop_reason)
        if options and options.include_usage:
            yield self.chunk(head, [], options)
        yield None


def _choice(
    index: int,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    finish_reason: FinishReason | None = None,
    stop_reason: str | int | None = None,
) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
    return {**choice, "stop_reason": stop_reason} if finish_reason is not None else choice
