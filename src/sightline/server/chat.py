"""POST /v1/chat/completions. The non-streaming answer is a fold over the same deltas as the streaming one."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import ExitStack, closing
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from sightline.engine.client import Answer
from sightline.engine.output import OutputDelta
from sightline.errors import EngineError, NotFoundError, OverloadedError, RequestError
from sightline.prompt.pipeline import Prompt
from sightline.prompt.processor import PixelLimits
from sightline.prompt.tokenizer import Tokenizer
from sightline.server.errors import error_body
from sightline.server.lifecycle import Lifecycle
from sightline.server.schema import ChatCompletionRequest
from sightline.server.sse import ClientGone, EventStream, until_client_goes
from sightline.types import FinishReason, SamplingParams, TokenLogprob

logger = logging.getLogger("sightline.access")
router = APIRouter()
_json = msgspec.json.Encoder().encode


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    lifecycle: Lifecycle = request.app.state.lifecycle
    body = ChatCompletionRequest.parse(await request.body())
    if body.model and not lifecycle.accepts_model(body.model):
        raise NotFoundError(
            f"The model {body.model[:200]!r} does not exist; this server serves {lifecycle.model_name!r}.",
            param="model",
            code="model_not_found",
        )
    sampling = body.sampling(lifecycle.sampling_defaults, lifecycle.pipeline.tokenizer.vocab_size)
    completion_id = f"chatcmpl-{uuid.uuid4().hex}"
    with ExitStack() as stack:
        stack.enter_context(lifecycle.admit())
        try:
            submitting = _submit(lifecycle, body, sampling, completion_id)
            prompt, answer = await until_client_goes(request.receive, submitting)
        except ClientGone:
            return Response(status_code=499)
        stack.enter_context(closing(answer))
        chat = _Chat(lifecycle, body, sampling, prompt, completion_id)
        if body.stream:
            return EventStream(chat.events(answer), stack.pop_all())
        try:
            return await until_client_goes(request.receive, chat.whole(answer))
        except ClientGone:
            chat.log("client gone")
            return Response(status_code=499)


async def _submit(
    lifecycle: Lifecycle, body: ChatCompletionRequest, sampling: SamplingParams, request_id: str
) -> tuple[Prompt, Answer]:
    bounds = body.mm_processor_kwargs
    prompt = await lifecycle.pipeline.chat(
        body.messages,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        template_kwargs=body.chat_template_kwargs,
        limits=PixelLimits(bounds.min_pixels, bounds.max_pixels) if bounds else PixelLimits(),
    )
    answer = await lifecycle.engine.submit(prompt, sampling, pipeline=lifecycle.pipeline, request_id=request_id)
    return prompt, answer


class _Chat:
    """One answer on its way to the wire."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        body: ChatCompletionRequest,
        sampling: SamplingParams,
        prompt: Prompt,
        request_id: str,
    ) -> None:
        self.body = body
        self.sampling = sampling
        self.prompt = prompt
        self.request_id = request_id
        self.tokenizer = lifecycle.pipeline.tokenizer
        self.timeout = lifecycle.config.request_timeout
        self.started = time.monotonic()
        self.first_token: float | None = None
        self.num_cached = 0
        self.num_completion = 0
        self.head: dict[str, Any] = {
            "id": request_id,
            "created": int(time.time()),
            "model": lifecycle.model_name,
            "system_fingerprint": None,
            "service_tier": "default",
        }

    def _count(self, delta: OutputDelta) -> None:
        if self.first_token is None:
            self.first_token = time.monotonic()
        self.num_completion += len(delta.token_ids)
        if delta.index == 0:
            self.num_cached = delta.num_cached_tokens

    def usage(self) -> dict[str, Any]:
        """Token counts so far."""
        num_prompt, num_image = len(self.prompt.input_ids), self.prompt.num_image_tokens
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self.num_completion,
            "total_tokens": num_prompt + self.num_completion,
            "prompt_tokens_details": {
                "cached_tokens": self.num_cached,
                "image_tokens": num_image,
                "text_tokens": num_prompt - num_image,
                "audio_tokens": 0,
            },
            "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
        }

    async def whole(self, answer: Answer) -> Response:
        """The chat.completion object."""
        texts = [""] * self.sampling.n
        logprobs: list[list[dict[str, Any]]] = [[] for _ in texts]
        finishes: list[tuple[Any, Any]] = [(None, None)] * self.sampling.n
        async for delta in self._deltas(answer):
            texts[delta.index] += delta.text
            logprobs[delta.index] += _logprob_entries(self.tokenizer, delta.logprobs)
            if delta.finish_reason is not None:
                finishes[delta.index] = (delta.finish_reason, delta.stop_reason)
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": texts[i], "refusal": None},
                "logprobs": {"content": logprobs[i], "refusal": None} if self.body.logprobs else None,
                "finish_reason": finish,
                "stop_reason": reason,
            }
            for i, (finish, reason) in enumerate(finishes)
        ]
        self.log(finishes[0][0])
        body = {**self.head, "object": "chat.completion", "choices": choices, "usage": self.usage()}
        if self.body.metadata is not None:
            body["metadata"] = self.body.metadata
        return Response(_json(body), media_type="application/json")

    async def events(self, answer: Answer) -> AsyncGenerator[dict[str, Any] | None]:
        """chat.completion.chunk objects, then None; a failure becomes an error object and the end."""
        options = self.body.stream_options
        with_usage = bool(options and options.include_usage)
        head = {**self.head, "object": "chat.completion.chunk"}
        rest: dict[str, Any] = {"usage": None} if with_usage else {}
        opened: set[int] = set()
        finish: Any = "client gone"
        try:
            async for delta in self._deltas(answer):
                if delta.index not in opened:
                    opened.add(delta.index)
                    role = {"role": "assistant", "content": "", "refusal": None}
                    yield {**head, "choices": [_chunk_choice(delta.index, role)], **rest}
                if delta.text or delta.logprobs:
                    content = {"content": delta.text}
                    logprobs = None
                    if self.body.logprobs:
                        logprobs = {"content": _logprob_entries(self.tokenizer, delta.logprobs), "refusal": None}
                    yield {**head, "choices": [_chunk_choice(delta.index, content, logprobs)], **rest}
                if delta.finish_reason is not None:
                    last = _chunk_choice(delta.index, {}, None, delta.finish_reason, delta.stop_reason)
                    yield {**head, "choices": [last], **rest}
                    finish = delta.finish_reason
            if with_usage:
                yield {**head, "choices": [], "usage": self.usage()}
            yield None
        except (EngineError, OverloadedError, RequestError) as error:
            finish = "error"
            yield error_body(error)
        finally:
            self.log(finish)

    async def _deltas(self, answer: Answer) -> AsyncGenerator[OutputDelta]:
        try:
            async with asyncio.timeout(self.timeout):
                async for delta in answer:
                    self._count(delta)
                    yield delta
        except TimeoutError as error:
            raise OverloadedError(
                f"The request was not finished within {self.timeout:g} seconds.", code="request_timeout"
            ) from error

    def log(self, finish: Any) -> None:
        """The request's line in the access log."""
        now = time.monotonic()
        ttft = (self.first_token or now) - self.started
        logger.info(
            "%s images=%d in=%d cached=%d out=%d ttft=%.0fms total=%.0fms finish=%s",
            self.request_id,
            len(self.prompt.images),
            len(self.prompt.input_ids),
            self.num_cached,
            self.num_completion,
            ttft * 1e3,
            (now - self.started) * 1e3,
            finish,
        )


def _chunk_choice(
    index: int,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    finish_reason: FinishReason | None = None,
    stop_reason: str | int | None = None,
) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
    return {**choice, "stop_reason": stop_reason} if finish_reason is not None else choice


def _logprob_entries(tokenizer: Tokenizer, logprobs: list[TokenLogprob] | None) -> list[dict[str, Any]]:
    return [
        {**_token(tokenizer, lp.token_id, lp.logprob), "top_logprobs": [_token(tokenizer, *pair) for pair in lp.top]}
        for lp in logprobs or ()
    ]


def _token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    # -9999 is OpenAI's "too unlikely": JSON has no minus infinity.
    return {"token": data.decode(errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(data)}
