"""What POST /v1/responses is made of: input items as a chat's messages, flat tools, and the answer's output items and events."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sightline.errors import RequestError
from sightline.prompt.roles import call_arguments
from sightline.prompt.tool_parser import CallArguments, CallStart
from sightline.prompt.tools import ToolUse, read_tools
from sightline.server.schema import check_message

Json = dict[str, Any]

# -- input ---------------------------------------------------------------------------------------------------------------


def read_items(items: Sequence[Mapping[str, Any]], where: str | None = None) -> tuple[list[Json], list[str]]:
    """Messages of a chat, and for each the item that it begins with. Calls that follow each other are one message.

    where: the name of all items, `input[i]` unless given. Raises `RequestError` naming the item.
    """
    messages: list[Json] = []
    origins: list[str] = []
    for i, item in enumerate(items):
        origin = where or f"input[{i}]"
        message = _message(item, origin)
        if message is None:
            continue
        check_message(message, origin)
        previous = messages[-1] if messages else {}
        if "tool_calls" in message and "tool_calls" in previous:
            previous["tool_calls"] += message["tool_calls"]
            continue
        messages.append(message)
        origins.append(origin)
    return messages, origins


def _message(item: Mapping[str, Any], where: str) -> Json | None:
    """A message of a chat; None for an item that says nothing to these models."""
    match item.get("type") or "message":
        case "message":
            _no_files(item.get("content"), f"{where}.content")
            return {"role": item.get("role"), "content": item.get("content")}
        case "function_call":
            function = {name: _string(item, name, where) for name in ("name", "arguments")}
            call_arguments(function["arguments"], f"{where}.arguments")
            call = {"id": _string(item, "call_id", where), "type": "function", "function": function}
            return {"role": "assistant", "content": None, "tool_calls": [call]}
        case "function_call_output":
            output = item.get("output")
            _no_files(output, f"{where}.output")
            if not isinstance(output, str | list):
                raise RequestError(f"{where}.output must be a string or a list of parts.", param=f"{where}.output")
            return {"role": "tool", "tool_call_id": _string(item, "call_id", where), "content": output}
        case "reasoning":
            return None
        case kind:
            raise RequestError(
                f"{where} of type {str(kind)[:40]!r} is not supported; use messages, function_call and "
                "function_call_output.",
                param=f"{where}.type",
            )


def _string(item: Mapping[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{where}.{name} must be a string.", param=f"{where}.{name}")
    return value


def _no_files(content: Any, where: str) -> None:
    for j, part in enumerate(content if isinstance(content, list) else ()):
        if isinstance(part, dict) and part.get("file_id"):
            at = f"{where}[{j}].file_id"
            raise RequestError("file_id: this server keeps no files; send the picture as image_url.", param=at)


def read_flat_tools(tools: Any, tool_choice: Any, parallel: bool | None) -> ToolUse | None:
    """`read_tools` of this API's flat form, where a tool's name lies beside its type."""
    for i, tool in enumerate(tools or ()):
        kind = tool.get("type")
        if kind != "function":
            raise RequestError(
                f"tools[{i}].type: {str(kind)[:40]!r} is not run by this server; only function tools are.",
                param=f"tools[{i}].type",
            )
    try:
        return read_tools([_nested(tool) for tool in tools] if tools else None, _nested_choice(tool_choice), parallel)
    except RequestError as error:
        if error.param is not None:
            error.param = error.param.replace(".function", "").replace(".allowed_tools", "")
        raise


def _nested(tool: Any) -> Any:
    if not isinstance(tool, Mapping):
        return tool
    return {"type": tool.get("type"), "function": {name: value for name, value in tool.items() if name != "type"}}


def _nested_choice(choice: Any) -> Any:
    match choice:
        case {"type": "function", "name": name}:
            return {"type": "function", "function": {"name": name}}
        case {"type": "allowed_tools", "mode": mode, "tools": [*tools]}:
            return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [_nested(t) for t in tools]}}
        case _:
            return choice


# -- output --------------------------------------------------------------------------------------------------------------


def text_part(text: str, logprobs: list[Json]) -> Json:
    """A part of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


class Output:
    """The items of an answer as they grow, and the events that tell of it, still without sequence numbers.

    items: those that have ended.
    """

    def __init__(self) -> None:
        self.items: list[Json] = []
        self._text = ""
        self._logprobs: list[Json] = []
        self._message: Json | None = None
        self._call: Json | None = None

    @property
    def is_empty(self) -> bool:
        """Nothing has begun."""
        return not self.items and self._message is None and self._call is None

    def open_message(self) -> Iterator[Json]:
        """A message begins, unless one is open."""
        if self._message is not None:
            return
        yield from self.close("completed")
        self._text, self._logprobs = "", []
        self._message = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        yield self._event("output_item.added", item=self._message)
        yield self._in_part("content_part.added", part=text_part("", []))

    def text(self, text: str, logprobs: list[Json]) -> Iterator[Json]:
        """More of the message."""
        yield from self.open_message()
        self._text += text
        self._logprobs += logprobs
        yield self._in_part("output_text.delta", delta=text, logprobs=logprobs)

    def call(self, piece: CallStart | CallArguments) -> Iterator[Json]:
        """A call begins, and a message that is open ends before it; or more of its arguments."""
        if isinstance(piece, CallStart):
            yield from self.close("completed")
            call = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "call_id": piece.id, "name": piece.name}
            self._call = {**call, "arguments": "", "status": "in_progress"}
            yield self._event("output_item.added", item={**self._call})
            return
        assert self._call is not None
        self._call["arguments"] += piece.text
        yield self._event("function_call_arguments.delta", item_id=self._call["id"], delta=piece.text)
        if piece.complete:
            yield from self._close_call("completed")

    def _close_call(self, status: str) -> Iterator[Json]:
        call, self._call = self._call, None
        if call is None:
            return
        call["status"] = status
        named = {"name": call["name"], "arguments": call["arguments"]}
        yield self._event("function_call_arguments.done", item_id=call["id"], **named)
        yield self._event("output_item.done", item=call)
        self.items.append(call)

    def close(self, status: str) -> Iterator[Json]:
        """End the message or the call that is open, if one is."""
        yield from self._close_call(status)
        if self._message is None:
            return
        part = text_part(self._text, self._logprobs)
        yield self._in_part("output_text.done", text=self._text, logprobs=self._logprobs)
        yield self._in_part("content_part.done", part=part)
        item = {**self._message, "status": status, "content": [part]}
        yield self._event("output_item.done", item=item)
        self.items.append(item)
        self._message = None

    def _event(self, kind: str, **fields: Any) -> Json:
        return {"type": f"response.{kind}", "output_index": len(self.items), **fields}

    def _in_part(self, kind: str, **fields: Any) -> Json:
        assert self._message is not None
        return self._event(kind, item_id=self._message["id"], content_index=0, **fields)


def named_in_input(param: str, origins: Sequence[str]) -> str:
    """A field of a chat's messages, as a field of the input."""
    found = re.match(r"messages\[(\d+)\]", param)
    return origins[int(found[1])] + param[found.end() :] if found else param.replace("messages", "input")
