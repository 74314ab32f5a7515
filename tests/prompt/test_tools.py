"""What a request may say about tools, and calls found in text however it is cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer as HFTokenizer

from sightline.errors import RequestError
from sightline.prompt.grammar import check_grammar, limits, source_text
from sightline.prompt.named_templates import NAMED_TEMPLATES
from sightline.prompt.tokenizer import Tokenizer
from sightline.prompt.tool_parser import CallArguments, CallStart, ToolParser, folded
from sightline.prompt.tools import (
    MAX_BYTES,
    MAX_TOOLS,
    argument_grammars,
    call_grammar,
    parser_kind,
    read_tools,
)
from sightline.types import Grammar
from tests import tiny


def tool(name: str = "weather", **function: Any) -> dict:
    return {"type": "function", "function": {"name": name, **function}}


def hermes(name: str, **arguments: Any) -> str:
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


def parse(kind: Any, *pieces: str, parallel: bool = True) -> tuple[str, list[tuple[str, Any]]]:
    """(content, calls) of an answer that comes in these pieces; arguments that are cut off as their text."""
    parser = ToolParser(kind, {"weather", "time"}, parallel=parallel)
    found = [each for piece in pieces for each in parser.feed(piece)] + parser.feed("", final=True)
    text, calls = folded(found)
    assert [call.index for call in calls] == list(range(len(calls)))
    assert all(call.id.startswith("call_") and len(call.id) == 29 for call in calls)
    assert len({call.id for call in calls}) == len(calls)
    assert all(call.arguments.encode() for call in calls)  # UTF-8 can hold them
    assert parser.called == (bool(calls) and calls[-1].complete)
    check_order(found)
    return text, [(call.name, json.loads(call.arguments) if call.complete else call.arguments) for call in calls]


def check_order(found: list) -> None:
    """Pieces of arguments belong to the newest call, are never empty, and end with the one that says so."""
    newest, complete = -1, True
    for piece in found:
        if isinstance(piece, CallStart):
            newest, complete = newest + 1, False
            assert piece.index == newest
        elif isinstance(piece, CallArguments):
            assert (piece.index, complete) == (newest, False)
            assert piece.text
            complete = piece.complete


PARIS = ("weather", {"city": "Paris"})
TRICKY = {"city": 'a "}{" \\ b </tool_call> <|python_tag|> é \U0001f600', "deep": [{"x": {}}]}
LLAMA = '{"name": "weather", "parameters": {"city": "Paris"}}'

CASES: list[tuple[str, str, str, list]] = [
    ("hermes", "Just words.", "Just words.", []),
    ("hermes", " words, < and <tool and {} \n\n", " words, < and <tool and {} \n\n", []),
    ("hermes", hermes("weather", city="Paris"), "", [PARIS]),
    ("hermes", "\n\n" + hermes("weather", city="Paris") + "\n", "", [PARIS]),
    ("hermes", "Let me see.\n" + hermes("weather", city="Paris"), "Let me see.", [PARIS]),
    ("hermes", hermes("weather", city="Paris") + "\n" + hermes("time"), "", [PARIS, ("time", {})]),
    ("hermes", hermes("weather", city="Paris") + hermes("time") + " done", " done", [PARIS, ("time", {})]),
    ("hermes", hermes("time", a="}"), "", [("time", {"a": "}"})]),
    ("hermes", hermes("time", a="{", b='\\"{'), "", [("time", {"a": "{", "b": '\\"{'})]),
    ("hermes", hermes("weather", **TRICKY), "", [("weather", TRICKY)]),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "time"}</tool_call>', "", [("time", {"a": 1})]),
    ("hermes", '<tool_call>{"name": "time"}', "", [("time", {})]),
    ("hermes", '<tool_call>{"name": "time", "arguments": "{\\"a\\": 1}"}</tool_', "", [("time", {"a": 1})]),
    ("hermes", '<tool_call>{"name": "time", "arguments": {"a": "\\ud83d"}}', "", [("time", {"a": "\ud83d"})]),
    (
        "hermes",
        '<tool_call>{"name": "time", "arguments": {"a": "\\ud83d\\ude00"}}',
        "",
        [("time", {"a": "\U0001f600"})],
    ),
    ("hermes", '<tool_call>{"name":"time" ,"arguments" : {"a": 1} }</tool_call> x', " x", [("time", {"a": 1})]),
    ("hermes", '<tool_call>{"id": "\\"}", "name": "time", "arguments": {}}', "", [("time", {})]),
    ("hermes", '<tool_call>{"name": "time", "arguments": {}, "id": {"}": 3}}</tool_call>', "", [("time", {})]),
    ("hermes", '<tool_call>{"name": "time", "arguments": {}, "id": 3', "", [("time", {})]),
    ("hermes", '<tool_call>{"name": "time", "arguments": {}</tool_call>' + hermes("time"), "", [("time", {})] * 2),
    ("hermes", '<tool_call>{"name": "time", "arguments": {} and so on', " and so on", [("time", {})]),
    ("hermes", f'<tool_call>{{"x": "{"y" * 600}", "name": "time", "arguments": {{}}}}', "", [("time", {})]),
    ("llama3", '{"type": "function", "name": "weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
    ("llama3", LLAMA, "", [PARIS]),
    ("llama3", " \n" + LLAMA + "\n", "", [PARIS]),
    ("llama3", "<|python_tag|>" + LLAMA, "", [PARIS]),
    ("llama3", "I look.<|python_tag|>" + LLAMA, "I look.", [PARIS]),
    ("llama3", LLAMA + "; " + LLAMA, "", [PARIS, PARIS]),
    ("llama3", "It is {not} a call.", "It is {not} a call.", []),
    ("llama3", "See: " + LLAMA, "See: " + LLAMA, []),
]
# A call that is cut off has what came of its arguments.
for cut in ("{", '{"city": "Par', '{"city": "Paris"', '{"city": "a \\" }', '{"deep": {"x": 1}'):
    CASES.append(("hermes", f'Yes. <tool_call>{{"name": "weather", "arguments": {cut}', "Yes.", [("weather", cut)]))
    CASES.append(
        (
            "hermes",
            hermes("time") + f'<tool_call>{{"name": "weather", "arguments": {cut}',
            "",
            [("time", {}), ("weather", cut)],
        )
    )
    CASES.append(("llama3", f'{{"name": "weather", "parameters": {cut}', "", [("weather", cut)]))
# What looks like a call and is none stays text, to the last character.
for broken in (
    "<tool_call>",
    "<tool_call>\n",
    '<tool_call>\n{"name": "weather", "argum',
    '<tool_call>{"name": "weather", "arguments": ',
    '<tool_call>{"name": "weather", "arguments": "{\\"city\\": ',
    '<tool_call>{"arguments": {"city": "Paris"}, "name": "weat',
    '<tool_call>{"name": "unknown", "arguments": {}}</tool_call> x',
    '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": ["weather"], "arguments": {}}</tool_call>',
    "<tool_call>{'name': 'weather'}</tool_call>",
    "<tool_call> words </tool_call>",
    "<tool_call>{" + '"a":{' * 3000 + "}" * 3001,
):
    CASES.append(("hermes", broken, broken, []))
for broken in (
    '{"answer": 42}',
    '{"name": "weather"',
    '{"name": "weather", "parameters": 3}',
    "<|python_tag|>print(1)",
):
    CASES.append(("llama3", broken, broken, []))


@pytest.mark.parametrize(("kind", "text", "content", "calls"), CASES, ids=lambda value: str(value)[:40])
def test_calls_are_found_however_the_text_is_cut(kind: str, text: str, content: str, calls: list) -> None:
    assert parse(kind, text) == (content, calls)
    if len(text) < 1000:
        assert parse(kind, *text) == (content, calls)
        for at in range(1, len(text)):
            assert parse(kind, text[:at], text[at:]) == (content, calls), at


def test_a_call_between_two_others_that_is_wrong_stays_text() -> None:
    wrong = '<tool_call>{"name": "weather", "arguments": 1}</tool_call>'
    text = hermes("time") + wrong + hermes("weather", city="Paris")
    assert parse("hermes", *text) == (wrong, [("time", {}), PARIS])


def test_calls_after_the_first_are_dropped_unless_parallel() -> None:
    text = "a " + hermes("time") + "\n" + hermes("weather", city="Paris")
    assert parse("hermes", *text, parallel=False) == ("a", [("time", {})])


@pytest.mark.parametrize(("kind", "head"), [("hermes", "<tool_call>\n"), ("llama3", "")])
def test_arguments_come_as_they_are_written(kind: Any, head: str) -> None:
    """Character by character, and exactly as the model writes them."""
    parser = ToolParser(kind, {"weather"})
    written = '{"city" :  "\\u0050aris \\" }{ é", "n": [1.0, {}]}'
    words = "parameters" if kind == "llama3" else "arguments"
    assert parser.feed(f'{head}{{"name": "weather", "{words}": ') == []
    start, first = parser.feed("{")
    assert isinstance(start, CallStart)
    assert (start.index, start.name, first) == (0, "weather", CallArguments(0, "{", complete=False))
    assert not parser.called
    pieces = [parser.feed(character) for character in written[1:]]
    late = [i for i, each in enumerate(pieces) if not each]
    assert all(written[1:][i] == "\\" for i in late)  # half of an escape waits for its other half
    flat = [piece for each in pieces for piece in each]
    assert "".join(piece.text for piece in flat) == written[1:]
    assert [piece.complete for piece in flat] == [False] * (len(flat) - 1) + [True]
    assert parser.called


def test_text_is_shown_at_once_up_to_what_may_begin_a_call() -> None:
    parser = ToolParser("hermes", {"time"})
    assert parser.feed("Hello") == ["Hello"]
    assert parser.feed(" <b> <tool") == [" <b>"]
    assert parser.feed("box>") == [" <toolbox>"]


def test_long_answers_take_linear_time() -> None:
    text = '<tool_call>{"name": "time", "arguments": {"x": "' + "{}" * 100_000 + '"}}</tool_call>'
    content, calls = parse("hermes", *(text[i : i + 4] for i in range(0, len(text), 4)))
    assert content == ""
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("template", "kind"), [("qwen2-vl", "hermes"), ("chatml-llava", "hermes"), ("llama_3_vision", "llama3")]
)
def test_the_template_tells_how_calls_are_written(template: str, kind: str) -> None:
    assert parser_kind("auto", NAMED_TEMPLATES[template]) == kind
    assert parser_kind("llama3", NAMED_TEMPLATES[template]) == "llama3"
    assert parser_kind("hermes", "") == "hermes"


def test_a_template_that_does_not_tell_is_an_error() -> None:
    with pytest.raises(RequestError, match="--tool-call-parser"):
        parser_kind("auto", "{{ tools }}")


BAD: list[tuple[str, dict]] = [
    ("tools", {"tools": []}),
    ("tools", {"tools": {}}),
    ("tools", {"tools": [tool(f"t{i}") for i in range(MAX_TOOLS + 1)]}),
    ("tools", {"tools": [tool(description="x" * MAX_BYTES)]}),
    ("tools[0].type", {"tools": [{"type": "custom", "custom": {"name": "x"}}]}),
    ("tools[0].type", {"tools": ["weather"]}),
    ("tools[0].function.name", {"tools": [{"type": "function", "function": {}}]}),
    ("tools[0].function.name", {"tools": [tool("get weather")]}),
    ("tools[0].function.name", {"tools": [tool("<|im_end|>")]}),
    ("tools[0].function.name", {"tools": [tool("x" * 65)]}),
    ("tools[0].function.name", {"tools": [tool("weather\n")]}),
    ("tools[1].function.name", {"tools": [tool(), tool()]}),
    ("tools[0].function.description", {"tools": [tool(description=1)]}),
    ("tools[0].function.strict", {"tools": [tool(strict="yes")]}),
    ("tools[0].function.parameters", {"tools": [tool(parameters=[])]}),
    ("tools[0].function.parameters", {"tools": [tool(parameters={"type": "string"})]}),
    ("tool_choice", {"tools": None, "tool_choice": "required"}),
    ("tool_choice", {"tools": [tool()], "tool_choice": "always"}),
    ("tool_choice", {"tools": [tool()], "tool_choice": {"type": "function"}}),
    ("tool_choice.function.name", {"tools": [tool()], "tool_choice": tool("other")}),
]
for allowed, field in (([], ""), ([tool("other")], ""), ([{"type": "function"}], "[0].function.name")):
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": allowed}}
    BAD.append((f"tool_choice.allowed_tools.tools{field}", {"tools": [tool()], "tool_choice": choice}))


@pytest.mark.parametrize(("param", "fields"), BAD, ids=[f"{i} {param}" for i, (param, _) in enumerate(BAD)])
def test_what_is_wrong_is_named(param: str, fields: dict) -> None:
    with pytest.raises(RequestError) as caught:
        read_tools(**fields)
    assert caught.value.param == param


def test_choices_say_what_may_be_called() -> None:
    tools = [tool("weather"), tool("time", parameters={"type": "object"}, strict=True)]
    assert read_tools(None) is read_tools(None, "auto") is read_tools(tools, "none") is None
    both = frozenset({"weather", "time"})
    assert read_tools(tools) == read_tools(tools, "auto", True) == (tools, both, False, True)
    assert read_tools(tools, "required", False) == (tools, both, True, False)
    assert read_tools(tools, tool("time")) == (tools, frozenset({"time"}), True, False)
    for mode in ("auto", "required"):
        choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [tool("time")]}}
        use = read_tools(tools, choice)
        assert use == (tools, frozenset({"time"}), mode == "required", True)
        assert use is not None
        assert use.told == tools[1:]


# -- grammars ----------------------------------------------------------------------------------------------------------

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [tool("weather", parameters=CITY), tool("time")]


def tokenizer_file(folder: Path, special: bool | None) -> Path:
    """The tiny checkpoint's tokenizer; with tokens for Qwen's tags unless `special` is None."""
    spec = json.loads((tiny.qwen2_vl() / "tokenizer.json").read_text())
    if special is not None:
        tags = ("<tool_call>", "</tool_call>")
        spec["added_tokens"] += [
            {**spec["added_tokens"][0], "id": 334 + i, "content": tag, "special": special} for i, tag in enumerate(tags)
        ]
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(spec))
    return path


def accepts(path: Path, grammar: Grammar, text: str) -> bool:
    """Whether the text's tokens, each allowed by the mask before, are a whole answer."""
    matcher = LLMatcher(LLTokenizer(str(path), n_vocab=352), source_text(grammar), log_level=0, limits=limits())
    assert not matcher.is_error(), matcher.get_error()
    for token_id in HFTokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids:
        mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        if not mask[token_id] or not matcher.consume_token(token_id):
            return False
    return bool(matcher.is_accepting())


@pytest.mark.parametrize("special", [None, False, True], ids=["no tokens", "added tokens", "special tokens"])
def test_forced_calls_in_qwens_way(tmp_path: Path, special: bool | None) -> None:
    path = tokenizer_file(tmp_path, special)
    tags = {t.content: t for t in Tokenizer(tmp_path).added.values() if "tool_call" in t.content}
    assert len(tags) == (0 if special is None else 2)
    one, two = hermes("weather", city="Paris"), hermes("time")

    def allowed(text: str, choice: Any = "required", parallel: bool | None = None) -> bool:
        use = read_tools(TOOLS, choice, parallel)
        assert use is not None
        return accepts(path, check_grammar(call_grammar(use, "hermes", tags)), text)

    assert allowed(one)
    assert allowed(two)
    assert allowed(one + "\n" + two + "\n" + one)
    assert not allowed(one + "\n" + two, parallel=False)
    assert not allowed(one + "\n" + one, tool("weather"))
    assert not allowed(one, tool("time"))
    assert not allowed(hermes("weather", town="Paris"))
    assert not allowed(hermes("time", city="Paris"))
    assert not allowed("Well. " + one)
    assert not allowed("")


def test_forced_calls_in_llamas_way(tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path, None)
    use = read_tools(TOOLS, "required")
    assert use is not None
    grammar = check_grammar(call_grammar(use, "llama3", {}))
    assert accepts(path, grammar, LLAMA)
    assert not accepts(path, grammar, LLAMA + "; " + LLAMA)
    assert not accepts(path, grammar, hermes("weather", city="Paris"))


def test_a_schema_that_cannot_be_followed_names_its_tool() -> None:
    bad = tool("sort", parameters={"type": "object", "properties": {"x": {"type": "array", "uniqueItems": True}}})
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [tool("sort")]}}
    use = read_tools([tool("time"), bad], choice)
    assert use is not None
    with pytest.raises(RequestError, match="uniqueItems") as caught:
        [check_grammar(grammar) for grammar in argument_grammars(use)]
    assert caught.value.param == "tools[1].function.parameters"
