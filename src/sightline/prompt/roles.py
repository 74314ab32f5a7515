"""Messages in the shape that templates know: the deprecated function fields under today's names, arguments as objects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sightline.errors import RequestError


def template_message(message: Mapping[str, Any], param: str) -> dict[str, Any]:
    """One message, its content unchanged. param: its place in the request, e.g. "messages[2]"."""
    plain = {key: value for key, value in message.items() if key not in ("tool_calls", "function_call")}
    if plain.get("role") == "function":
        plain["role"] = "tool"
    calls = message.get("tool_calls")
    if message.get("function_call") and not calls:
        plain["tool_calls"] = [_call({"function": message["function_call"]}, f"{param}.function_call")]
    elif calls:
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise RequestError("tool_calls must be a list.", param=f"{param}.tool_calls")
        plain["tool_calls"] = [_call(call, f"{param}.tool_calls[{i}]") for i, call in enumerate(calls)]
    if "tool_calls" in plain and plain.get("role") != "assistant":
        raise RequestError("Only messages of the assistant have tool_calls.", param=f"{param}.tool_calls")
    return plain


def _call(call: Any, param: str) -> dict[str, Any]:
    """A call with its arguments as an object: templates write them as JSON themselves."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RequestError("A tool call needs a function with a name.", param=f"{param}.function")
    arguments = call_arguments(function.get("arguments"), f"{param}.function.arguments")
    return {**call, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def call_arguments(arguments: Any, param: str) -> dict[str, Any]:
    """A call's arguments, or their text, as an object. Raises `RequestError` where they are none."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, Mapping):
        raise RequestError("The arguments of a call must be a JSON object.", param=param)
    return dict(arguments)
