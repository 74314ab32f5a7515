"""Messages to text: a Jinja sandbox, the named templates, and the record of which characters a client typed.

Every added token begins with one of a few characters (mostly "<"). In client strings these are replaced by noncharacters
before rendering and put back after it, when their positions say which of them a client typed: an added token that begins
there is text (`Tokenizer.encode_trusted`). Unlike marks around a string, this survives whatever a template does to it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sightline.errors import CheckpointError, RequestError
from sightline.prompt.named_templates import NAMED_TEMPLATES

_STAND_INS = "".join(map(chr, range(0xFDD0, 0xFDEF)))
# Stands behind the text at which `continue_final_message` ends the prompt.
_MARK = "\ufdef"
# As itself, or as Python's repr and ASCII JSON spell it (a template that prints a list or a dict).
_OWN_STAND_INS = re.compile(f"[{_STAND_INS}]|" + r"\\ufd[de][0-9a-f]")
_MAX_OUTPUT = 16 << 20
_MAX_SECONDS = 10.0
_ALLOWED_KWARGS = frozenset(
    {"add_vision_id", "builtin_tools", "date_string", "documents", "enable_thinking", "tools_in_user_message"}
)


class Rendered(NamedTuple):
    """text, and the positions of token-beginning characters that a client typed."""

    text: str
    client_positions: frozenset[int]


class Shield:
    """Replaces the characters that begin added tokens in client strings, and finds them again after rendering."""

    def __init__(self, added_tokens: Iterable[str]) -> None:
        firsts = sorted({token[0] for token in added_tokens if not (token[0].isalnum() or token[0].isspace())})
        if len(firsts) > len(_STAND_INS):
            raise CheckpointError("tokenizer.json: the added tokens begin with too many different characters.")
        pairs = list(zip(firsts, _STAND_INS, strict=False))
        self._hide = str.maketrans(dict.fromkeys(_STAND_INS + _MARK, "�") | dict(pairs))
        self._show = str.maketrans({stand_in: first for first, stand_in in pairs})

    def hide(self, value: Any) -> Any:
        """A JSON value with every string in it (keys too) shielded."""
        if isinstance(value, str):
            return value.translate(self._hide)
        if isinstance(value, Mapping):
            return {self.hide(k): self.hide(v) for k, v in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, bytes):
            return [self.hide(v) for v in value]
        return value

    def show(self, text: str) -> Rendered:
        """Undo `hide` in a rendered prompt."""
        pieces: list[str] = []
        positions: set[int] = set()
        start = length = 0
        for match in _OWN_STAND_INS.finditer(text):
            stand_in = match.group() if len(match.group()) == 1 else chr(int(match.group()[2:], 16))
            first = stand_in.translate(self._show)
            if first == stand_in:
                continue
            length += match.start() - start
            positions.add(length)
            length += 1
            pieces += [text[start : match.start()], first]
            start = match.end()
        return Rendered("".join([*pieces, text[start:]]), frozenset(positions))


class _Generation(Extension):
    """`{% generation %}` marks an assistant's words for training; here its body counts alone."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One compiled template.

    source: Jinja text. bos_token, eos_token: given to the template. Raises `CheckpointError` when it does not compile.
    """

    def __init__(
        self, source: str, shield: Shield, *, bos_token: str | None = None, eos_token: str | None = None
    ) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
            tree = environment.parse(source)
        except TemplateError as error:
            raise CheckpointError(f"the chat template does not compile: {error}") from error
        self.source = source
        self._shield = shield
        written = {node.attr for node in tree.find_all(nodes.Getattr)}
        written |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        self._has_tools = "tools" in meta.find_undeclared_variables(tree)
        self._has_results = self._has_tools or "tool" in written
        self._has_calls = "tool_calls" in written
        self._has_developer = "developer" in written
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        # A template takes content as a string, as a list of parts, or both; a string if it can.
        self._wants_parts = False
        if not self._shows_words():
            self._wants_parts = True
            self._wants_parts = self._shows_words()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """messages: role and content (a string or parts of type text or image) with plain strings, and an assistant's
        tool_calls with arguments as objects. A developer is the system to a template that knows none.

        Raises `RequestError` when the template has no place for a message or the tools, when it refuses them, or when its
        output or time passes the limits.
        """
        refusal = self.refusal(messages, tools)
        if refusal is not None:
            raise refusal
        unknown = sorted(set(template_kwargs or {}) - _ALLOWED_KWARGS)
        if unknown:
            raise RequestError(
                f"chat_template_kwargs: {unknown[0]!r} is not allowed; allowed are {', '.join(sorted(_ALLOWED_KWARGS))}.",
                param="chat_template_kwargs",
            )
        hidden = [{**m, "content": self._content(m.get("content", ""))} for m in self._shield.hide(messages)]
        if not self._has_developer:
            hidden = [{**m, "role": "system"} if m.get("role") == "developer" else m for m in hidden]
        variables = {
            **self._tokens,
            **self._shield.hide(template_kwargs or {}),
            "messages": _with_mark(hidden) if continue_final_message else hidden,
            "tools": self._shield.hide(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        pieces: list[str] = []
        size, deadline = 0, time.monotonic() + _MAX_SECONDS
        try:
            for piece in self._template.generate(**variables):
                pieces.append(piece)
                size += len(piece)
                if size > _MAX_OUTPUT or time.monotonic() > deadline:
                    raise RequestError("The messages are too long for the chat template.", param="messages")
        except RequestError:
            raise
        except (
            TemplateError,
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            OverflowError,
            RecursionError,
            MemoryError,
        ) as error:
            reason = self._shield.show(str(error)).text.splitlines() or ["it failed"]
            raise RequestError(
                f"The model's chat template cannot render these messages: {reason[0][:200]}", param="messages"
            ) from error
        text = "".join(pieces)
        return self._shield.show(_until_mark(text) if continue_final_message else text)

    def _shows_words(self) -> bool:
        try:
            return "words" in self.render([{"role": "user", "content": "words"}]).text
        except RequestError:
            return False

    def _content(self, content: Any) -> Any:
        """Text alone in the form that the template takes; a template that takes both gets a string."""
        if self._wants_parts:
            return [{"type": "text", "text": content}] * bool(content) if isinstance(content, str) else content
        if isinstance(content, str) or any(part["type"] != "text" for part in content):
            return content
        return "".join(part["text"] for part in content)

    def refusal(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> RequestError | None:
        """What the template has no place for and would leave out, as the client's error."""
        if tools and not self._has_tools:
            return RequestError("This model's chat template has no place for tools.", param="tools")
        for i, message in enumerate(messages):
            if message.get("role") == "tool" and not self._has_results:
                return RequestError(
                    "This model's chat template has no place for messages of the role tool.",
                    param=f"messages[{i}].role",
                )
            if message.get("tool_calls") and not self._has_calls:
                return RequestError(
                    "This model's chat template has no place for calls of tools.", param=f"messages[{i}].tool_calls"
                )
        return None


def load_source(model_dir: Path, override: str | None, fallback: str, variant: str = "default") -> tuple[str, bool]:
    """(Jinja text, whether it is the named fallback).

    override: `--chat-template`, a name, a .jinja file or a .json file in SGLang's form; else the checkpoint's own, from
    chat_template.jinja, chat_template.json or tokenizer_config.json; else the family's named template. variant: which of a
    checkpoint's several templates; one that has a single template has the default variant only.
    """
    if override is not None:
        return _override(override), False
    further = model_dir / "additional_chat_templates" / f"{variant}.jinja"
    if variant != "default" and further.exists():
        return further.read_text(encoding="utf-8"), False
    for name in ("chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json"):
        path = model_dir / name
        if not path.exists():
            continue
        text = path.read_text(encoding="utf-8")
        source = text if name.endswith(".jinja") else json.loads(text).get("chat_template")
        if isinstance(source, list):
            source = next((t["template"] for t in source if t["name"] == variant), None)
        elif variant != "default":
            source = None
        if isinstance(source, str):
            return source, False
    return NAMED_TEMPLATES[fallback], True


def _override(value: str) -> str:
    if value in NAMED_TEMPLATES:
        return NAMED_TEMPLATES[value]
    path = Path(value)
    if not path.is_file():
        raise CheckpointError(
            f"--chat-template {value}: neither a file nor one of the names {', '.join(sorted(NAMED_TEMPLATES))}."
        )
    text = path.read_text(encoding="utf-8")
    return _from_conversation(json.loads(text)) if path.suffix == ".json" else text.strip("\n")


def _from_conversation(spec: Mapping[str, Any]) -> str:
    """SGLang's .json form: the strings `system`, `user`, `assistant` in front of each message, joined by `sep`."""
    missing = [key for key in ("system", "user", "assistant") if not isinstance(spec.get(key), str)]
    if missing:
        raise CheckpointError(f"--chat-template: the .json file lacks {missing[0]!r}.")
    style = str(spec.get("sep_style", "ADD_NEW_LINE_SINGLE")).upper()
    if style not in ("ADD_NEW_LINE_SINGLE", "CHATML", "ADD_COLON_SINGLE", "NO_COLON_SINGLE"):
        raise CheckpointError(f"--chat-template: sep_style {style} is not supported.")
    glue = {"ADD_COLON_SINGLE": ": ", "NO_COLON_SINGLE": ""}.get(style, "\n")
    sep = str(spec.get("sep", "\n"))
    if style == "CHATML":
        sep += "\n"
    literal = {role: json.dumps(str(spec[role])) for role in ("system", "user", "assistant")}
    default = json.dumps(str(spec.get("system_message", "")))
    return (
        "{%- set heads = {'system': "
        + literal["system"]
        + ", 'user': "
        + literal["user"]
        + ", 'assistant': "
        + literal["assistant"]
        + "} -%}{%- macro text(c) -%}{%- if c is string -%}{{ c }}{%- else -%}{%- for p in c -%}"
        "{%- if p.type == 'text' -%}{{ p.text }}{%- else -%}{{ '<image>\\n' }}{%- endif -%}{%- endfor -%}{%- endif -%}"
        "{%- endmacro -%}{%- if messages[0].role != 'system' and "
        + default
        + " -%}{{ heads.system + "
        + json.dumps(glue)
        + " + "
        + default
        + " + "
        + json.dumps(sep)
        + " }}{%- endif -%}{%- for m in messages -%}"
        "{%- if m.role not in heads -%}{{ raise_exception('role ' + m.role + ' is not supported') }}{%- endif -%}"
        "{{ heads[m.role] + " + json.dumps(glue) + " + text(m.content) + " + json.dumps(sep) + " }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ heads.assistant + " + json.dumps(glue.rstrip(" ")) + " }}{%- endif -%}"
    )


def _with_mark(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Shielded messages whose last one's text ends with `_MARK`, for `continue_final_message`."""
    last = dict(messages[-1])
    if last.get("role") == "assistant" and not last.get("tool_calls"):
        if isinstance(last["content"], str):
            text, last["content"] = last["content"], last["content"] + _MARK
        else:
            *others, part = last["content"] or [{}]
            text = part.get("text", "")
            last["content"] = [*others, {**part, "text": text + _MARK}]
        if text.strip():
            return [*messages[:-1], last]
    raise RequestError(
        "continue_final_message needs a last message of the assistant that ends with text.",
        param="continue_final_message",
    )


def _until_mark(text: str) -> str:
    at = text.rfind(_MARK)
    if at < 0:
        raise RequestError(
            "continue_final_message: the model's chat template leaves out the last message.",
            param="continue_final_message",
        )
    return text[:at]


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # As transformers does, without Jinja's HTML escapes.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
