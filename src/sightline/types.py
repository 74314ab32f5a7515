"""Everything that crosses a package or a process boundary.

The HTTP process sends `EngineRequest`, `PutPixels` and `Abort`; the engine process answers `TokenEvent`, `NeedPixels`,
`LoadProgress` and `Ready`. All are msgspec structs, encoded as msgpack: no pickle.
"""

from __future__ import annotations

import enum
import math
from bisect import bisect_left
from collections.abc import Iterable
from functools import reduce
from itertools import accumulate
from operator import add
from typing import Any, Literal, NamedTuple, Self

import msgspec
import numpy as np


class FinishReason(enum.StrEnum):
    """How a choice ended. `stop`, `length` and `tool_calls` are OpenAI's; the others never reach a 200 answer."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    ABORT = "abort"
    ERROR = "error"
    TIMEOUT = "timeout"


class Grammar(msgspec.Struct, frozen=True):
    """What an answer must look like. text: a JSON schema, a JSON list of choices, a regular expression, or a grammar in EBNF
    (llama.cpp's GBNF) or in llguidance's Lark; empty for `json_object`. source: the request's field, for errors."""

    kind: Literal["json_schema", "json_object", "choice", "regex", "ebnf", "lark"]
    text: str = ""
    source: str = "grammar"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose tokens. Ranges are checked by `validate`; the HTTP layer calls it before any work is spent.

    max_tokens: None means up to the context's end. temperature 0 is greedy, and so is top_p 0. top_k 0 means off (-1 is accepted for off).
    logprobs: None is off, k >= 0 returns the chosen token's log-probability and the k most likely ones; they are taken
    from the model's own distribution, before penalties and temperature. n: answers for one prompt, one prefill for all.
    prompt_logprobs: None is off, k >= 0 returns the same for the prompt's tokens from `prompt_logprobs_start` on, but for the
    first of the prompt, which nothing comes before. The prefix cache does not serve what they follow.
    grammar: what every answer must look like; `prompt.grammar.check_grammar` is its check.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 0
    n: int = 1
    grammar: Grammar | None = None

    def validate(self, vocab_size: int | None = None) -> None:
        """Raise `RequestError` naming the field that is out of range."""
        from sightline.errors import RequestError

        def require(ok: bool, param: str, rule: str) -> None:
            if not ok:
                raise RequestError(
                    f"{param} must be {rule}, not {getattr(self, param)!r}.", param=param, code="invalid_value"
                )

        require(self.max_tokens is None or 1 <= self.max_tokens < 2**31, "max_tokens", "at least 1 and below 2**31")
        require(0 <= self.min_tokens < 2**31, "min_tokens", "at least 0 and below 2**31")
        if self.max_tokens is not None:
            require(self.min_tokens <= self.max_tokens, "min_tokens", f"at most max_tokens ({self.max_tokens})")
        require(0.0 <= self.temperature < math.inf, "temperature", "a finite number of at least 0")
        require(0.0 <= self.top_p <= 1.0, "top_p", "between 0 and 1")
        require(-1 <= self.top_k < 2**31, "top_k", "-1 or 0 (off) or a positive count")
        require(0.0 <= self.min_p <= 1.0, "min_p", "between 0 and 1")
        require(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer")
        require(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "between -2 and 2")
        require(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "between -2 and 2")
        require(0.0 < self.repetition_penalty <= 2.0, "repetition_penalty", "above 0 and at most 2")
        require(self.logprobs is None or 0 <= self.logprobs <= 20, "logprobs", "between 0 and 20")
        require(self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= 20, "prompt_logprobs", "between 0 and 20")
        require(0 <= self.prompt_logprobs_start < 2**31, "prompt_logprobs_start", "at least 0 and below 2**31")
        require(1 <= self.n <= 128, "n", "between 1 and 128")
        require(all(self.stop), "stop", "made of non-empty strings")
        require(
            all(-100.0 <= v <= 100.0 for v in self.logit_bias.values()), "logit_bias", "made of values in [-100, 100]"
        )
        if vocab_size is not None:
            require(all(0 <= t < vocab_size for t in self.logit_bias), "logit_bias", f"keyed by ids below {vocab_size}")
            require(
                all(0 <= t < vocab_size for t in self.stop_token_ids),
                "stop_token_ids",
                f"made of ids below {vocab_size}",
            )


class ImageRef(msgspec.Struct, frozen=True):
    """One picture of a prompt.

    digest: 32 bytes, a keyed hash of the encoded bytes, the tenant and the processor's settings; the picture's identity
    in the prefix cache and in the vision cache. offset: index of its first placeholder in `input_ids`. num_tokens:
    placeholders it fills. grid: (t, h, w) in patches, or what the family's processor puts there.
    """

    digest: bytes
    offset: int
    num_tokens: int
    grid: tuple[int, int, int]


class View(msgspec.Struct, frozen=True, kw_only=True):
    """What a family's processor makes of a picture, step by step; sizes and places are (width, height) and (x, y) in pixels.

    background: the picture is put in the middle of a square of this colour first. size: resized to this. resample: with this
    filter, numbered as Pillow's. canvas: then laid on black of this size (None: the picture's own), its corner at `at`, which
    crops it where negative. tile: then cut into squares of this side, row by row: [tiles, tile, tile, 3]; 0: [H, W, 3].
    """

    size: tuple[int, int]
    resample: int
    background: tuple[int, int, int] | None = None
    canvas: tuple[int, int] | None = None
    at: tuple[int, int] = (0, 0)
    tile: int = 0


class Pixels(NamedTuple):
    """uint8 pixels of one picture: of its views, or, where `views` says what is still to be made of it, upright RGB [H, W, 3]."""

    array: np.ndarray
    views: tuple[View, ...] = ()


class PixelBuffer(msgspec.Struct, frozen=True):
    """`Pixels` of one picture, in a file of the run directory, see `sightline.engine.loop.PixelFiles`."""

    digest: bytes
    shape: tuple[int, ...]
    name: str
    views: tuple[View, ...] = ()


class EngineRequest(msgspec.Struct, kw_only=True, tag=True):
    """One prompt for the engine. Everything in it has been validated.

    input_ids: int32 little-endian bytes, length 4 L. positions: int32 bytes of shape [3, L] (multimodal rotary), or
    empty for 0..L-1. position_delta: rotary position of token i >= L is i + position_delta. cache_salt: the tenant;
    prefixes are shared only under an equal salt. pixels: buffers of the pictures that the sender believes unknown.
    max_wait: seconds after which a request that has not begun ends with `FinishReason.TIMEOUT`. timed: events shall carry
    `Times`.
    """

    request_id: str
    input_ids: bytes
    sampling: SamplingParams
    positions: bytes = b""
    position_delta: int = 0
    images: tuple[ImageRef, ...] = ()
    pixels: tuple[PixelBuffer, ...] = ()
    cache_salt: bytes = b""
    max_wait: float = float("inf")
    timed: bool = False


class PutPixels(msgspec.Struct, tag=True):
    """The answer to `NeedPixels`."""

    pixels: tuple[PixelBuffer, ...]


class Abort(msgspec.Struct, tag=True):
    """The client is gone, or a stop string was found. Unknown ids are ignored."""

    request_id: str
    index: int | None = None


class FlushCache(msgspec.Struct, tag=True):
    """Forget cached prefixes and encoded pictures that no running request uses."""


class Shutdown(msgspec.Struct, tag=True):
    """End the engine process now; requests in flight are dropped. orphaned: nobody asked, the one who would is gone."""

    orphaned: bool = False


class TokenLogprob(msgspec.Struct, frozen=True):
    """Log-probability (natural log) of one generated token, and of the most likely alternatives."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Times(msgspec.Struct, kw_only=True):
    """When the engine did what for a request, in seconds of this machine's monotonic clock; 0 for what has not happened.

    encode_began, encode_ended: from the first of its pictures that went to the encoder to the last that left it.
    """

    arrived: float
    begun: float = 0.0
    encode_began: float = 0.0
    encode_ended: float = 0.0
    first_token: float = 0.0


class TokenEvent(msgspec.Struct, kw_only=True, tag=True, omit_defaults=True):
    """New tokens of one choice. The last event of a choice carries `finish_reason`.

    num_cached_tokens: prompt tokens found in the prefix cache, set on a choice's first event and after.
    prompt_logprobs: of the prompt's tokens, if asked for, on the first event of choice 0.
    stop_token_id: the end-of-sequence or stop id that ended it (also the last of `token_ids`), if one did.
    error: text for the server's log when finish_reason is `error`; never shown to a client. grammar_cost: what failed is the
    request's grammar, which passed a bound. times: of a request that asked for them, with its first choice's first event and its
    last.
    """

    request_id: str
    index: int = 0
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob] | None = None
    error: str | None = None
    grammar_cost: bool = False
    times: Times | None = None


class NeedPixels(msgspec.Struct, tag=True):
    """The engine has neither features nor cached prefix for these pictures of a request."""

    request_id: str
    digests: list[bytes]


class LoadProgress(msgspec.Struct, tag=True):
    """Where start-up stands. fraction is within the phase, 0 to 1, or None when it cannot be known."""

    phase: str
    fraction: float | None = None
    detail: str = ""


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What the device's memory is spent on, in bytes, and what fits.

    image_token_bytes: vision cache of one placeholder's features; 0 where pictures stand beside the text.
    """

    device: str
    weights: int
    vision_cache: int
    kv_cache: int
    kv_bytes_per_token: int
    num_pages: int
    page_size: int
    context_length: int
    max_running_requests: int
    image_token_bytes: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of K/V that fit at once."""
        return self.num_pages * self.page_size


class Ready(msgspec.Struct, tag=True):
    """The engine has answered a request of its own; real ones may come."""

    plan: MemoryPlan
    load_seconds: float


class Fatal(msgspec.Struct, tag=True):
    """The engine process ends: `exit_code` and a message for the operator."""

    exit_code: int
    message: str


# Upper bounds of every histogram of times, in seconds: from a token of a small model to the longest request.
SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
    300.0,
    600.0,
)


class Histogram(msgspec.Struct):
    """Times since start. counts: how many were at most each of `SECONDS` and above the one before; the last, longer. total: their sum."""

    counts: list[int] = msgspec.field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    total: float = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        """Count a time, or several equal ones."""
        self.counts[bisect_left(SECONDS, seconds)] += times
        self.total += seconds * times

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, how many were at most that), as Prometheus counts: each holds those before it."""
        bounds = (*map(str, SECONDS), "+Inf")
        return list(zip(bounds, map(float, accumulate(self.counts)), strict=True))

    def __add__(self, other: Self) -> Histogram:
        counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        return Histogram(counts, self.total + other.total)


class EngineStats(msgspec.Struct, kw_only=True, tag=True):
    """A snapshot of the engine's counters, sent with events at most a few times a second. Totals since start.

    queried_tokens: tokens of prompts that were looked up in the prefix cache when a request got its turn; cached_tokens of
    them were there. recomputed_tokens: tokens whose K/V was given back by retractions. queue_seconds: from arrival to the
    first step; prefill_seconds: from there to the first token; encode_seconds: the part of a step that encodes its
    pictures (on a GPU: that launches it); step_seconds: one turn of the loop. aborts_waiting, aborts_prefill: of the aborts,
    those of answers that had no pages, and of those whose prompt was being computed; the others were being decoded.
    pages_lost: pages in use that no running answer owns; anything but 0 is a fault of ours.
    """

    num_running: int = 0
    num_waiting: int = 0
    pages_free: int = 0
    pages_cached: int = 0
    pages_in_use: int = 0
    pages_total: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    images_encoded: int = 0
    vision_cache_hits: int = 0
    vision_cache_bytes: int = 0
    retractions: int = 0
    aborts: int = 0
    aborts_waiting: int = 0
    aborts_prefill: int = 0
    finished: int = 0
    steps: int = 0
    pages_locked: int = 0
    pages_lost: int = 0
    queried_tokens: int = 0
    recomputed_tokens: int = 0
    image_tokens: int = 0
    waiting_tokens: int = 0
    vision_cache_misses: int = 0
    vision_cache_evictions: int = 0
    vision_cache_capacity: int = 0
    queue_seconds: Histogram = msgspec.field(default_factory=Histogram)
    prefill_seconds: Histogram = msgspec.field(default_factory=Histogram)
    encode_seconds: Histogram = msgspec.field(default_factory=Histogram)
    step_seconds: Histogram = msgspec.field(default_factory=Histogram)

    @property
    def kv_usage(self) -> float:
        """Part of the K/V pages, 0 to 1, that cannot be had without setting an answer back."""
        return (self.pages_in_use + self.pages_locked) / self.pages_total if self.pages_total else 0.0

    @property
    def aborts_decode(self) -> int:
        """Answers that ended while their tokens came, because nobody wanted them any more."""
        return self.aborts - self.aborts_waiting - self.aborts_prefill

    @property
    def prefix_hit_rate(self) -> float:
        """Part of the tokens looked up in the prefix cache, 0 to 1, that were there."""
        return self.cached_tokens / self.queried_tokens if self.queried_tokens else 0.0

    @property
    def pictures_asked(self) -> int:
        """Pictures whose features were looked up."""
        return self.vision_cache_hits + self.vision_cache_misses


def summed(stats: Iterable[EngineStats]) -> EngineStats:
    """The counters of several engines together; at least one."""
    each = list(stats)
    return EngineStats(**{f: reduce(add, (getattr(s, f) for s in each)) for f in EngineStats.__struct_fields__})


ToEngine = EngineRequest | PutPixels | Abort | FlushCache | Shutdown
FromEngine = TokenEvent | NeedPixels | LoadProgress | Ready | Fatal | EngineStats

encode_message = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(list[ToEngine]).decode
decode_from_engine = msgspec.msgpack.Decoder(list[FromEngine]).decode


def ids_to_bytes(ids: Any) -> bytes:
    """int32 little-endian bytes of a sequence or array of ids."""
    return np.ascontiguousarray(ids, dtype="<i4").tobytes()


def ids_from_bytes(data: bytes) -> np.ndarray:
    """The inverse of `ids_to_bytes`: a read-only int32 array."""
    return np.frombuffer(data, dtype="<i4")
