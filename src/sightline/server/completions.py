"""POST /v1/completions: raw prompts, as text or as token ids, one or many."""

from __future__ import annotations

import asyncio
import codecs
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
from sightline.server.schema import SamplingFields, StreamOptions, Whole, check_stream_options, ranged
from sightline.types import FinishReason, TokenLogprob

router = APIRouter()

_DEFAULT_MAX_TOKENS = 16
_MAX_LOGPROBS = 5


class CompletionRequest(SamplingFields):
    """Body of POST /v1/completions."""

    refused: ClassVar = {k: v for k, v in SamplingFields.refused.items() if k not in ("echo", "best_of")}

    max_tokens: Whole | None = ranged(minimum=0)
    prompt: str | list[str] | list[int] | list[list[int]]
    model: str | None = None
    best_of: Whole | None = None
    echo: bool | None = None
    logprobs: Whole | None = ranged(minimum=0, maximum=_MAX_LOGPROBS)
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

    @property
    def only_echo(self) -> bool:
        """Nothing but the prompt is asked for."""
        return bool(self.echo) and self.max_tokens == 0

    def given(self) -> dict[str, Any]:
        """OpenAI's default is 16 tokens here."""
        max_tokens = _DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        return {
            **super().given(),
            "max_tokens": 1 if self.only_echo else max_tokens,
            "logprobs": self.logprobs,
            "prompt_logprobs": self.logprobs if self.echo else None,
        }


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
        if body.only_echo:
            self.only_read.update(range(len(self.each_prompt)))
        self.request = body
        self.num_choices = sampling.n
        self._offsets: dict[int, _Offsets] = {}
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
            self._choice(i, out.index, out.text, out.logprobs, out.finish_reason, out.stop_reason)
            for i, output in enumerate(outputs)
            for out in output.outputs
        ]
        return {**self.head, "choices": choices, "usage": self.usage()}

    async def events(self) -> AsyncGenerator[dict[str, Any] | None]:
        """text_completion objects with one choice each, then None."""
        options = self.request.stream_options
        async for i, delta in self.deltas():
            choice = self._choice(i, delta.index, delta.text, delta.logprobs, delta.finish_reason, delta.stop_reason)
            if choice["text"] or delta.logprobs or delta.finish_reason is not None:
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
        finish_reason: FinishReason | None,
        stop_reason: str | int | None,
    ) -> dict[str, Any]:
        """What has come of a choice; its first part has the echo in front."""
        number = prompt * self.num_choices + index
        entries: list[TokenLogprob | int] = list(logprobs or ())
        if number not in self._offsets:
            echo = self._echo(prompt)
            text = echo + text
            self._offsets[number] = _Offsets()
            if self.request.echo and logprobs is not None:
                # Nothing comes before the first token, so it has no log-probability.
                first = int(self.answers[prompt].prompt.input_ids[0])
                entries = [first, *self.prompt_logprobs[prompt], *entries]
                # A token that begins every text is not part of the echo.
                opening = _text(self.tokenizer, first)
                self._offsets[number].at = 0 if echo.startswith(opening) else -len(opening)
        offsets = self._offsets[number]
        return {
            "index": number,
            "text": text,
            "logprobs": None if logprobs is None else _logprobs(self.tokenizer, entries, offsets),
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }


class _Offsets:
    """Where a choice's tokens begin in its text, in characters: a token may have a part of one."""

    def __init__(self) -> None:
        self.at = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, token: bytes) -> int:
        """Where the next token begins."""
        begins = max(self.at, 0)
        self.at += len(self._decoder.decode(token))
        return begins


def _logprobs(tokenizer: Tokenizer, entries: list[TokenLogprob | int], offsets: _Offsets) -> dict[str, Any]:
    """Parallel lists, as this older API has them; the chosen token is always among the likely ones. An entry without a
    log-probability is an id alone."""
    ids = [entry if isinstance(entry, int) else entry.token_id for entry in entries]
    known = [None if isinstance(entry, int) else entry for entry in entries]
    return {
        "tokens": [_text(tokenizer, token_id) for token_id in ids],
        "token_logprobs": [lp and wire_logprob(lp.logprob) for lp in known],
        "top_logprobs": [
            lp and {_text(tokenizer, t): wire_logprob(p) for t, p in (*lp.top, (lp.token_id, lp.logprob))}
            for lp in known
        ],
        "text_offset": [offsets.next(tokenizer.token_bytes(token_id)) for token_id in ids],
    }


def _text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text; OpenAI's spelling of one that is part of a character."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
