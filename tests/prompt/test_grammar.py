"""Which grammars a request may ask for, and what it is told about the others."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from sightline.errors import RequestError
from sightline.prompt import grammar as module
from sightline.prompt.grammar import MAX_DEPTH, check_grammar, check_in_time, grammar_of
from sightline.types import Grammar

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"regex": None, "response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar("json_object", "", "response_format")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            Grammar("json_schema", json.dumps(SCHEMA), "response_format.json_schema.schema"),
        ),
        (
            {"text.format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
            Grammar("json_schema", json.dumps(SCHEMA), "text.format.schema"),
        ),
        ({"json_schema": json.dumps(SCHEMA)}, Grammar("json_schema", json.dumps(SCHEMA), "json_schema")),
        ({"regex": "a+"}, Grammar("regex", "a+", "regex")),
        ({"ebnf": 'root ::= "a"'}, Grammar("ebnf", 'root ::= "a"', "ebnf")),
        ({"guided_choice": ["a", "b"]}, Grammar("choice", '["a", "b"]', "guided_choice")),
        ({"guided_json": SCHEMA}, Grammar("json_schema", json.dumps(SCHEMA), "guided_json")),
        ({"structured_outputs": {"regex": "a+", "json": None}}, Grammar("regex", "a+", "structured_outputs.regex")),
        ({"structured_outputs": {"json_object": True}}, Grammar("json_object", "", "structured_outputs.json_object")),
    ],
)
def test_fields_become_one_grammar(fields: dict[str, Any], expected: Grammar | None) -> None:
    assert grammar_of(fields) == expected
    if expected is not None:
        assert check_grammar(expected) is expected


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"regex": "a", "ebnf": 'root ::= "a"'}, "ebnf", "regex and ebnf"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice", "leave one out"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml", "not supported"),
        ({"response_format": {"type": "xml"}}, "response_format", "'xml'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "missing"),
        ({"guided_choice": "a"}, "guided_choice", "list"),
        ({"regex": ""}, "regex", "non-empty"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        grammar_of(fields)
    assert caught.value.param == param


def doubling(levels: int, wrap: str | None = None) -> dict[str, Any]:
    """Each definition holds the next one twice."""
    defs: dict[str, Any] = {f"d{levels}": {"type": "string", "pattern": "a+"}}
    for i in range(levels):
        ref: dict[str, Any] = {"$ref": f"#/$defs/d{i + 1}"}
        defs[f"d{i}"] = {"allOf": [{"properties": {wrap: ref}} if wrap else ref] * 2}
    return {"$ref": "#/$defs/d0", "$defs": defs}


def chain(length: int, form: str) -> dict[str, Any]:
    """Each definition is the next one."""
    refs: list[dict[str, Any]] = [{"$ref": f"#/$defs/d{i + 1}"} for i in range(length)]
    defs = {f"d{i}": {"allOf": [ref]} if form == "allOf" else ref for i, ref in enumerate(refs)}
    return {"$ref": "#/$defs/d0", "$defs": {**defs, f"d{length}": {"type": "string"}}}


@pytest.mark.check(38, cases=1)
@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (Grammar("json_schema", '{"type": "array", "uniqueItems": true}'), "uniqueItems"),
        (Grammar("json_schema", '{"type": "text"}'), "text"),
        (Grammar("json_schema", '{"type": "string", "format": "colour"}'), "colour"),
        (Grammar("json_schema", '{"$ref": "http://localhost/x.json"}'), "another document"),
        (Grammar("json_schema", '{"$ref": "#/$defs/x"}'), "does not exist"),
        (Grammar("json_schema", "{"), "valid JSON"),
        (Grammar("json_schema", "[" * 100_000), "nested too deeply"),
        (Grammar("json_schema", "3"), "an object"),
        (Grammar("json_schema", json.dumps(nested(MAX_DEPTH))), "levels deep"),
        (Grammar("json_schema", json.dumps({"enum": list(range(20_000))})), "values"),
        (Grammar("json_schema", json.dumps({"description": "x" * 200_000})), "KiB"),
        (Grammar("json_schema", "false"), "an object"),
        (Grammar("json_schema", json.dumps(doubling(20))), "merges"),
        (Grammar("json_schema", json.dumps(doubling(20, "a"))), "merges"),
        (Grammar("json_schema", json.dumps(chain(100, "plain"))), "leads through more"),
        (Grammar("json_schema", json.dumps(chain(2000, "allOf"))), "too often"),
        (Grammar("json_schema", '{"$ref": "#"}'), "back to itself"),
        (
            Grammar(
                "json_schema",
                '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}',
            ),
            "back to itself",
        ),
        (Grammar("regex", "(?=a)b"), "look-around"),
        (Grammar("regex", "(" * 5000), "regex"),
        (Grammar("ebnf", "root ::= other"), "other"),
        (Grammar("ebnf", "root ::= " + "(" * 5000), "cannot be used"),
        (Grammar("ebnf", 'start: "a" <|im_end|>'), "names tokens"),
        (Grammar("ebnf", "start: <[5]>"), "names tokens"),
        (Grammar("ebnf", "start: <[*]>"), "names tokens"),
        (Grammar("lark", "start: other"), "other"),
        (Grammar("choice", "[]"), "non-empty"),
        (Grammar("choice", json.dumps([str(i) for i in range(2000)])), "choices"),
    ],
)
def test_bad_grammars_are_refused(grammar: Grammar, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        check_grammar(grammar)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, "grammar", "invalid_value")


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("json_schema", json.dumps(doubling(5))),
        Grammar(
            "json_schema", '{"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}}'
        ),
        Grammar("json_schema", '{"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "integer"}}}'),
        Grammar("ebnf", 'start: "<|im_end|>"'),
    ],
)
def test_what_only_looks_like_it_is_taken(grammar: Grammar) -> None:
    assert check_grammar(grammar) is grammar


@pytest.mark.check(38, cases=1)
def test_a_slow_check_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT", 0.05)
    monkeypatch.setattr(module, "check_grammar", lambda grammar: time.sleep(0.5))
    with pytest.raises(RequestError, match="simpler"):
        asyncio.run(check_in_time(Grammar("regex", "a")))
