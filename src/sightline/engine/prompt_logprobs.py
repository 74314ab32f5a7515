"""Log-probabilities of a prompt's own tokens: what the model would have said of each, given those before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sightline.engine.request import Request
from sightline.engine.sampler import Logprobs
from sightline.engine.scheduler import ScheduledRow

# Rows of logits at once: a long prompt's together would not fit.
_ROWS = 128


class ScoredRows(NamedTuple):
    """Packed rows (int [R]) and the tokens that follow them in their prompt; num_top: how many likelier ones are asked for."""

    rows: np.ndarray
    ids: list[int]
    num_top: int


class Scoring(NamedTuple):
    """Rows of one request; `first` is the place in the prompt of the first token that follows one."""

    request: Request
    first: int
    rows: ScoredRows


def scorings(rows: Sequence[ScheduledRow], num_decode: int) -> list[Scoring]:
    """What a step is to score. Decode rows have nothing of the prompt."""
    found, base = [], num_decode
    for row in rows[num_decode:]:
        request = row.request
        first = max(request.first_unscored, row.start + 1)
        end = min(row.start + row.q_len + 1, request.prompt_len)
        if first < end:
            where = np.arange(first, end) - 1 - row.start + base
            num_top = request.sampling.prompt_logprobs or 0
            found.append(Scoring(request, first, ScoredRows(where, request.ids(first, end).tolist(), num_top)))
        base += row.q_len
    return found


def score(model: Any, hidden: Tensor, asked: Sequence[ScoredRows]) -> list[list[Logprobs]]:
    """Launch the log-probabilities of all rows; hidden: [R of all, hidden]. Each entry has those of one of `asked` in parts."""
    scores, begin = [], 0
    for each in asked:
        end = begin + len(each.ids)
        scores.append(list(_parts(model, hidden[begin:end], each)))
        begin = end
    return scores


def _parts(model: Any, hidden: Tensor, asked: ScoredRows) -> Iterator[Logprobs]:
    for begin in range(0, len(asked.ids), _ROWS):
        raw = torch.log_softmax(model.logits(hidden[begin : begin + _ROWS]).float(), dim=-1)
        ids = torch.tensor(asked.ids[begin : begin + _ROWS], device=raw.device)
        yield Logprobs(raw, ids, [asked.num_top] * len(ids))


class Scores:
    """Log-probabilities that a device is computing, and whose they are."""

    def __init__(self, asked: Sequence[Scoring], scores: list[list[Logprobs]], device: torch.device) -> None:
        self._asked = asked
        self._scores = scores
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        if self._copied is not None:
            self._copied.record()

    def deliver(self) -> None:
        """Wait, and give them to their requests."""
        if self._copied is not None:
            self._copied.synchronize()
        for each, parts in zip(self._asked, self._scores, strict=True):
            ids = each.rows.ids
            chunks = (ids[i : i + _ROWS] for i in range(0, len(ids), _ROWS))
            entries = [e for chunk, part in zip(chunks, parts, strict=True) for e in part.entries(chunk)]
            each.request.add_prompt_logprobs(each.first, entries)
