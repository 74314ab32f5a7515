"""What every endpoint that generates has in common: admission, prompts, the deadline, the client's presence, the log.

A dialect (chat.py, completions.py, ...) is an `Exchange` that makes prompts and writes answers in its own words.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, aclosing, closing, contextmanager
from dataclasses import replace
from typing import Any

import msgspec
from fastapi import Request
from starlette.responses import Response

from sightline.engine.client import Answer
from sightline.engine.output import CompletionOutput, OutputDelta, RequestOutput
from sightline.errors import EngineError, NotFoundError, OverloadedError, RequestError
from sightline.prompt.caller import caller
from sightline.prompt.grammar import check_in_time
from sightline.prompt.pipeline import Prompt
from sightline.prompt.tokenizer import Tokenizer
from sightline.server.admission import Call, ClientGone, note
from sightline.server.errors import error_body
from sightline.server.lifecycle import Lifecycle
from sightline.server.schema import StreamOptions
from sightline.server.sse import EventStream, until_client_goes
from sightline.types import FinishReason, Grammar, SamplingParams, TokenLogprob

_json = msgspec.json.Encoder().encode


def check_model(lifecycle: Lifecycle, name: str | None) -> None:
    """Raises `NotFoundError` for a model that is not served; no name stands for the one that is."""
    if name and not lifecycle.accepts_model(name):
        raise NotFoundError(
            f"The model {name[:200]!r} does not exist; this server serves {lifecycle.model_name!r}.",
            param="model",
            code="model_not_found",
        )


def check_ids(lifecycle: Lifecycle, ids: Iterable[int], param: str) -> None:
    """Raises `RequestError` for an id that no token has; a picture's placeholder may lie beyond the vocabulary."""
    pipeline = lifecycle.pipeline
    size, extra = pipeline.tokenizer.vocab_size, pipeline.processor.image_token_id if pipeline.processor else 0
    if not all(0 <= i < size or i == extra for i in ids):
        raise RequestError(f"{param} must hold token ids below {size}.", param=param, code="invalid_value")


@contextmanager
def renamed(rename: Callable[[str], str]) -> Iterator[None]:
    """Errors inside name fields as this endpoint's clients know them."""
    try:
        yield
    except RequestError as error:
        if error.param is not None:
            error.param = rename(error.param)
        raise


class Exchange(ABC):
    """One call: one prompt or several, each with its sampling parameters, and their answers on the way to the wire."""

    # Whether server-sent events carry an `event:` line with their type.
    named_events = False
    # Whether an aborted answer ends with FinishReason.ABORT; it is an error otherwise.
    shows_aborts = False

    def __init__(
        self, lifecycle: Lifecycle, request_id: str, sampling: Sequence[SamplingParams], rid: str | None = None
    ) -> None:
        """rid: the client's own name of the request, for /abort_request."""
        self.lifecycle = lifecycle
        self.request_id = request_id
        self.rid = rid
        self.sampling = sampling
        self.tokenizer = lifecycle.pipeline.tokenizer
        self.created = int(time.time())
        self.tenant = caller().salt
        self.answers: list[Answer] = []
        self._started = time.monotonic()
        self._timeout = lifecycle.config.request_timeout
        if isinstance(who := caller(), Call):
            self._timeout = min(self._timeout, who.timeout)
        self._deadline = asyncio.get_running_loop().time() + self._timeout
        self._first_token: float | None = None
        self._last_token: dict[tuple[int, int], float] = {}
        self._observed = lifecycle.observed
        self.prompt_logprobs: list[list[TokenLogprob]] = [[] for _ in sampling]
        # Places of prompts that are only read: the engine makes one token, and nobody sees it.
        self.only_read: set[int] = set()
        self._num_cached = [0] * len(sampling)
        self._num_completion = 0
        self._finish: FinishReason | None = None
        self._running = {(i, index) for i, each in enumerate(sampling) for index in range(each.n)}
        self._aborted = False

    # -- the dialect ---------------------------------------------------------------------------------------------------

    @abstractmethod
    async def prompts(self) -> list[Prompt]:
        """One prompt for each of `sampling`. Raises `RequestError`."""

    def grammars(self) -> list[Grammar]:
        """What is checked before any other work is spent."""
        return list({each.grammar for each in self.sampling if each.grammar is not None})

    @abstractmethod
    def body(self, outputs: list[RequestOutput]) -> Any:
        """The whole answer, to be sent as JSON."""

    @abstractmethod
    def events(self) -> AsyncGenerator[Any]:
        """The answer as events, made of `deltas`; None is sent as [DONE]."""

    def rename(self, param: str) -> str:
        """A field of chat messages or raw prompts, as the client of this dialect knows it."""
        return param

    def failure(self, error: Exception) -> Any:
        """The event of an error in mid-stream; the stream ends with it."""
        return error_body(error)

    # -- the call ------------------------------------------------------------------------------------------------------

    async def respond(self, request: Request, *, stream: bool) -> Response:
        """Admit, submit, answer. What is still running when the client goes is aborted."""
        if len(self.sampling) > self.lifecycle.config.max_queued_requests:
            raise RequestError(
                f"The request has {len(self.sampling)} prompts; at most "
                f"{self.lifecycle.config.max_queued_requests} are allowed."
            )
        with renamed(self.rename), ExitStack() as stack:
            for _ in self.sampling:
                stack.enter_context(self.lifecycle.admit())
            stack.enter_context(self._registered(request.app.state.exchanges))
            try:
                await until_client_goes(request.receive, self._submit(stack))
                if stream:
                    keep_alive = self.lifecycle.config.stream_keep_alive
                    return EventStream(
                        self._logged_events(), stack.pop_all(), named=self.named_events, keep_alive=keep_alive
                    )
                outputs = await until_client_goes(request.receive, self._collect())
            except ClientGone as error:
                note(error)
                self._end("client gone")
                return Response(status_code=499)
            except (EngineError, OverloadedError, RequestError):
                self._end("error")
                raise
            self._end(self._finish)
            return Response(_json(self.body(outputs)), media_type="application/json")

    @contextmanager
    def _registered(self, exchanges: dict[str, Exchange]) -> Iterator[None]:
        names = [self.request_id] if self.rid is None else [self.request_id, self.rid]
        if self.rid in exchanges:
            raise RequestError(f"rid {self.rid[:80]!r} is in use by a running request.", param="rid")
        exchanges.update(dict.fromkeys(names, self))
        try:
            yield
        finally:
            for name in names:
                del exchanges[name]

    def abort(self) -> None:
        """End the answers where they are; the client is told."""
        self._aborted = True
        self._fail(_Aborted())

    def _too_late(self) -> OverloadedError:
        return OverloadedError(
            f"The request was not finished within {self._timeout:g} seconds.", code="request_timeout", status=504
        )

    def _fail(self, error: Exception) -> None:
        """Raised by `deltas` after what has come already; one timer for a call costs less than one for each delta."""
        for answer in self.answers:
            answer.events.put_nowait(error)

    async def _submit(self, stack: ExitStack) -> None:
        pipeline, engine = self.lifecycle.pipeline, self.lifecycle.engine
        try:
            async with asyncio.timeout_at(self._deadline):
                for grammar in self.grammars():
                    await check_in_time(grammar)
                prompts = await self.prompts()
                if isinstance(who := caller(), Call):
                    who.hold_tokens(sum(len(prompt.input_ids) for prompt in prompts))
                for i, (prompt, sampling) in enumerate(zip(prompts, self.sampling, strict=True)):
                    request_id = self.request_id if len(self.sampling) == 1 else f"{self.request_id}-{i}"
                    answer = await engine.submit(prompt, sampling, pipeline=pipeline, request_id=request_id)
                    self.answers.append(stack.enter_context(closing(answer)))
        except TimeoutError as error:
            raise self._too_late() from error
        if self._aborted:
            self.abort()
        timer = asyncio.get_running_loop().call_at(self._deadline, lambda: self._fail(self._too_late()))
        stack.callback(timer.cancel)

    async def _collect(self) -> list[RequestOutput]:
        outputs = [
            RequestOutput(
                self.request_id,
                [CompletionOutput(i) for i in range(sampling.n)],
                len(answer.prompt.input_ids),
                answer.prompt.num_image_tokens,
            )
            for answer, sampling in zip(self.answers, self.sampling, strict=True)
        ]
        async with aclosing(self.deltas()) as deltas:
            async for i, delta in deltas:
                outputs[i].append(delta)
        return outputs

    def _read(self, i: int, delta: OutputDelta) -> OutputDelta:
        """Count the delta, and take the answer away where only the prompt was asked for."""
        if i in self.only_read:
            nothing: list[TokenLogprob] | None = None if delta.logprobs is None else []
            finish = delta.finish_reason and FinishReason.LENGTH
            delta = replace(delta, text="", token_ids=[], logprobs=nothing, finish_reason=finish, stop_reason=None)
        self._count(i, delta)
        return delta

    async def _logged_events(self) -> AsyncGenerator[Any]:
        finish: str | None = "client gone"
        try:
            with renamed(self.rename):
                async with aclosing(self.events()) as events:
                    async for event in events:
                        yield event
            finish = self._finish
        except (EngineError, OverloadedError, RequestError) as error:
            note(error)
            finish = "error"
            yield self.failure(error)
        finally:
            self._end(finish)

    async def deltas(self) -> AsyncGenerator[tuple[int, OutputDelta]]:
        """(index of the prompt, delta) as they come. Raises `OverloadedError` at the deadline, and `EngineError`."""
        try:
            if len(self.answers) == 1:
                async for delta in self.answers[0]:
                    yield 0, self._read(0, delta)
            else:
                async with aclosing(_merged(self.answers)) as merged:
                    async for i, delta in merged:
                        yield i, self._read(i, delta)
        except _Aborted:
            if not self.shows_aborts:
                raise
            for i, index in sorted(self._running):
                yield i, OutputDelta(index, "", [], None, FinishReason.ABORT, None, self._num_cached[i])

    def _count(self, i: int, delta: OutputDelta) -> None:
        if delta.token_ids:
            now, choice = time.monotonic(), (i, delta.index)
            if self._first_token is None:
                self._first_token = now
                self._observed.first_token.observe(now - self._started)
            if (last := self._last_token.get(choice)) is not None:
                # Tokens that came together share the time.
                num = len(delta.token_ids)
                self._observed.between_tokens.observe((now - last) / num, num)
            self._last_token[choice] = now
            self._num_completion += len(delta.token_ids)
        if delta.index == 0:
            self._num_cached[i] = delta.num_cached_tokens
            self.prompt_logprobs[i] = delta.prompt_logprobs or self.prompt_logprobs[i]
        if delta.finish_reason is not None:
            self._finish = delta.finish_reason
            self._observed.finishes[delta.finish_reason] += 1
            self._running.discard((i, delta.index))

    # -- what dialects write -------------------------------------------------------------------------------------------

    @property
    def num_prompt(self) -> int:
        """Tokens of all prompts, pictures included."""
        return sum(len(a.prompt.input_ids) for a in self.answers)

    @property
    def num_image(self) -> int:
        """Placeholders of all pictures."""
        return sum(a.prompt.num_image_tokens for a in self.answers)

    @property
    def num_cached(self) -> int:
        """Prompt tokens found in the prefix cache."""
        return sum(self._num_cached)

    @property
    def num_completion(self) -> int:
        """Tokens generated so far."""
        return self._num_completion

    def chunk(
        self, head: dict[str, Any], choices: list[dict[str, Any]], options: StreamOptions | None
    ) -> dict[str, Any]:
        """A chunk of chat's or completions' stream; without choices, the last one, which has the usage.

        Who asked for usage gets the key in every chunk: null before the end, or running counts if asked for those too.
        """
        if options is None or not options.include_usage:
            return {**head, "choices": choices}
        now = not choices or options.continuous_usage_stats
        return {**head, "choices": choices, "usage": self.usage() if now else None}

    def usage(self) -> dict[str, Any]:
        """Token counts so far, as chat and completions have them."""
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": self.num_completion,
            "total_tokens": self.num_prompt + self.num_completion,
            "prompt_tokens_details": {
                "cached_tokens": self.num_cached,
                "image_tokens": self.num_image,
                "text_tokens": self.num_prompt - self.num_image,
                "audio_tokens": 0,
            },
            "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
        }

    def _end(self, finish: str | None) -> None:
        """Count the request, and say what the access log says of it."""
        now = time.monotonic()
        self._observed.request.observe(now - self._started)
        tenant = self.lifecycle.keys.tenant(self.tenant)
        self._observed.prompt_tokens[tenant] += self.num_prompt
        self._observed.cached_tokens[tenant] += self.num_cached
        if isinstance(who := caller(), Call):
            first = None if self._first_token is None else round((self._first_token - self._started) * 1e3)
            who.fields = {
                "id": self.request_id,
                "images": sum(len(a.prompt.images) for a in self.answers),
                "in": self.num_prompt,
                "cached": self.num_cached,
                "out": self.num_completion,
                "ttft_ms": first,
                "finish": finish,
            }
            if who.trace is not None:
                for i, answer in enumerate(self.answers):
                    if answer.times is not None:
                        last = max((t for (j, _), t in self._last_token.items() if j == i), default=now)
                        who.trace.engine(answer.times, last)


class _Aborted(RequestError):
    def __init__(self) -> None:
        super().__init__("The request was ended by /abort_request.", code="request_aborted")


async def _merged(answers: Sequence[Answer]) -> AsyncGenerator[tuple[int, OutputDelta]]:
    """Deltas of several answers in the order in which they come."""
    waiting = {asyncio.ensure_future(anext(answer, None)): i for i, answer in enumerate(answers)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                i = waiting.pop(task)
                if (delta := task.result()) is not None:
                    waiting[asyncio.ensure_future(anext(answers[i], None))] = i
                    yield i, delta
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


def logprob_entries(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob] | None) -> list[dict[str, Any]]:
    """Log-probabilities as chat completions and responses have them."""
    return [
        {**_token(tokenizer, lp.token_id, lp.logprob), "top_logprobs": [_token(tokenizer, *pair) for pair in lp.top]}
        for lp in logprobs or ()
    ]


def _token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    return {"token": data.decode(errors="replace"), "logprob": wire_logprob(logprob), "bytes": list(data)}


def wire_logprob(logprob: float) -> float:
    """-9999 is OpenAI's "too unlikely": JSON has no minus infinity."""
    return max(logprob, -9999.0)
