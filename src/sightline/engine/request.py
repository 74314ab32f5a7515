"""One choice of one request, as the scheduler sees it: token ids, counters, pages. No tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sightline.types import FinishReason, ImageRef, SamplingParams, Times, TokenLogprob

if TYPE_CHECKING:
    from sightline.cache.radix import Node
    from sightline.engine.grammar import Matcher


@dataclass(slots=True, eq=False)
class Request:
    """Tokens are the prompt followed by everything generated so far; K/V exist for the first `num_computed` of them.

    A step computes tokens num_computed .. num_computed + q_len and samples a new one when it reaches the last. Decoding
    is the special case of one token left, and recomputation after a retraction is nothing but a longer prefill.

    num_in_flight: tokens that launched steps sample and that are not known yet, 0 or 1. They count as tokens, so that the
    next step can be prepared while the device still computes them.

    pages: physical pages, in order; the first `num_tree_pages` belong to the prefix cache (held by a lock on `node`), the
    rest to this request. pinned: digests of the pictures whose features this request holds in the vision cache.
    leader: the first choice of the same request; this one waits until the leader's prompt is in the prefix cache.
    start_by: when the request ends with a timeout if it has not begun. arrived, begun: when it came and when its first step ran.
    matcher: where the answer stands in its grammar; the request waits until it has started. times: kept if somebody asked.
    prompt_logprobs: of the prompt's tokens, as far as they are known, if they are asked for; one choice has them for all.
    """

    request_id: str
    index: int
    prompt_ids: np.ndarray
    sampling: SamplingParams
    max_tokens: int
    sampling_state: Any
    positions: np.ndarray | None = None
    position_delta: int = 0
    images: tuple[ImageRef, ...] = ()
    cache_salt: bytes = b""
    leader: Request | None = None
    start_by: float = float("inf")
    arrived: float = 0.0
    matcher: Matcher | None = None
    times: Times | None = None

    output_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    num_in_flight: int = 0
    num_computed: int = 0
    num_cached: int = 0
    pages: list[int] = field(default_factory=list)
    num_tree_pages: int = 0
    node: Node | None = None
    prompt_keys: list[bytes] | None = None
    pinned: set[bytes] = field(default_factory=set)
    asked_pixels: set[bytes] = field(default_factory=set)
    num_retractions: int = 0
    begun: float | None = None
    finish_reason: FinishReason | None = None

    @property
    def prompt_len(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens, the one in flight included."""
        return len(self.prompt_ids) + len(self.output_ids) + self.num_in_flight

    @property
    def all_sampled(self) -> bool:
        """max_tokens are generated or in flight: there is nothing left to launch."""
        return len(self.output_ids) + self.num_in_flight >= self.max_tokens

    @property
    def remaining(self) -> int:
        """Tokens without K/V; 1 while decoding."""
        return self.num_tokens - self.num_computed

    @property
    def in_prefill(self) -> bool:
        """More than the newest token is missing, or nothing has been generated yet."""
        return self.remaining > 1 or not (self.output_ids or self.num_in_flight)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def first_unscored(self) -> int:
        """The first prompt token whose log-probability is asked for and not known; `prompt_len` when there is none.

        Nothing comes before the first token, so it has none.
        """
        if self.sampling.prompt_logprobs is None or self.index:
            return self.prompt_len
        return min(max(self.sampling.prompt_logprobs_start, 1) + len(self.prompt_logprobs), self.prompt_len)

    @property
    def num_reusable(self) -> int:
        """Tokens whose K/V may come from the prefix cache: what the next token, or one to be scored, follows is computed."""
        first = self.first_unscored
        return (self.num_tokens if first == self.prompt_len else first) - 1

    def add_prompt_logprobs(self, first: int, entries: list[TokenLogprob]) -> None:
        """Of the tokens from `first` on; a chunk that was computed again tells nothing new."""
        missing = self.first_unscored - first
        assert missing >= 0, "a prompt token was not scored"
        self.prompt_logprobs += entries[missing:]

    def ids(self, start: int, end: int) -> np.ndarray:
        """int32 ids of tokens start..end, all known."""
        n = len(self.prompt_ids)
        assert end <= n + len(self.output_ids), "a token that is still in flight has no id yet"
        if end <= n:
            return self.prompt_ids[start:end]
        tail = np.asarray(self.output_ids[max(start - n, 0) : end - n], dtype=np.int32)
        return tail if start >= n else np.concatenate([self.prompt_ids[start:], tail])

    def images_in(self, start: int, end: int) -> list[ImageRef]:
        """Pictures with a placeholder in start..end."""
        return [i for i in self.images if i.offset < end and i.offset + i.num_tokens > start]
