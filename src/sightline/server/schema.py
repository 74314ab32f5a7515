"""The wire format of requests: what is read, what is refused.

A field that would change the answer is honoured or refused with a 400 that names it; harmless ones are accepted, and unknown
ones are logged once. `SamplingFields` is what every endpoint that generates shares.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from sightline.errors import RequestError
from sightline.prompt.grammar import grammar_of
from sightline.prompt.tools import ToolUse, read_tools
from sightline.types import Grammar, SamplingParams

logger = logging.getLogger("sightline.server")

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

# Accepted without effect on the answer: bookkeeping of OpenAI's platform.
_HARMLESS = frozenset(
    """user safety_identifier prompt_cache_key prompt_cache_options prompt_cache_retention metadata service_tier store
    reasoning_effort verbosity parallel_tool_calls prediction web_search_options moderation request_id priority
    session_id""".split()
)
# Would change the answer and is not implemented: refused unless empty. Values that mean "off" are listed.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "echo": (False,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "prompt_logprobs": (0,),
    "truncate_prompt_tokens": (),
    "chat_template": (),
    "logits_processors": (),
    "custom_logit_processor": (),
    "lora_path": (),
    "media_io_kwargs": ({},),
    "cache_salt": (),
}
# What an answer must look like, in the words of OpenAI, SGLang and vLLM.
GRAMMAR_FIELDS = (
    "response_format",
    "json_schema",
    "regex",
    "ebnf",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)
_INSTEAD = {"functions": "use tools", "function_call": "use tool_choice"}


class Body(BaseModel):
    """A JSON body. `parse` reads it; `check` holds the rules that types cannot express."""

    model_config = ConfigDict(strict=True, extra="allow")

    harmless: ClassVar[frozenset[str]] = _HARMLESS
    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = _REFUSED

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Raises `RequestError` naming the field."""
        try:
            request = cls.model_validate_json(body)
        except ValidationError as error:
            raise _request_error(error, _field_names(cls)) from error
        request.check()
        return request

    def check(self) -> None:
        """Raises `RequestError` for a field that is refused, or that contradicts another."""
        for name, value in (self.model_extra or {}).items():
            if name in self.refused:
                if value is not None and value not in self.refused[name]:
                    remedy = _INSTEAD.get(name, "leave it out")
                    raise RequestError(f"{name} is not supported by this server yet; {remedy}.", param=name)
            elif name not in self.harmless:
                _log_once(name)


def _whole(value: Any) -> Any:
    """JSON has one kind of number, and some clients write 256.0 where they mean 256."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]


def ranged(**limits: float) -> Any:
    """An optional field whose range is told to readers of the API's description; `SamplingParams.validate` checks it."""
    return Field(default=None, json_schema_extra={**limits})


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = False
    include_obfuscation: bool | None = False
    continuous_usage_stats: bool | None = False


class PixelBounds(BaseModel):
    """`mm_processor_kwargs`: bounds on each picture's pixels, within the checkpoint's own."""

    model_config = ConfigDict(strict=True, extra="forbid")

    min_pixels: Annotated[int, Field(ge=1)] | None = None
    max_pixels: Annotated[int, Field(ge=1)] | None = None


class SamplingFields(Body):
    """How to choose tokens and when to stop. Ranges are checked by `SamplingParams.validate`."""

    max_temperature: ClassVar[float] = 2.0

    max_tokens: Whole | None = ranged(minimum=1)
    min_tokens: Whole | None = ranged(minimum=0)
    temperature: float | None = ranged(minimum=0, maximum=2)
    top_p: float | None = ranged(minimum=0, maximum=1)
    top_k: Whole | None = ranged(minimum=-1)
    min_p: float | None = ranged(minimum=0, maximum=1)
    n: Whole | None = ranged(minimum=1, maximum=128)
    seed: Whole | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    no_stop_trim: bool | None = None
    presence_penalty: float | None = ranged(minimum=-2, maximum=2)
    frequency_penalty: float | None = ranged(minimum=-2, maximum=2)
    repetition_penalty: float | None = ranged(exclusiveMinimum=0, maximum=2)
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    response_format: dict[str, Any] | None = None
    json_schema: str | dict[str, Any] | None = None
    regex: str | None = None
    ebnf: str | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    rid: str | None = None

    def check(self) -> None:
        """Beside the types: how many stop strings."""
        super().check()
        if isinstance(self.stop, list) and len(self.stop) > 16:
            raise RequestError("stop may hold at most 16 strings.", param="stop")
        if self.temperature is not None and self.temperature > self.max_temperature:
            raise RequestError(
                f"temperature must be between 0 and {self.max_temperature:g}, not {self.temperature:g}.",
                param="temperature",
                code="invalid_value",
            )

    def given(self) -> dict[str, Any]:
        """Fields of `SamplingParams` as the request has them; None where it says nothing."""
        return {
            "max_tokens": self.max_tokens,
            "min_tokens": self.min_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "n": self.n,
            "seed": self.seed,
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "include_stop_str_in_output": self.include_stop_str_in_output or self.no_stop_trim,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": _logit_bias(self.logit_bias or {}),
            "ignore_eos": self.ignore_eos,
            "skip_special_tokens": self.skip_special_tokens,
            "grammar": self._grammar(),
        }

    def grammar_fields(self) -> dict[str, Any]:
        """The fields that `grammar_of` reads."""
        return {name: getattr(self, name) for name in GRAMMAR_FIELDS}

    def _grammar(self) -> Grammar | None:
        grammar = grammar_of(self.grammar_fields())
        return grammar and msgspec.structs.replace(grammar, source=self.spelling(grammar.source))

    def spelling(self, name: str) -> str:
        """What this endpoint calls a field of `SamplingParams`."""
        return name

    def sampling(self, defaults: Mapping[str, Any], vocab_size: int) -> SamplingParams:
        """Sampling parameters; fields left out come from `defaults` (the model's own), then OpenAI's. Validated."""
        try:
            params = SamplingParams(**{**defaults, **{k: v for k, v in self.given().items() if v is not None}})
            params.validate(vocab_size)
        except RequestError as error:
            if error.param is not None:
                spelled = self.spelling(error.param)
                error.message = error.message.replace(error.param, spelled, 1)
                error.param = spelled
            raise
        return params

    def check_forced(self, use: ToolUse | None) -> None:
        """Raises `RequestError` when both a tool that must be called and a grammar say what comes."""
        if use and use.forced and (grammar := self._grammar()):
            raise RequestError(
                f"{grammar.source} and tool_choice both say what the answer must look like; leave one out.",
                param=grammar.source,
            )


class ChatCompletionRequest(SamplingFields):
    """Body of POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    model: str | None = None
    max_completion_tokens: Whole | None = ranged(minimum=1)
    logprobs: bool | None = None
    top_logprobs: Whole | None = ranged(minimum=0, maximum=20)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[str] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: PixelBounds | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None

    def check(self) -> None:
        """What the fields say together, and the shape of messages."""
        super().check()
        if self.modalities and self.modalities != ["text"]:
            raise RequestError("modalities: this server answers with text only.", param="modalities")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
        check_stream_options(self.stream_options, self.stream)
        check_metadata(self.metadata)
        self.check_forced(self.tool_use)
        if not self.messages:
            raise RequestError("messages must hold at least one message.", param="messages", code="empty_array")
        for i, message in enumerate(self.messages):
            check_message(message, f"messages[{i}]")

    @functools.cached_property
    def tool_use(self) -> ToolUse | None:
        """Which tools may be called, and how."""
        return read_tools(self.tools, self.tool_choice, self.parallel_tool_calls)

    def given(self) -> dict[str, Any]:
        """max_completion_tokens wins over max_tokens."""
        max_tokens = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return {**super().given(), "max_tokens": max_tokens, "logprobs": logprobs}

    def spelling(self, name: str) -> str:
        """As OpenAI spells them."""
        if name == "max_tokens" and self.max_completion_tokens is not None:
            return "max_completion_tokens"
        return "top_logprobs" if name == "logprobs" else name


def check_stream_options(options: StreamOptions | None, stream: bool | None) -> None:
    """Raises `RequestError` when the options have no stream."""
    if options is not None and not stream:
        raise RequestError("stream_options is only allowed when stream is true.", param="stream_options")


def check_metadata(metadata: Mapping[str, str] | None) -> None:
    """OpenAI's limits: 16 pairs, keys of 64 and values of 512 characters."""
    if metadata and len(metadata) > 16:
        raise RequestError("metadata may hold at most 16 pairs.", param="metadata")
    if metadata and any(len(k) > 64 or len(v) > 512 for k, v in metadata.items()):
        raise RequestError("metadata: keys have at most 64 characters and values 512.", param="metadata")


def check_message(message: Mapping[str, Any], param: str) -> None:
    """Raises `RequestError` for what no template could take."""
    role = message.get("role")
    if role is None:
        raise RequestError(f"{param}.role is missing.", param=f"{param}.role", code="missing_required_parameter")
    if role not in ROLES:
        raise RequestError(
            f"{param}.role must be one of {', '.join(ROLES)}, not {str(role)[:40]!r}.", param=f"{param}.role"
        )
    content = message.get("content")
    if content is None:
        if role == "assistant":
            return
        raise RequestError(f"{param}.content is missing.", param=f"{param}.content")
    if isinstance(content, str):
        return
    if not isinstance(content, list) or not content:
        raise RequestError(f"{param}.content must be a string or a non-empty list of parts.", param=f"{param}.content")
    for j, part in enumerate(content):
        where = f"{param}.content[{j}]"
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise RequestError(f"{where} must be an object with a type.", param=where)
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise RequestError(f"{where}.text must be a string.", param=f"{where}.text")


def _logit_bias(bias: Mapping[str, float]) -> dict[int, float]:
    try:
        return {int(k): float(v) for k, v in bias.items()}
    except ValueError as error:
        raise RequestError("logit_bias is keyed by token ids.", param="logit_bias") from error


@functools.cache
def _field_names(cls: type[BaseModel]) -> frozenset[str]:
    """Names of the model's fields and of the models inside."""
    schema = cls.model_json_schema()
    objects = [schema, *schema.get("$defs", {}).values()]
    return frozenset(name for each in objects for name in each.get("properties", ()))


def _request_error(error: ValidationError, fields: frozenset[str]) -> RequestError:
    errors = error.errors(include_url=False)
    if errors[0]["type"] == "json_invalid":
        return RequestError(
            f"The body is not valid JSON, or nested too deeply: {errors[0]['ctx']['error']}.", code="invalid_json"
        )
    # Branches of a union appear in the location by their type's name; they are no part of the field's path. The branch that
    # was followed furthest is the one that was meant.
    paths = [[p for p in each["loc"] if isinstance(p, int) or p in fields] for each in errors]
    path = max(paths, key=len)
    param = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")
    if not param:
        return RequestError("The body must be a JSON object.", code="invalid_json")
    found = [each for each, where in zip(errors, paths, strict=True) if where == path]
    if found[0]["type"] == "missing":
        return RequestError(f"{param} is missing.", param=param, code="missing_required_parameter")
    rules = dict.fromkeys(each["msg"].lower().removeprefix("input should be ") for each in found)
    return RequestError(f"{param} must be {' or '.join(rules)}.", param=param, code="invalid_type")


_logged: set[str] = set()


def _log_once(name: str) -> None:
    if len(_logged) < 100 and name not in _logged:
        _logged.add(name)
        logger.info("a request has the unknown field %r; it is ignored (said once)", name[:80])
