"""Calls of tools in an answer, the same for every endpoint that knows tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sightline.prompt.tool_parser import ToolParser
from sightline.prompt.tools import ToolUse, argument_grammars, parser_kind, tool_sampling
from sightline.server.lifecycle import Lifecycle
from sightline.types import Grammar, SamplingParams


class Calls(NamedTuple):
    """parsers: one for each choice, none where no tool may be called. schemas: of forced arguments, to be checked one by one.
    sampling: under which calls can be read."""

    parsers: list[ToolParser]
    schemas: list[Grammar]
    sampling: SamplingParams


def prepare_calls(
    lifecycle: Lifecycle, messages: Sequence[Mapping[str, Any]], use: ToolUse | None, sampling: SamplingParams
) -> Calls:
    """Raises `RequestError` when the model's template does not tell how it writes calls."""
    if use is None:
        return Calls([], [], sampling)
    template = lifecycle.pipeline.template_for(messages, use.told)
    kind = parser_kind(lifecycle.config.tool_call_parser, template.source)
    parsers = [ToolParser(kind, use.names, parallel=use.parallel) for _ in range(sampling.n)]
    schemas = argument_grammars(use) if use.forced else []
    return Calls(parsers, schemas, tool_sampling(sampling, use, kind, lifecycle.pipeline.tokenizer))
