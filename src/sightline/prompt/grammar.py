"""Structured output on the request's side: one grammar out of the request's fields, checked before any work is spent on it."""

from __future__ import annotations

import asyncio
import functools
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import unquote

from llguidance import LLMatcher, LLParserLimits, grammar_from

from sightline.errors import RequestError
from sightline.types import Grammar

MAX_BYTES = 128 * 1024
MAX_DEPTH = 32
MAX_NODES = 10_000
MAX_CHOICES = 1_000
MAX_MERGED = 20_000
TIMEOUT = 2.0

# Between the tokens of JSON: a space, or a new line and its indentation. Without a bound a model may write spaces for ever.
WHITESPACE = r" |\n {0,64}"


def limits() -> LLParserLimits:
    """What one grammar may cost while it is compiled and in each step; what exceeds it is an error of its request.

    Each step's cost is everybody's. With llguidance's own fuel ((a{100}){100}){100} takes seconds for one token.
    """
    return LLParserLimits(
        max_grammar_size=100_000,
        max_lexer_states=50_000,
        initial_lexer_fuel=100_000,
        verbose_errors=False,
    )


def source_text(grammar: Grammar) -> str:
    """The grammar as llguidance's matcher takes it. ValueError when it cannot be read."""
    match grammar.kind:
        case "json_schema" | "json_object":
            text = grammar.text if grammar.kind == "json_schema" else '{"type": "object"}'
            return LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": WHITESPACE})
        case "regex":
            # Answers match as a whole, so the anchors that other engines ask for say nothing new.
            text = grammar.text.removeprefix("^")
            return LLMatcher.grammar_from_regex(re.sub(r"(?<!\\)((?:\\\\)*)\$\Z", r"\1", text))
        case kind:
            return grammar_from(kind, grammar.text)


def check_grammar(grammar: Grammar) -> Grammar:
    """Returns it. Raises `RequestError` for one that is too large, that is wrong, or that asks for what is not supported."""
    where = grammar.source
    if len(grammar.text.encode(errors="surrogatepass")) > MAX_BYTES:
        raise grammar_error(where, f"is larger than {MAX_BYTES // 1024} KiB; make it smaller")
    if grammar.kind == "json_schema":
        _check_schema(grammar.text, where)
    if grammar.kind == "choice":
        _check_choices(grammar.text, where)
    try:
        is_error, messages = LLMatcher.validate_grammar_with_warnings(source_text(grammar), limits=limits())
    except ValueError as error:
        is_error, messages = True, [str(error)]
    if is_error:
        raise grammar_error(where, _told(messages[0]))
    if grammar.kind == "ebnf" and any("no tokenizer" in message for message in messages):
        raise grammar_error(where, "names tokens of the vocabulary, such as <|end|> or <[5]>; write text")
    return grammar


@functools.cache
def _checker() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2, thread_name_prefix="grammar-check")


async def check_in_time(grammar: Grammar) -> None:
    """`check_grammar` on a thread of its own. Raises `RequestError`, also when it takes longer than `TIMEOUT` seconds."""
    try:
        checking = asyncio.get_running_loop().run_in_executor(_checker(), check_grammar, grammar)
        await asyncio.wait_for(checking, TIMEOUT)
    except TimeoutError as error:
        raise grammar_error(
            grammar.source, f"takes longer than {TIMEOUT:g} seconds to read; make it simpler"
        ) from error


def grammar_error(where: str, rule: str) -> RequestError:
    """The field `where` breaks a rule."""
    return RequestError(f"{where} {rule}.", param=where, code="invalid_value")


def _told(message: str) -> str:
    """llguidance's message as the end of a sentence."""
    if found := re.search(r"Unimplemented keys: \[(.*?)\]", message):
        return f"uses keywords that are not supported: {found[1].replace(chr(34), '')[:200]}; leave them out"
    first = " ".join(line.strip() for line in message.splitlines()[:6])
    return f"cannot be used: {first[:300].rstrip('.')}"


def _check_schema(text: str, where: str) -> None:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise grammar_error(where, "is not valid JSON, or nested too deeply") from error
    if not isinstance(schema, dict):
        raise grammar_error(where, "must be a JSON schema: an object")
    references = _References(schema, where)
    level, depth, nodes = [schema], 0, 0
    while level:
        depth, nodes = depth + 1, nodes + len(level)
        if depth > MAX_DEPTH:
            raise grammar_error(where, f"is nested more than {MAX_DEPTH} levels deep; use $ref to $defs")
        if nodes > MAX_NODES:
            raise grammar_error(where, f"has more than {MAX_NODES} values; make it smaller")
        for each in level:
            ref = each.get("$ref") if isinstance(each, dict) else None
            if isinstance(ref, str) and not ref.startswith("#"):
                raise grammar_error(
                    where, f"has the $ref {ref[:80]!r} to another document; only # references are followed"
                )
            if isinstance(each, dict):
                references.check(each)
        level = [
            value
            for each in level
            if isinstance(each, dict | list)
            for value in (each.values() if isinstance(each, dict) else each)
        ]


class _References:
    """Where `$ref` and `allOf` lead. llguidance multiplies out what they put into one place: a kilobyte can take it minutes."""

    def __init__(self, schema: Any, where: str) -> None:
        self._root = schema
        self._where = where
        self._sizes: dict[int, int] = {}

    def check(self, node: dict[str, Any]) -> None:
        """Raises `RequestError` for a place that contains itself, or in which too much comes together."""
        seen, at = {id(node)}, self._target(node)
        while at is not None:
            if id(at) in seen:
                raise grammar_error(self._where, "has a $ref that leads back to itself")
            seen.add(id(at))
            if len(seen) > MAX_DEPTH:
                raise grammar_error(self._where, f"has a $ref that leads through more than {MAX_DEPTH} others")
            at = self._target(at)
        if isinstance(node.get("allOf"), list):
            try:
                size = self._size(node)
            except RecursionError as error:
                raise grammar_error(
                    self._where, "refers from one part to the next too often; make it simpler"
                ) from error
            if size > MAX_MERGED:
                raise grammar_error(self._where, f"merges more than {MAX_MERGED} values by allOf; make it simpler")

    def _size(self, node: Any) -> int:
        """Values below a node, those that it refers to included each time."""
        if not isinstance(node, dict | list):
            return 1
        if id(node) not in self._sizes:
            self._sizes[id(node)] = 1  # what a recursive schema finds of itself
            below = list(node.values()) if isinstance(node, dict) else node
            target = self._target(node)
            self._sizes[id(node)] = 1 + sum(map(self._size, [*below, target]))
        return self._sizes[id(node)]

    def _target(self, node: Any) -> Any:
        """What the node's `$ref` points to, or None."""
        ref = node.get("$ref") if isinstance(node, dict) else None
        if not isinstance(ref, str) or not ref.startswith("#"):
            return None
        at = self._root
        for name in ref[1:].split("/")[1:]:
            key = unquote(name).replace("~1", "/").replace("~0", "~")
            at = at.get(key) if isinstance(at, dict) else None
        return at


def _check_choices(text: str, where: str) -> None:
    choices = json.loads(text)
    if not choices or not all(isinstance(c, str) and c for c in choices):
        raise grammar_error(where, "must be a list of non-empty strings")
    if len(choices) > MAX_CHOICES:
        raise grammar_error(where, f"has more than {MAX_CHOICES} choices; make it shorter")


# -- the request's fields ----------------------------------------------------------------------------------------------


def grammar_of(fields: Mapping[str, Any]) -> Grammar | None:
    """The one grammar among a request's fields (name to value), or None.

    Known are `response_format` (also as `text.format`), SGLang's `json_schema`, `regex` and `ebnf`, vLLM's
    `structured_outputs` and `guided_*`. Raises `RequestError` for one of a wrong shape, or for two.
    """
    found = [grammar for name, value in fields.items() if value is not None for grammar in _read(name, value)]
    if len(found) > 1:
        raise RequestError(
            f"{found[0].source} and {found[1].source} both say what the answer must look like; leave one out.",
            param=found[1].source,
        )
    return found[0] if found else None


def _read(name: str, value: Any) -> list[Grammar]:
    match name:
        case "response_format" | "text.format":
            return _format(name, value)
        case "structured_outputs":
            if not isinstance(value, dict):
                raise grammar_error(name, "must be an object")
            keys = [key for key, inner in value.items() if inner is not None and inner is not False]
            if unknown := [key for key in keys if key not in _KINDS]:
                raise grammar_error(f"{name}.{unknown[0][:40]}", f"is not supported; use one of {', '.join(_KINDS)}")
            return [_grammar(_KINDS[key], value[key], f"{name}.{key}") for key in keys]
        case _:
            return [_grammar(_KINDS[name.removeprefix("guided_")], value, name)]


_KINDS: dict[str, Any] = {
    "json": "json_schema",
    "json_schema": "json_schema",
    "json_object": "json_object",
    "regex": "regex",
    "choice": "choice",
    "grammar": "ebnf",
    "ebnf": "ebnf",
}


def _format(name: str, value: Any) -> list[Grammar]:
    """OpenAI's two forms: `{"type": "json_schema", "json_schema": {"schema": ...}}`, and flat in the Responses API."""
    kind = value.get("type") if isinstance(value, dict) else None
    match kind:
        case "text":
            return []
        case "json_object":
            return [Grammar("json_object", "", name)]
        case "json_schema":
            inner, at = (value, name) if name == "text.format" else (value.get("json_schema"), f"{name}.json_schema")
            if not isinstance(inner, dict) or inner.get("schema") is None:
                raise RequestError(f"{at}.schema is missing.", param=f"{at}.schema", code="missing_required_parameter")
            return [_grammar("json_schema", inner["schema"], f"{at}.schema")]
        case None:
            raise RequestError(f"{name}.type is missing.", param=f"{name}.type", code="missing_required_parameter")
        case _:
            raise grammar_error(
                name, f"of type {str(kind)[:40]!r} is not supported; use text, json_object or json_schema"
            )


def _grammar(kind: Any, value: Any, where: str) -> Grammar:
    if kind == "json_object":
        return Grammar(kind, "", where)
    if kind == "choice" and not isinstance(value, list):
        raise grammar_error(where, "must be a list of non-empty strings")
    if kind in ("json_schema", "choice"):
        return Grammar(kind, value if isinstance(value, str) else json.dumps(value), where)
    if not isinstance(value, str) or not value:
        raise grammar_error(where, "must be a non-empty string")
    return Grammar(kind, value, where)
