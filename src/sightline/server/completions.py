"""POST /v1/completions: raw prompts, as text or as token ids, one or many."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from sightline.engine.output import RequestOutput
from sightline.errors import RequestError
from sightline.prompt.pipeline import Prompt
from sightline.prompt.tokenizer import Tokenizer
from sightline.server.exchange import Exchange, check_ids, check_model, wire_logprob
from sightline.server.lifecycle import Lifecycle
from sightline.server.schema import SamplingFields, StreamOptions, check_stream_options, ranged
from sightline.types import FinishReason, TokenLogprob

router = APIRouter()

_DEFAULT_MAX_TOKENS = 16
_MAX_LOGPROBS = 5


class CompletionRequest(SamplingFields):
    """Body of POST /v1/completions."""

    refused: ClassVar = {k: v for k, v in SamplingFields.refused.items() if k not in ("echo", "best_of")}

    prompt: str | list[str] | list[int] | list[list[int]]
    model: str | None = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = ranged(minimum=0, maximum=_MAX_LOGPROBS)
    suffix: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def check(self) -> None:
        """What the fields say together."""
        super().check()
        check_stream_options(self.stream_options, self.stream)
        if self.suffix:
            raise RequestError("suffix: these models cannot fill in the middle; leave it out.", param="suffix")
        if self.best_of not in (None, 1, self.n):
            raise RequestError("best_of is not supported; ask for n answers and choose.", param="best_of")
        if self.logprobs is not None and not 0 <= self.logprobs <= _MAX_LOGPROBS:
            raise RequestError(
                f"logprobs must be between 0 and {_MAX_LOGPROBS}.", param="logprobs", code="invalid_value"
            )
        if self.echo and self.logprobs is not None:
            raise RequestError("echo with logprobs would need those of the prompt; leave one out.", param="logprobs")
        if not self.each_prompt():
            raise RequestError("prompt must hold at least one prompt.", param="prompt", code="empty_array")

    def each_prompt(self) -> list[str | list[int]]:
        """The prompts of any of the four forms."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if prompt and isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)  # type: ignore[arg-type]

    def given(self) -> dict[str, Any]:
        """OpenAI's default is 16 tokens here."""
        max_tokens = _DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        return {**super().given(), "max_tokens": max_tokens, "logprobs": self.logprobs}


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    """Continue one or several raw prompts."""
    lifecycle: Lifecycle = request.app.state.lifecycle
    body = CompletionRequest.parse(await request.body())
    check_model(lifecycle, body.model)
    return await _Completion(lifecycle, body).respond(request, stream=bool(body.stream))


class _Completion(Exchange):
    def __init__(self, lifecycle: Lifecycle, body: CompletionRequest) -> None:
        self.each_prompt = body.each_prompt()
        for ids in self.each_prompt:
            if not isinstance(ids, str):
                check_ids(lifecycle, ids, "prompt")
        sampling = body.sampling(lifecycle.sampling_defaults, lifecycle.pipeline.tokenizer.vocab_size)
        super().__init__(lifecycle, f"cmpl-{uuid.uuid4().hex}", [sampling] * len(self.each_prompt), body.rid)
        self.request = body
        self.num_choices = sampling.n
        self.head: dict[str, Any] = {
            "id": self.request_id,
            "object": "text_completion",
            "created": self.created,
            "model": lifecycle.model_name,
            "system_fingerprint": None,
        }

    async def prompts(self) -> list[Prompt]:
        return await asyncio.gather(*map(self.lifecycle.pipeline.text, self.each_prompt))

    def _echo(self, i: int) -> str:
        prompt = self.each_prompt[i]
        if not self.request.echo:
            return ""
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt, skip_special_tokens=False)

    def body(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The text_completion object."""
        choices = [
            self._choice(i, out.index, self._echo(i) + out.text, out.logprobs, 0, out.finish_reason, out.stop_reason)
            for i, output in enumerate(outputs)
            for out in output.outputs
        ]
        return {**self.head, "choices": choices, "usage": self.usage()}

    async def events(self) -> AsyncGenerator[dict[str, Any] | None]:
        """text_completion objects with one choice each, then None."""
        options = self.request.stream_options
        offsets: dict[tuple[int, int], int] = {}
        async for i, delta in self.deltas():
            key = i, delta.index
            text = delta.text if key in offsets else self._echo(i) + delta.text
            start = offsets.get(key, 0)
            offsets[key] = start + len(text)
            if text or delta.logprobs or delta.finish_reason is not None:
                choice = self._choice(*key, text, delta.logprobs, start, delta.finish_reason, delta.stop_reason)
                yield self.chunk(self.head, [choice], options)
        if options and options.include_usage:
            yield self.chunk(self.head, [], options)
        yield None

    def _choice(
        self,
        prompt: int,
        index: int,
        text: str,
        logprobs: list[TokenLogprob] | None,
        offset: int,
        finish_reason: FinishReason | None,
        stop_reason: str | int | None,
    ) -> dict[str, Any]:
        return {
            "index": prompt * self.num_choices + index,
            "text": text,
            "logprobs": None if logprobs is None else _logprobs(self.tokenizer, logprobs, offset),
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }


def _logprobs(tokenizer: Tokenizer, logprobs: list[TokenLogprob], offset: int) -> dict[str, Any]:
    """Parallel lists, as this older API has them; the chosen token is always among the likely ones."""
    tokens = [_text(tokenizer, lp.token_id) for lp in logprobs]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    likely = [
        {_text(tokenizer, t): wire_logprob(p) for t, p in (*lp.top, (lp.token_id, lp.logprob))} for lp in logprobs
    ]
    return {
        "tokens": tokens,
        "token_logprobs": [wire_logprob(lp.logprob) for lp in logprobs],
        "top_logprobs": likely,
        "text_offset": offsets,
    }


def _text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text; OpenAI's spelling of one that is part of a character."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
