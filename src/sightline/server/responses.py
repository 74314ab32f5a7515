"""POST /v1/responses without a memory: the whole conversation comes with each request, and nothing is kept."""

from __future__ import annotations

import functools
import itertools
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from sightline.engine.output import RequestOutput
from sightline.errors import NotFoundError, OverloadedError, RequestError
from sightline.prompt.pipeline import Prompt
from sightline.prompt.tool_parser import Piece
from sightline.prompt.tools import ToolUse
from sightline.server.admission import note
from sightline.server.calls import prepare_calls
from sightline.server.errors import error_body
from sightline.server.exchange import Exchange, check_model, logprob_entries, renamed
from sightline.server.lifecycle import Lifecycle
from sightline.server.response_items import Output, named_in_input, read_flat_tools, read_items
from sightline.server.schema import (
    SamplingFields,
    StreamOptions,
    Whole,
    check_metadata,
    check_stream_options,
    ranged,
)
from sightline.server.sse import ClientGone, until_client_goes
from sightline.types import FinishReason, Grammar, TokenLogprob

router = APIRouter()

_LOGPROBS = "message.output_text.logprobs"
_INCLUDABLE = frozenset(
    (
        _LOGPROBS,
        "reasoning.encrypted_content",
        "message.input_image.image_url",
        "web_search_call.action.sources",
        "web_search_call.results",
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "file_search_call.results",
    )
)
_NO_MEMORY = "this server keeps no responses; send the whole conversation in input"


class TextOptions(BaseModel):
    """`text`: what the answer must look like."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponsesRequest(SamplingFields):
    """Body of POST /v1/responses."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Whole | None = ranged(minimum=1)
    top_logprobs: Whole | None = ranged(minimum=0, maximum=20)
    include: list[str] | None = None
    text: TextOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = None
    reasoning: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    background: bool | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def check(self) -> None:
        """What would need a memory or is not served is refused."""
        super().check()
        for name in ("previous_response_id", "conversation"):
            if getattr(self, name):
                raise RequestError(f"{name}: {_NO_MEMORY}.", param=name)
        if self.prompt:
            raise RequestError("prompt: this server keeps no prompt templates; send instructions.", param="prompt")
        if self.background:
            raise RequestError(f"background: {_NO_MEMORY}, and wait for the answer or stream it.", param="background")
        if self.truncation == "auto":
            raise RequestError("truncation: nothing is dropped here; shorten the input yourself.", param="truncation")
        if self.n not in (None, 1):
            raise RequestError("n: a response is one answer.", param="n")
        if unknown := sorted(set(self.include or ()) - _INCLUDABLE):
            raise RequestError(f"include: {unknown[0][:80]!r} is not known.", param="include")
        if self.top_logprobs is not None and not self.with_logprobs:
            raise RequestError(f"top_logprobs needs {_LOGPROBS!r} in include.", param="top_logprobs")
        if self.max_tool_calls is not None:
            raise RequestError(
                "max_tool_calls: it counts built-in tools, and this server has none.", param="max_tool_calls"
            )
        check_stream_options(self.stream_options, self.stream)
        check_metadata(self.metadata)
        self.check_forced(self.tool_use)

    @functools.cached_property
    def tool_use(self) -> ToolUse | None:
        """Which tools may be called, and how."""
        return read_flat_tools(self.tools, self.tool_choice, self.parallel_tool_calls)

    @property
    def with_logprobs(self) -> bool:
        """Whether `include` asks for log-probabilities."""
        return _LOGPROBS in (self.include or ())

    def given(self) -> dict[str, Any]:
        """max_output_tokens is this API's name."""
        max_tokens = self.max_tokens if self.max_output_tokens is None else self.max_output_tokens
        logprobs = (self.top_logprobs or 0) if self.with_logprobs else None
        return {**super().given(), "max_tokens": max_tokens, "logprobs": logprobs}

    def grammar_fields(self) -> dict[str, Any]:
        """Beside the others, text.format."""
        return {**super().grammar_fields(), "text.format": self.text.format if self.text else None}

    def spelling(self, name: str) -> str:
        """As OpenAI spells them here."""
        return {"max_tokens": "max_output_tokens", "logprobs": "top_logprobs"}.get(name, name)

    def conversation_messages(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Messages of a chat, and for each where it comes from. Raises `RequestError` naming the item."""
        if not self.input:
            raise RequestError("input is empty.", param="input", code="empty_array")
        if isinstance(self.input, str):
            messages, origins = read_items([{"role": "user", "content": self.input}], "input")
        else:
            messages, origins = read_items(self.input)
        if not messages:
            raise RequestError("input must hold at least one message.", param="input", code="empty_array")
        if self.instructions:
            return [{"role": "system", "content": self.instructions}, *messages], ["instructions", *origins]
        return messages, origins


@router.post("/v1/responses")
async def responses(request: Request) -> Response:
    """Answer a conversation given as items."""
    lifecycle: Lifecycle = request.app.state.lifecycle
    body = ResponsesRequest.parse(await request.body())
    check_model(lifecycle, body.model)
    return await _Response(lifecycle, body).respond(request, stream=bool(body.stream))


@router.post("/v1/responses/input_tokens")
async def input_tokens(request: Request) -> Response:
    """How many tokens the input has, pictures included, without computing anything."""
    lifecycle: Lifecycle = request.app.state.lifecycle
    body = ResponsesRequest.parse(await request.body())
    check_model(lifecycle, body.model)
    messages, origins = body.conversation_messages()
    with lifecycle.admit(), renamed(lambda param: named_in_input(param, origins)):
        try:
            prompt = await until_client_goes(request.receive, _prompt(lifecycle, body, messages))
        except ClientGone as error:
            note(error)
            return Response(status_code=499)
    return JSONResponse({"object": "response.input_tokens", "input_tokens": len(prompt.input_ids)})


@router.get("/v1/responses/{response_id}")
@router.delete("/v1/responses/{response_id}")
@router.post("/v1/responses/{response_id}/cancel")
async def stored(response_id: str) -> Response:
    """Nothing is kept."""
    raise NotFoundError(f"No response {response_id[:80]!r}: {_NO_MEMORY}.", param="response_id")


async def _prompt(lifecycle: Lifecycle, body: ResponsesRequest, messages: list[dict[str, Any]]) -> Prompt:
    tools = body.tool_use.told if body.tool_use else None
    return await lifecycle.pipeline.chat(messages, tools=tools, template_kwargs=body.chat_template_kwargs)


class _Response(Exchange):
    named_events = True

    def __init__(self, lifecycle: Lifecycle, body: ResponsesRequest) -> None:
        sampling = body.sampling(lifecycle.sampling_defaults, lifecycle.pipeline.tokenizer.vocab_size)
        self.messages, self.origins = body.conversation_messages()
        self.parsers, self.schemas, sampling = prepare_calls(lifecycle, self.messages, body.tool_use, sampling)
        super().__init__(lifecycle, f"resp_{uuid.uuid4().hex}", [sampling], body.rid)
        self.request = body
        self.output = Output()
        self._numbers = itertools.count()
        self._logprobs: list[dict[str, Any]] = []

    def grammars(self) -> list[Grammar]:
        """The arguments' schemas one by one, then what is made of them."""
        return [*self.schemas, *super().grammars()]

    async def prompts(self) -> list[Prompt]:
        return [await _prompt(self.lifecycle, self.request, self.messages)]

    def rename(self, param: str) -> str:
        """Fields of `input`."""
        return named_in_input(param, self.origins)

    def body(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The response object."""
        (output,) = outputs[0].outputs
        list(self._grow(output.text, output.logprobs or [], final=True, reason=output.finish_reason))
        return self._finished(output.finish_reason)

    # -- objects -------------------------------------------------------------------------------------------------------

    def _object(self, status: str, **fields: Any) -> dict[str, Any]:
        body, sampling = self.request, self.sampling[0]
        return {
            "id": self.request_id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.lifecycle.model_name,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": (body.reasoning or {}).get("effort"), "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            # Whatever was asked: nothing is stored.
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": (body.text and body.text.format) or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
            **fields,
        }

    def _finished(self, reason: FinishReason | None) -> dict[str, Any]:
        cut = reason == FinishReason.LENGTH
        return self._object(
            "incomplete" if cut else "completed",
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
            output=self.output.items,
            usage=self.usage(),
        )

    def usage(self) -> dict[str, Any]:
        """This API's names for the counts."""
        return {
            "input_tokens": self.num_prompt,
            "input_tokens_details": {
                "cached_tokens": self.num_cached,
                # Required by clients; OpenAI bills writes to its cache, here they cost nothing.
                "cache_write_tokens": 0,
                "image_tokens": self.num_image,
                "text_tokens": self.num_prompt - self.num_image,
            },
            "output_tokens": self.num_completion,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.num_prompt + self.num_completion,
        }

    # -- events --------------------------------------------------------------------------------------------------------

    def _event(self, type: str, **fields: Any) -> dict[str, Any]:
        return {"type": f"response.{type}", "sequence_number": next(self._numbers), **fields}

    async def events(self) -> AsyncGenerator[dict[str, Any]]:
        """The event sequence of messages, each with one part of text, and calls."""
        yield self._event("created", response=self._object("in_progress"))
        yield self._event("in_progress", response=self._object("in_progress"))
        if not self.parsers:
            for event in self.output.open_message():
                yield self._numbered(event)
        reason = None
        async for _, delta in self.deltas():
            reason = delta.finish_reason
            for event in self._grow(delta.text, delta.logprobs or [], final=reason is not None, reason=reason):
                yield self._numbered(event)
        response = self._finished(reason)
        yield self._event(response["status"], response=response)

    def _grow(
        self, text: str, logprobs: Sequence[TokenLogprob], *, final: bool, reason: FinishReason | None = None
    ) -> Iterator[dict[str, Any]]:
        """Events of new text; logprobs go with the next text that is shown, and calls have no place for theirs."""
        self._logprobs += logprob_entries(self.tokenizer, logprobs)
        pieces: list[Piece] = [text]
        if self.parsers:
            pieces = self.parsers[0].feed(text, final=final)
        for piece in pieces:
            if not isinstance(piece, str):
                yield from self.output.call(piece)
            elif piece or self._logprobs:
                yield from self.output.text(piece, self._logprobs)
            self._logprobs = []
        if final:
            if self.output.is_empty:
                yield from self.output.open_message()
            yield from self.output.close("incomplete" if reason == FinishReason.LENGTH else "completed")

    def _numbered(self, event: dict[str, Any]) -> dict[str, Any]:
        return {"type": event["type"], "sequence_number": next(self._numbers), **event}

    def failure(self, error: Exception) -> dict[str, Any]:
        """response.failed."""
        code = "rate_limit_exceeded" if isinstance(error, OverloadedError) and error.status == 429 else "server_error"
        shown = {"code": code, "message": error_body(error)["error"]["message"]}
        return self._event("failed", response=self._object("failed", error=shown))
