"""Structured output on the engine's side: grammars are compiled on threads of their own, then each choice has a matcher that
says which tokens may come next."""

from __future__ import annotations

import json
import re
import secrets
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from sightline.errors import EngineError, GrammarCostError
from sightline.prompt.grammar import limits, source_text
from sightline.types import Grammar

# Compiled grammars kept for the next request that asks for the same one.
_MAX_KEPT = 64
# How llguidance says that a bound of `limits` is passed; any other error is a mistake of ours.
_TOO_COSTLY = re.compile("too many|too large|fuel", re.IGNORECASE)


class Matcher:
    """One choice's place in its grammar. mask: int32 [ceil(V / 32)], one bit for each token, what `fill` wrote last.

    Nothing but `ready` and `start` may be called before `start`. Every method raises `EngineError` when the grammar fails.
    """

    def __init__(self, compiled: Future[LLMatcher], tokenizer: Future[LLTokenizer], vocab_size: int) -> None:
        self.compiled = compiled
        self._tokenizer = tokenizer
        self.started = False
        self.mask = np.full(-(-vocab_size // 32), -1, dtype=np.int32)

    @property
    def ready(self) -> bool:
        """The grammar is compiled, or has failed."""
        return self.compiled.done()

    def start(self) -> None:
        """Begin an answer; only when ready."""
        self._matcher = self.compiled.result().deep_copy()
        self._words = np.zeros(-(-self._tokenizer.result().vocab_size // 32), dtype=np.int32)
        self._check()
        self.started = True

    @property
    def ended(self) -> bool:
        """Nothing may follow: the answer is complete."""
        return self._matcher.is_stopped()

    def fill(self) -> None:
        """Write which tokens may come next. After an error all may."""
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        self.mask[:] = -1 if self._matcher.is_error() else self._words[: len(self.mask)]
        self._check()

    def accept(self, token_id: int) -> None:
        """Go on by the token that was chosen."""
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            message = self._matcher.get_error()
            raise (GrammarCostError if _TOO_COSTLY.search(message) else EngineError)(f"grammar: {message}")


class GrammarCompiler:
    """Compiles grammars for one tokenizer. vocab_size: of the output head, which some tokenizers exceed or do not fill."""

    def __init__(self, model_dir: Path, eos_token_ids: Sequence[int], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="grammar")
        self._tokenizer = self._threads.submit(_tokenizer, model_dir, eos_token_ids, vocab_size)
        self._kept: OrderedDict[tuple[str, str], Future[LLMatcher]] = OrderedDict()

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher for one choice, at once; it is ready when its grammar has been compiled."""
        key = (grammar.kind, grammar.text)
        if key not in self._kept:
            self._kept[key] = self._threads.submit(self._compile, grammar)
            if len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return Matcher(self._kept[key], self._tokenizer, self.vocab_size)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        return LLMatcher(self._tokenizer.result(), source_text(grammar), log_level=0, limits=limits())


def wait_for_any(matchers: Iterable[Matcher], timeout: float) -> None:
    """Return when one of them is ready, or after `timeout` seconds."""
    wait([matcher.compiled for matcher in matchers], timeout=timeout, return_when=FIRST_COMPLETED)


def _tokenizer(model_dir: Path, eos_token_ids: Sequence[int], vocab_size: int) -> LLTokenizer:
    eos = [i for i in eos_token_ids if i < vocab_size] or None
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(_without_spellings(json.loads((model_dir / "tokenizer.json").read_text("utf-8"))), file)
        file.flush()
        tokenizer = LLTokenizer(file.name, eos_token=eos)
        if tokenizer.vocab_size >= vocab_size:
            return tokenizer
        return LLTokenizer(file.name, n_vocab=vocab_size, eos_token=eos)


def _without_spellings(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json with added tokens that no text spells.

    Text that a grammar forces is tokenised, and would come out as the added token that it spells ("<|im_end|>" in an enum), which
    then does not match the grammar: llguidance takes no added token for its text. Grammars name them by id.
    """
    names = {token["content"]: f"<added {secrets.token_hex(16)}>" for token in tokenizer.get("added_tokens", ())}
    for token in tokenizer.get("added_tokens", ()):
        token["content"] = names[token["content"]]
    model = tokenizer["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): i for text, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if "unk_token" in model:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    return tokenizer
