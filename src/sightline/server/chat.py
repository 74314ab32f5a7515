"""POST /v1/chat/completions. The non-streaming answer is a fold over the same deltas as the streaming one."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from sightline.engine.output import CompletionOutput, OutputDelta, RequestOutput
from sightline.prompt.pipeline import Prompt
from sightline.prompt.processor import PixelLimits
from sightline.prompt.tool_parser import CallStart, Piece, folded
from sightline.server.calls import prepare_calls
from sightline.server.exchange import Exchange, check_model, logprob_entries
from sightline.server.lifecycle import Lifecycle
from sightline.server.schema import ChatCompletionRequest
from sightline.types import FinishReason, Grammar

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
        tools=body.tool_use.told if body.tool_use else None,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        template_kwargs=body.chat_template_kwargs,
        limits=PixelLimits(bounds.min_pixels, bounds.max_pixels) if bounds else PixelLimits(),
    )


class _Chat(Exchange):
    def __init__(self, lifecycle: Lifecycle, body: ChatCompletionRequest) -> None:
        sampling = body.sampling(lifecycle.sampling_defaults, lifecycle.pipeline.tokenizer.vocab_size)
        self.parsers, self.schemas, sampling = prepare_calls(lifecycle, body.messages, body.tool_use, sampling)
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

    def grammars(self) -> list[Grammar]:
        """The arguments' schemas one by one, then what is made of them."""
        return [*self.schemas, *super().grammars()]

    def body(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The chat.completion object."""
        choices = [self._choice(output) for output in outputs[0].outputs]
        body = {**self.head, "object": "chat.completion", "choices": choices, "usage": self.usage()}
        return body if self.request.metadata is None else {**body, "metadata": self.request.metadata}

    def _choice(self, output: CompletionOutput) -> dict[str, Any]:
        logprobs = {"content": logprob_entries(self.tokenizer, output.logprobs), "refusal": None}
        content, found = folded(self._pieces(output.index, output.text, final=True))
        calls = [_call(call.id, call.name, call.arguments) for call in found]
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
        return {
            "index": output.index,
            "message": {**message, "tool_calls": calls} if calls else message,
            "logprobs": logprobs if self.request.logprobs else None,
            "finish_reason": self._finish_reason(output.index, output.finish_reason),
            "stop_reason": output.stop_reason,
        }

    def _pieces(self, index: int, text: str, final: bool) -> list[Piece]:
        """New text of a choice as what its reader sees: text and calls."""
        return self.parsers[index].feed(text, final=final) if self.parsers else [text] if text else []

    def _finish_reason(self, index: int, reason: FinishReason | None) -> FinishReason | None:
        called = self.parsers and self.parsers[index].called
        return FinishReason.TOOL_CALLS if called and reason is FinishReason.STOP else reason

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
                # An answer that turns out to be calls alone has no content.
                yield chunk(
                    delta.index, {"role": "assistant", "content": None if self.parsers else "", "refusal": None}
                )
            logprobs = None
            if self.request.logprobs and delta.logprobs:
                logprobs = {"content": logprob_entries(self.tokenizer, delta.logprobs), "refusal": None}
            for message in self._message_deltas(delta):
                yield chunk(delta.index, message, logprobs)
                logprobs = None
            if logprobs:
                yield chunk(delta.index, {} if self.parsers else {"content": ""}, logprobs)
            if delta.finish_reason is not None:
                reason = self._finish_reason(delta.index, delta.finish_reason)
                yield chunk(delta.index, {}, None, reason, delta.stop_reason)
        if options and options.include_usage:
            yield self.chunk(head, [], options)
        yield None

    def _message_deltas(self, delta: OutputDelta) -> Iterator[dict[str, Any]]:
        """What a delta adds to the message: text, a call's name, or a piece of its arguments."""
        for piece in self._pieces(delta.index, delta.text, final=delta.finish_reason is not None):
            if isinstance(piece, str):
                yield {"content": piece}
            elif isinstance(piece, CallStart):
                yield {"tool_calls": [{"index": piece.index, **_call(piece.id, piece.name, "")}]}
            else:
                yield {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}


def _call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _choice(
    index: int,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    finish_reason: FinishReason | None = None,
    stop_reason: str | int | None = None,
) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
    return {**choice, "stop_reason": stop_reason} if finish_reason is not None else choice
