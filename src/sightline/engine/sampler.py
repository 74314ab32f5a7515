"""Chooses the next token of every row of a step.

The order, for one row: the grammar's mask, logit_bias, min_tokens, repetition penalty (prompt and answer), frequency and
presence penalties (answer only), temperature, top_k, top_p, min_p, draw. Log-probabilities are taken before all of that,
from the model's own distribution.

A draw is one uniform number per row, looked up in the row's cumulative distribution. The number is a keyed hash of the
row's seed, its choice index and the count of tokens drawn so far, so it depends on nothing else: not on the other rows,
not on the device, not on whether the request was retracted in between.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sightline.types import SamplingParams, TokenLogprob

# Below this temperature the likeliest token has all the probability that a float can express.
_GREEDY_BELOW = 1e-6


class SampleOutput(NamedTuple):
    """One entry for each row; logprobs is None where none were asked for."""

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]


class Draw:
    """Tokens that a device is choosing. tokens: int64 [S] on the device, for the next step to read there."""

    def __init__(self, tokens: Tensor, asking: list[int], logprobs: Logprobs | None) -> None:
        self.tokens = tokens
        self._asking = asking
        self._logprobs = logprobs
        self._host = tokens.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if tokens.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def result(self) -> SampleOutput:
        """Wait for the tokens."""
        if self._copied is not None:
            self._copied.synchronize()
        token_ids: list[int] = self._host.tolist()
        logprobs: list[TokenLogprob | None] = [None] * len(token_ids)
        if self._logprobs is not None:
            entries = self._logprobs.entries([token_ids[i] for i in self._asking])
            for i, entry in zip(self._asking, entries, strict=True):
                logprobs[i] = entry
        return SampleOutput(token_ids, logprobs)


@dataclass(slots=True, eq=False)
class SamplingState:
    """What one choice carries from token to token. Made by `Sampler.new_state`; only the sampler changes it.

    banned: int64 ids that may not come before min_tokens. bias_ids, bias_values: int64 and float32. counts: float32 [V],
    how often each token is in the answer. seen: bool [V], tokens of prompt or answer. mask: int32 [ceil(V / 32)] on the host,
    one bit for each token that a grammar allows next, or None; whoever owns the grammar writes it before each step.
    """

    params: SamplingParams
    key: bytes
    num_output: int = 0
    mask: np.ndarray | None = None
    banned: Tensor | None = None
    bias_ids: Tensor | None = None
    bias_values: Tensor | None = None
    counts: Tensor | None = None
    seen: Tensor | None = None
    greedy: bool = field(init=False)

    def __post_init__(self) -> None:
        self.greedy = self.params.temperature < _GREEDY_BELOW or self.params.top_k == 1

    @property
    def edits(self) -> bool:
        """The row's logits change before temperature."""
        return (
            self.bias_ids is not None
            or self.counts is not None
            or self.seen is not None
            or (self.banned is not None and self.num_output < self.params.min_tokens)
        )

    @property
    def filters(self) -> bool:
        return self.params.top_k > 0 or self.params.top_p < 1.0 or self.params.min_p > 0.0

    def uniform(self) -> float:
        """The number in [0, 1) that draws the next token: 40 bits, so that scaling it can never round it up to 1."""
        digest = hashlib.blake2b(self.num_output.to_bytes(8, "little"), key=self.key, digest_size=5).digest()
        return int.from_bytes(digest, "little") / (1 << 40)


class Sampler:
    """Batched sampling on one device. seed: where choices without a seed of their own get theirs; None is fresh entropy."""

    def __init__(self, vocab_size: int, device: torch.device, seed: int | None = None) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self._key = os.urandom(32) if seed is None else _derive(b"engine", seed)
        self._num_unseeded = 0
        self._bits = self._tensor([1 << i for i in range(8)], torch.uint8)

    def new_state(
        self, params: SamplingParams, prompt_ids: np.ndarray, eos_ids: Sequence[int], index: int
    ) -> SamplingState:
        """State of choice `index` of a request.

        Ids that the output head lacks (some families' picture placeholders) cannot be drawn: nothing is done about them.
        """
        if params.seed is not None:
            key = _derive(b"choice", params.seed, index)
        else:
            self._num_unseeded += 1
            key = hashlib.blake2b(self._num_unseeded.to_bytes(8, "little"), key=self._key, digest_size=32).digest()
        state = SamplingState(params, key)
        if params.min_tokens:
            # Only what would end the answer; an ignored end-of-sequence token would not.
            banned = {*params.stop_token_ids, *(() if params.ignore_eos else eos_ids)}
            banned = {i for i in banned if i < self.vocab_size}
            state.banned = self._tensor(sorted(banned), torch.int64) if banned else None
        bias = {i: value for i, value in params.logit_bias.items() if i < self.vocab_size}
        if bias:
            state.bias_ids = self._tensor(list(bias), torch.int64)
            state.bias_values = self._tensor(list(bias.values()), torch.float32)
        if params.frequency_penalty or params.presence_penalty:
            state.counts = torch.zeros(self.vocab_size, device=self.device)
        if params.repetition_penalty != 1.0:
            state.seen = torch.zeros(self.vocab_size, dtype=torch.bool, device=self.device)
            seen = np.unique(prompt_ids)
            state.seen[self._tensor(seen[seen < self.vocab_size], torch.int64)] = True
        return state

    def sample(self, logits: Tensor, states: Sequence[SamplingState]) -> SampleOutput:
        """`launch`, and wait."""
        return self.launch(logits, states).result()

    def launch(self, logits: Tensor, states: Sequence[SamplingState]) -> Draw:
        """logits: [len(states), V], overwritten. Draws one token for each row and counts it in the row's state."""
        assert logits.shape == (len(states), self.vocab_size), f"{tuple(logits.shape)} for {len(states)} rows"
        logits = logits.float()
        asking = [i for i, s in enumerate(states) if s.params.logprobs is not None]
        raw = torch.log_softmax(_rows(logits, asking), dim=-1) if asking else None
        self._mask(logits, states)
        for i, state in enumerate(states):
            if state.edits:
                _edit(logits[i], state)
        tokens = self._choose(logits, states)
        for i, state in enumerate(states):
            state.num_output += 1
            if state.counts is not None:
                state.counts[tokens[i : i + 1]] += 1
            if state.seen is not None:
                state.seen[tokens[i : i + 1]] = True
        if raw is None:
            return Draw(tokens, asking, None)
        chosen = tokens if len(asking) == len(states) else tokens[self._tensor(asking, torch.int64)]
        return Draw(tokens, asking, Logprobs(raw, chosen, [states[i].params.logprobs or 0 for i in asking]))

    def _mask(self, logits: Tensor, states: Sequence[SamplingState]) -> None:
        """Rows with a grammar keep what it allows. Their bits go to the device together."""
        masks = {i: s.mask for i, s in enumerate(states) if s.mask is not None}
        if not masks:
            return
        packed = self._tensor(np.stack([mask.view(np.uint8) for mask in masks.values()]), torch.uint8)
        unset = packed.unsqueeze(-1).bitwise_and(self._bits) == 0
        forbidden = unset.flatten(1)[:, : self.vocab_size]
        if len(masks) == len(states):
            logits.masked_fill_(forbidden, -math.inf)
        else:
            index = self._tensor(list(masks), torch.int64)
            logits[index] = logits[index].masked_fill_(forbidden, -math.inf)

    def _choose(self, logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
        """int64 [S]."""
        drawing = [i for i, s in enumerate(states) if not s.greedy]
        if not drawing:
            return logits.argmax(dim=-1)
        if len(drawing) == len(states):
            return self._draw(logits, states)
        index = self._tensor(drawing, torch.int64)
        # Greedy rows are few or many; one argmax over all costs less than picking them out.
        tokens = logits.argmax(dim=-1)
        tokens[index] = self._draw(logits[index], [states[i] for i in drawing])
        return tokens

    def _draw(self, logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
        """int64 [S]: a draw from each row. logits are overwritten."""
        settings = self._tensor(
            [(s.params.temperature, s.params.top_k, s.params.top_p, s.params.min_p, s.uniform()) for s in states],
            torch.float64,
        )
        # The largest becomes 0, so that no temperature can overflow.
        logits.sub_(logits.amax(dim=-1, keepdim=True)).div_(settings[:, :1].float())
        filtered = [i for i, s in enumerate(states) if s.filters]
        if len(filtered) == len(states):
            _filter(logits, settings, states)
        elif filtered:
            index = self._tensor(filtered, torch.int64)
            part = logits[index]
            _filter(part, settings[index], [states[i] for i in filtered])
            logits[index] = part
        weights = logits.exp_()
        cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
        # The first token whose cumulative weight exceeds the number: never one of weight 0.
        tokens = torch.searchsorted(cumulative, settings[:, 4:] * cumulative[:, -1:], right=True)
        tokens = tokens.clamp_(max=logits.shape[1] - 1)
        # ... but for the last bits of a parallel sum, which need not rise everywhere.
        impossible = weights.gather(1, tokens) == 0
        return torch.where(impossible, weights.argmax(dim=-1, keepdim=True), tokens).squeeze(1)

    def _tensor(self, values: object, dtype: torch.dtype) -> Tensor:
        tensor = torch.tensor(values, dtype=dtype)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor


def _derive(purpose: bytes, *numbers: int) -> bytes:
    data = b"".join(n.to_bytes(16, "little", signed=True) for n in numbers)
    return hashlib.blake2b(data, person=purpose, digest_size=32).digest()


def _rows(logits: Tensor, rows: list[int]) -> Tensor:
    return logits if len(rows) == logits.shape[0] else logits[rows]


def _edit(row: Tensor, state: SamplingState) -> None:
    """Bias, min_tokens and penalties, in place on one row [V]."""
    params = state.params
    if state.bias_ids is not None and state.bias_values is not None:
        row[state.bias_ids] += state.bias_values
    if state.banned is not None and state.num_output < params.min_tokens:
        # a grammar that allows only the end goes before min_tokens
        allowed = row.clone() if state.mask is not None else None
        row[state.banned] = -math.inf
        if allowed is not None:
            row.copy_(torch.where(row.isneginf().all(), allowed, row))
    if state.seen is not None:
        r = params.repetition_penalty
        row.copy_(torch.where(state.seen, torch.where(row > 0, row / r, row * r), row))
    if state.counts is not None:
        row -= params.frequency_penalty * state.counts + params.presence_penalty * (state.counts > 0)


def _filter(logits: Tensor, settings: Tensor, states: Sequence[SamplingState]) -> None:
    """top_k, then top_p of what is left, then min_p: one threshold for each row, below which logits become -inf.

    Thresholds keep ties: a token exactly as likely as the last one kept stays too, so the result does not depend on how
    a device sorts equals. The likeliest token always stays.
    """
    # Dividing by a sum does not change ratios, so min_p needs no renormalised probabilities and no sort.
    threshold = settings[:, 3:4].log().float()
    ranked = [i for i, s in enumerate(states) if s.params.top_k > 0 or s.params.top_p < 1.0]
    top_ks = [states[i].params.top_k for i in ranked]
    if len(ranked) == len(states):
        threshold = torch.maximum(threshold, _rank_threshold(logits, settings, top_ks))
    elif ranked:
        ranks = _rank_threshold(logits[ranked], settings[ranked], top_ks)
        threshold[ranked] = torch.maximum(threshold[ranked], ranks)
    logits.masked_fill_(logits < threshold, -math.inf)


def _rank_threshold(logits: Tensor, settings: Tensor, top_ks: Sequence[int]) -> Tensor:
    """[R, 1]: the smallest logit that top_k and top_p keep. Rows are shifted so that their largest logit is 0."""
    vocab = logits.shape[1]
    ordered = _descending(logits)
    # 0 and -1 are off.
    ranks = torch.tensor([min(k, vocab) - 1 if k > 0 else vocab - 1 for k in top_ks], device=logits.device).unsqueeze(1)
    smallest = ordered.gather(1, ranks)
    weights = ordered.exp().masked_fill_(ordered < smallest, 0.0)
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    top_p = settings[:, 2:3]
    kept = (cumulative - weights < top_p * cumulative[:, -1:]).sum(dim=-1, keepdim=True)
    # A row of NaN keeps nothing; that must not become an index out of range.
    last = ordered.gather(1, (kept - 1).clamp_(min=0))
    return torch.where(top_p < 1.0, last, smallest)


def _descending(logits: Tensor) -> Tensor:
    """Rows in falling order. On a CPU numpy sorts several times faster than torch."""
    if logits.device.type == "cpu":
        return torch.from_numpy(-np.sort(-logits.numpy(), axis=-1))
    return logits.sort(dim=-1, descending=True).values


class Logprobs:
    """raw: [R, V] log-softmax; tokens: int64 [R], the chosen ones; ks: how many alternatives each row wants.

    A token that the output head lacks (some families' picture placeholders) is impossible.
    """

    def __init__(self, raw: Tensor, tokens: Tensor, ks: list[int]) -> None:
        self._ks = ks
        known = tokens < raw.shape[1]
        chosen = raw.gather(1, (tokens * known).unsqueeze(1)).squeeze(1)
        self._chosen = chosen.masked_fill(~known, -math.inf).to("cpu", non_blocking=True)
        most = min(max(ks), raw.shape[1])
        top = raw.topk(most, dim=-1) if most else None
        self._top = (
            None if top is None else (top.indices.to("cpu", non_blocking=True), top.values.to("cpu", non_blocking=True))
        )

    def entries(self, tokens: Sequence[int]) -> list[TokenLogprob]:
        """Once the copies have arrived."""
        chosen = self._chosen.tolist()
        if self._top is None:
            return [TokenLogprob(token, logprob) for token, logprob in zip(tokens, chosen, strict=True)]
        ids, values = (part.tolist() for part in self._top)
        return [
            TokenLogprob(token, logprob, tuple(zip(ids[i][:k], values[i][:k], strict=True)))
            for i, (token, logprob, k) in enumerate(zip(tokens, chosen, self._ks, strict=True))
        ]
