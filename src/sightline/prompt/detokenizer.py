"""Ids to text as they come, cut at the first stop string."""

from __future__ import annotations

from typing import NamedTuple

from sightline.prompt.tokenizer import Tokenizer


class Delta(NamedTuple):
    """text: what may be shown now. num_tokens_used: tokens of this push that belong to the answer. stopped: the stop
    string that was found, after which nothing more may be pushed."""

    text: str
    num_tokens_used: int
    stopped: str | None


class Detokenizer:
    """One answer's text. Joined, the deltas are the decoding of all ids, up to the first stop string.

    Characters are never split; text that may turn out to be the beginning of a stop string is held back until it is
    decided. Stop strings are not looked for before `min_tokens` tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._stream = tokenizer.stream(skip_special_tokens=skip_special_tokens)
        self._stop = stop
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held = ""

    def push(self, token_ids: list[int], *, final: bool = False) -> Delta:
        """Add tokens; `final` flushes what was held back."""
        shown: list[str] = []
        for used, token_id in enumerate(token_ids, 1):
            self._num_tokens += 1
            text = self._stream.push(token_id)
            if not text:
                continue
            self._held += text
            found = self._find_stop() if self._num_tokens > self._min_tokens else None
            if found is not None:
                end, stop = found
                shown.append(self._held[: end if self._include_stop else end - len(stop)])
                self._held = ""
                return Delta("".join(shown), used, stop)
            shown.append(self._release())
        if final:
            shown += [self._held, self._stream.flush()]
            self._held = ""
        return Delta("".join(shown), len(token_ids), None)

    def _find_stop(self) -> tuple[int, str] | None:
        """(end in the held text, stop string) of the stop that ends first; of those, the one that began first."""
        best: tuple[int, str] | None = None
        for stop in self._stop:
            at = self._held.find(stop)
            if at >= 0:
                key = (at + len(stop), at)
                if best is None or key < (best[0], best[0] - len(best[1])):
                    best = (at + len(stop), stop)
        return best

    def _release(self) -> str:
        """Give out all held text but the longest end that could begin a stop string."""
        keep = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self._held)), keep, -1):
                if stop.startswith(self._held[-size:]):
                    keep = size
                    break
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text
