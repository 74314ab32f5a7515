"""From token events to text: what the HTTP layer and the offline `Engine` hand out."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from sightline.errors import EngineError, OverloadedError
from sightline.prompt.detokenizer import Detokenizer
from sightline.prompt.grammar import grammar_error
from sightline.prompt.tokenizer import Tokenizer
from sightline.types import FinishReason, SamplingParams, TokenEvent, TokenLogprob


@dataclass(slots=True)
class OutputDelta:
    """New text and tokens of one choice. `text` may be empty while a stop string or a character is incomplete.

    stop_reason: the stop string or stop token id that ended the choice; None for the end-of-sequence token or a length.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    num_cached_tokens: int
    prompt_logprobs: list[TokenLogprob] | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One finished choice."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class RequestOutput:
    """A finished request: its choices and its token counts. `text` is the first choice's.

    prompt_logprobs: of the prompt's tokens, if asked for, but for its first.
    """

    request_id: str
    outputs: list[CompletionOutput]
    num_prompt_tokens: int
    num_image_tokens: int
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob] | None = None

    @property
    def text(self) -> str:
        return self.outputs[0].text

    def append(self, delta: OutputDelta) -> None:
        """Fold a delta into its choice."""
        out = self.outputs[delta.index]
        out.text += delta.text
        out.token_ids += delta.token_ids
        if delta.logprobs is not None:
            out.logprobs = (out.logprobs or []) + delta.logprobs
        out.finish_reason = delta.finish_reason or out.finish_reason
        out.stop_reason = delta.stop_reason
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        self.num_cached_tokens = delta.num_cached_tokens if delta.index == 0 else self.num_cached_tokens


def joined(event: TokenEvent, following: TokenEvent) -> TokenEvent:
    """Two consecutive events of one choice as one; only the second may end it."""
    logprobs = None
    if event.logprobs is not None or following.logprobs is not None:
        logprobs = (event.logprobs or []) + (following.logprobs or [])
    token_ids = event.token_ids + following.token_ids
    kept = event.prompt_logprobs
    return msgspec.structs.replace(following, token_ids=token_ids, logprobs=logprobs, prompt_logprobs=kept)


class RequestDecoder:
    """Detokenises every choice of one request and applies its stop strings.

    After `push` returned a delta with stop_reason of a stop string, the engine still runs that choice: the caller aborts
    the choices named by `take_aborts`.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams) -> None:
        self._sampling = sampling
        self._choices = [
            Detokenizer(
                tokenizer,
                stop=sampling.stop,
                include_stop=sampling.include_stop_str_in_output,
                skip_special_tokens=sampling.skip_special_tokens,
                min_tokens=sampling.min_tokens,
            )
            for _ in range(sampling.n)
        ]
        self._live = set(range(sampling.n))
        self._aborts: list[int] = []

    @property
    def done(self) -> bool:
        """Every choice has ended."""
        return not self._live

    def take_aborts(self) -> list[int]:
        """Choices that a stop string ended since the last call."""
        aborts, self._aborts = self._aborts, []
        return aborts

    def push(self, event: TokenEvent) -> OutputDelta | None:
        """The event as text; None for a choice that has ended.

        Raises `EngineError` for a failed or aborted one, `OverloadedError` for one whose turn never came, and `RequestError` for
        one whose grammar cost too much.
        """
        if event.index not in self._live:
            return None
        if event.finish_reason is FinishReason.TIMEOUT:
            self._live.clear()
            raise OverloadedError(
                "The server is busy: the request's turn did not come in time.", code="queue_timeout", retry_after=5
            )
        if event.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            self._live.discard(event.index)
            if event.grammar_cost and self._sampling.grammar is not None:
                raise grammar_error(self._sampling.grammar.source, "became too costly to follow; make it simpler")
            raise EngineError(event.error or "the request was aborted")
        final = event.finish_reason is not None
        # The end-of-sequence or stop id ends the answer; it is not part of its text.
        shown = event.token_ids[:-1] if event.stop_token_id is not None else event.token_ids
        text = self._choices[event.index].push(shown, final=final)
        token_ids, logprobs = event.token_ids, event.logprobs
        finish = event.finish_reason
        stop_reason: str | int | None = None
        if event.stop_token_id is not None and event.stop_token_id in self._sampling.stop_token_ids:
            stop_reason = event.stop_token_id
        if text.stopped is not None:
            if not final:
                self._aborts.append(event.index)
            finish, stop_reason = FinishReason.STOP, text.stopped
            token_ids = token_ids[: text.num_tokens_used]
            logprobs = None if logprobs is None else logprobs[: text.num_tokens_used]
        if finish is not None:
            self._live.discard(event.index)
        return OutputDelta(
            index=event.index,
            text=text.text,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=finish,
            stop_reason=stop_reason,
            num_cached_tokens=event.num_cached_tokens,
            prompt_logprobs=event.prompt_logprobs,
        )
