"""Schemas and regular expressions made to be costly: refused or answered in time, while others' streams go on."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import requests

from tests.reliability.conftest import Guarded
from tests.scorecard import scaled
from tests.server.conftest import ask

Count = Callable[..., None]
STRING = {"type": "string"}


def nested(depth: int, key: str) -> dict[str, Any]:
    """A schema inside a schema, so often."""
    schema: dict[str, Any] = STRING
    for _ in range(depth):
        schema = {"type": "array", "items": schema} if key == "items" else {key: [schema, {"type": "integer"}]}
    return schema


def branching(levels: int, key: str) -> dict[str, Any]:
    """Definitions that each hold the next one twice: 2 ** levels when written out."""
    defs: dict[str, Any] = {f"d{levels}": STRING}
    for i in range(levels):
        ref = {"$ref": f"#/$defs/d{i + 1}"}
        defs[f"d{i}"] = (
            {"type": "object", "properties": {"a": ref, "b": ref}} if key == "properties" else {key: [ref, ref]}
        )
    return {"$ref": "#/$defs/d0", "$defs": defs}


SCHEMAS: dict[str, Any] = {
    "of nothing that can be": {"type": "integer", "minimum": 5, "maximum": 4},
    "never": {"not": {}},
    "an enum of none": {"enum": []},
    "an enum of 100,000": {"enum": [f"value {i}" for i in range(100_000)]},
    "one long constant": {"const": "x" * 60_000},
    "a name of 60,000 letters": {"type": "object", "properties": {"x" * 60_000: STRING}, "required": ["x" * 60_000]},
    "5,000 properties": {"type": "object", "properties": {f"p{i}": STRING for i in range(5_000)}},
    "1,000 properties, all required": {
        "type": "object",
        "properties": {f"p{i}": STRING for i in range(1_000)},
        "required": [f"p{i}" for i in range(1_000)],
    },
    "a thousand million items": {"type": "array", "items": STRING, "minItems": 10**9},
    "a thousand million letters": {"type": "string", "minLength": 10**9},
    "negative lengths": {"type": "string", "minLength": -5},
    "bounds of 10 ** 300": {"type": "integer", "minimum": -(10**300), "maximum": 10**300},
    "multiples of next to nothing": {"type": "number", "multipleOf": 1e-300},
    "multiples of nothing": {"type": "number", "multipleOf": 0},
    "200 arrays deep": nested(200, "items"),
    "200 choices deep": nested(200, "anyOf"),
    "100,000 arrays deep": "[" * 100_000,
    "2 ** 30 merged": branching(30, "allOf"),
    "2 ** 30 chosen": branching(30, "anyOf"),
    "2 ** 30 properties": branching(30, "properties"),
    "itself": {"$ref": "#"},
    "itself in every property": {"type": "object", "properties": {c: {"$ref": "#"} for c in "abcdefghij"}},
    "another document": {"$ref": "http://127.0.0.1:1/schema.json"},
    "a file": {"$ref": "file:///etc/passwd"},
    "a pattern that backtracks": {"type": "string", "pattern": "^(a+)+$"},
    "patterns multiplied": {"allOf": [{"type": "string", "pattern": f"(.*{c}){{20}}"} for c in "abcdefgh"]},
    "a pattern of names": {"type": "object", "patternProperties": {"^(a|aa)+$": STRING, ".*": {"type": "integer"}}},
    "types of no name": {"type": ["string", "nonsense"]},
    "a list of schemas": [STRING],
}
REGEXES: dict[str, str] = {
    "backtracking": "(a+)+b",
    "alternatives within repetitions": "(a|b|ab|ba|aba)*c",
    "counted thrice": "((a{100}){100}){100}",
    "a million": "a{1000000}",
    "a million of anything": "[^a]{1000000}",
    "every letter there is": "\\p{L}{5000}",
    "many stars": ".*" * 300 + "x",
    "the last letter but 40": "(a|b)*a(a|b){40}",
    "look-ahead": "(?=a)(?!b)c",
    "a back reference": "(a)\\1",
    "5,000 groups": "(" * 5000 + ")" * 5000,
    "open": "(((",
    "60,000 alternatives": "|".join(f"w{i}" for i in range(9000)),
    "NUL": "\0+",
    "half a surrogate": "\\uD800",
}


def bodies() -> list[tuple[str, dict[str, Any]]]:
    made: list[tuple[str, dict[str, Any]]] = []
    for name, schema in SCHEMAS.items():
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        made.append((f"schema: {name}", {"response_format": form}))
    return made + [(f"regex: {name}", {"regex": regex}) for name, regex in REGEXES.items()]


def gaps(server: Guarded, stop: threading.Event) -> list[float]:
    """Seconds between the chunks of streams, one after the other, until `stop`; at least of one."""
    found: list[float] = []
    while not found or not stop.is_set():
        body = {"messages": ask("go on"), "max_tokens": 200, "ignore_eos": True, "stream": True}
        headers = {"x-api-key": "alpha"}
        with requests.post(
            f"{server.url}/v1/chat/completions", json=body, headers=headers, stream=True, timeout=30
        ) as answer:
            times = [time.monotonic() for line in answer.iter_lines() if line.startswith(b"data: {")]
        found += [b - a for a, b in pairwise(times)]
    return found


@pytest.mark.check(38)
def test_hostile_grammars(guarded: Guarded, count: Count) -> None:
    """A 4xx or an answer, each within two seconds."""
    stop = threading.Event()
    stop.set()
    alone = statistics.quantiles(gaps(guarded, stop), n=100)[98]
    stop.clear()
    beside: list[float] = []
    other = threading.Thread(target=lambda: beside.extend(gaps(guarded, stop)))
    other.start()
    every = bodies()
    assert len(every) >= 40
    step = round(len(every) / scaled(len(every), 10))
    slowest, refused = ("", 0.0), 0
    try:
        for name, fields in every[::step]:
            began = time.monotonic()
            response = guarded.post({"messages": ask("x"), **fields})
            took = time.monotonic() - began
            slowest = max(slowest, (name, took), key=lambda each: each[1])
            assert response.status_code in (200, 400), (name, response.text)
            assert len(response.content) <= 4096, name
            assert took < 2.5, f"{name}: {took:.1f} s"
            refused += response.status_code != 200
    finally:
        stop.set()
        other.join()
    during = statistics.quantiles(beside, n=100)[98]
    count(
        len(every[::step]),
        f"{refused} refused; slowest {slowest[1]:.2f} s ({slowest[0]}); others' gaps p99 {during * 1e3:.0f} ms, alone "
        f"{alone * 1e3:.0f} ms",
    )
