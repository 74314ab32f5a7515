"""Tools: what a request may declare, and the grammar of calls that must come. `tool_parser` finds the calls in an answer.

Two ways of writing a call are known. `hermes` (Qwen): `<tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call>`.
`llama3`: an answer that is `{"name": ..., "parameters": ...}`, or that has it behind `<|python_tag|>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

import msgspec

from sightline.errors import RequestError
from sightline.prompt.grammar import WHITESPACE
from sightline.prompt.tokenizer import AddedToken, Tokenizer
from sightline.types import Grammar, SamplingParams

MAX_TOOLS = 128
MAX_BYTES = 64 * 1024
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

ParserKind = Literal["hermes", "llama3"]


class Markup(NamedTuple):
    """What stands before and behind a call, what its arguments are called, and whether an answer may begin with one that
    has nothing before it."""

    start: str
    end: str
    arguments: str
    bare: bool


MARKUP: dict[ParserKind, Markup] = {
    "hermes": Markup("<tool_call>", "</tool_call>", "arguments", bare=False),
    "llama3": Markup("<|python_tag|>", ";", "parameters", bare=True),
}


# -- what a request says -----------------------------------------------------------------------------------------------


class ToolUse(NamedTuple):
    """tools: as the request has them. names: those that the model may call, and is told of. forced: whether it must call one.
    parallel: whether it may call several."""

    tools: list[dict[str, Any]]
    names: frozenset[str]
    forced: bool
    parallel: bool

    def callable(self) -> list[tuple[int, dict[str, Any]]]:
        """(place in the request, tool) of those that may be called."""
        return [(i, tool) for i, tool in enumerate(self.tools) if tool["function"]["name"] in self.names]

    @property
    def told(self) -> list[dict[str, Any]]:
        """What the chat template writes down."""
        return [tool for _, tool in self.callable()]


def read_tools(tools: Any, tool_choice: Any = None, parallel: bool | None = None) -> ToolUse | None:
    """`tools`, `tool_choice` and `parallel_tool_calls` of chat completions; None where no tool may be called.

    Raises `RequestError` naming the field.
    """
    if tools is None:
        if tool_choice not in (None, "none", "auto"):
            raise RequestError("tool_choice needs tools.", param="tool_choice")
        return None
    names = _check_tools(tools)
    several = parallel is not False
    match tool_choice:
        case None | "auto":
            return ToolUse(tools, names, False, several)
        case "none":
            return None
        case "required":
            return ToolUse(tools, names, True, several)
        case {"type": "function", "function": {"name": str(name)}}:
            return ToolUse(tools, _known([name], names, "tool_choice.function.name"), True, False)
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required" as mode, "tools": [*allowed]}}:
            where = "tool_choice.allowed_tools.tools"
            few = _known([_name_of(each, f"{where}[{i}]") for i, each in enumerate(allowed)], names, where)
            return ToolUse(tools, few, mode == "required", several)
        case _:
            raise RequestError(
                'tool_choice must be none, auto, required, {"type": "function", "function": {"name": ...}} or '
                '{"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}}.',
                param="tool_choice",
            )


def _check_tools(tools: Any) -> frozenset[str]:
    if not isinstance(tools, list) or not tools:
        raise RequestError("tools must be a non-empty list; leave it out where there are none.", param="tools")
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools may hold at most {MAX_TOOLS} tools.", param="tools")
    if len(json.dumps(tools)) > MAX_BYTES:
        raise RequestError(f"tools are larger than {MAX_BYTES // 1024} KiB; shorten them.", param="tools")
    names: set[str] = set()
    for i, tool in enumerate(tools):
        name = _name_of(tool, f"tools[{i}]")
        where = f"tools[{i}].function"
        function = tool["function"]
        if not _NAME.fullmatch(name):
            rule = "at most 64 letters, digits, underscores and dashes"
            raise RequestError(f"{where}.name must be {rule}.", param=f"{where}.name")
        if name in names:
            raise RequestError(f"tools has {name!r} twice.", param=f"{where}.name")
        names.add(name)
        if not isinstance(function.get("description"), str | None):
            raise RequestError(f"{where}.description must be a string.", param=f"{where}.description")
        if not isinstance(function.get("strict"), bool | None):
            raise RequestError(f"{where}.strict must be true or false.", param=f"{where}.strict")
        parameters = function.get("parameters")
        if parameters is not None and (
            not isinstance(parameters, dict) or parameters.get("type", "object") != "object"
        ):
            raise RequestError(f"{where}.parameters must be a JSON schema of an object.", param=f"{where}.parameters")
    return frozenset(names)


def _name_of(tool: Any, where: str) -> str:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise RequestError(f"{where}.type must be function.", param=f"{where}.type")
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError(f"{where}.function.name is missing.", param=f"{where}.function.name")
    return str(function["name"])


def _known(chosen: list[str], names: Collection[str], where: str) -> frozenset[str]:
    if not chosen:
        raise RequestError(f"{where} is empty.", param=where)
    for name in chosen:
        if name not in names:
            raise RequestError(f"{where}: {name[:64]!r} is not among the tools.", param=where)
    return frozenset(chosen)


def parser_kind(setting: str, template: str) -> ParserKind:
    """How the model writes calls: `setting` unless that is auto, else as its chat template (Jinja text) says.

    Raises `RequestError` when the template does not tell.
    """
    if setting == "hermes" or (setting == "auto" and MARKUP["hermes"].start in template):
        return "hermes"
    if setting == "llama3" or MARKUP["llama3"].start in template or '"parameters"' in template:
        return "llama3"
    raise RequestError(
        "This server cannot tell how its model writes calls of tools; it must be started with --tool-call-parser.",
        param="tools",
    )


# -- calls that must come ----------------------------------------------------------------------------------------------

_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


def argument_grammars(use: ToolUse) -> list[Grammar]:
    """The JSON schema of each tool's arguments, to be checked one by one; errors name the tool."""
    return [
        Grammar("json_schema", json.dumps(_schema(tool)), f"tools[{i}].function.parameters")
        for i, tool in use.callable()
    ]


def tool_sampling(sampling: SamplingParams, use: ToolUse, kind: ParserKind, tokenizer: Tokenizer) -> SamplingParams:
    """The parameters under which calls can be read and, where one is forced, nothing else can be written."""
    token = tokenizer.added.get(MARKUP[kind].start)
    if token is not None and tokenizer.is_special(token.id):
        sampling = msgspec.structs.replace(sampling, skip_special_tokens=False)
    if not use.forced:
        return sampling
    return msgspec.structs.replace(sampling, grammar=call_grammar(use, kind, tokenizer.added))


def call_grammar(use: ToolUse, kind: ParserKind, added_tokens: Mapping[str, AddedToken]) -> Grammar:
    """One call or several, as llguidance's Lark; arguments follow each tool's schema."""
    markup = MARKUP[kind]
    before, after = ("", "") if markup.bare else (markup.start, markup.end)
    # What the tokenizer has a token for must be named as that token, by its id: its characters would not match it.
    opening, closing = (
        f"<[{added_tokens[tag].id}]>" if tag in added_tokens else json.dumps(tag) if tag else ""
        for tag in (before, after)
    )
    several = use.parallel and not markup.bare
    tools = use.callable()
    lines = [
        "start: call" + (' ("\\n" call)*' if several else ""),
        "call: " + " | ".join(f"call_{i}" for i, _ in tools),
    ]
    gap = "" if markup.bare else "\n"
    for i, tool in tools:
        head = json.dumps(f'{gap}{{"name": "{tool["function"]["name"]}", "{markup.arguments}": ')
        schema = {**_schema(tool), "x-guidance": {"whitespace_pattern": WHITESPACE}}
        lines += [
            f"call_{i}: {opening} {head} arguments_{i} {json.dumps('}' + gap)} {closing}",
            f"arguments_{i}: %json {json.dumps(schema)}",
        ]
    return Grammar("lark", "\n".join(lines), "tools")


def _schema(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", **(tool["function"].get("parameters") or _NO_PARAMETERS)}
