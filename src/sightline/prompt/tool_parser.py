"""The calls of tools in an answer's text, found while it comes."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from sightline.prompt.tools import MARKUP, ParserKind

_HALF = re.compile(r"[\ud800-\udfff]")
_STRING = r'"(?:[^"\\]|\\.)*"'
# A call up to its arguments' first character. What stands before them, the name for one, is a string.
_HEAD = re.compile(rf'\{{\s*(?:{_STRING}\s*:\s*{_STRING}\s*,\s*)*"(?:arguments|parameters)"\s*:\s*(?=\{{)')
_MAX_HEAD = 512


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins; its arguments follow."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the newest call's arguments: pieces of the text of a JSON object. complete: it is the last of them."""

    index: int
    text: str
    complete: bool


Piece = str | CallStart | CallArguments


@dataclass(slots=True)
class ToolCall:
    """One call. arguments: the text of a JSON object; only its beginning where the answer was cut (`complete` is false)."""

    index: int
    id: str
    name: str
    arguments: str = ""
    complete: bool = False


def folded(pieces: Iterable[Piece]) -> tuple[str, list[ToolCall]]:
    """Text and calls of an answer's pieces."""
    text = ""
    calls: list[ToolCall] = []
    for piece in pieces:
        match piece:
            case str():
                text += piece
            case CallStart():
                calls.append(ToolCall(piece.index, piece.id, piece.name))
            case CallArguments():
                calls[-1].arguments += piece.text
                calls[-1].complete = piece.complete
    return text, calls


class ToolParser:
    """Splits one answer's text, as it comes, into what the user may read and calls.

    A call begins when a known name and the beginning of its arguments are there, and from then on its arguments are given out as
    they come, as the model writes them. Whatever else looked like a call is text. White space around calls is dropped. Without
    `parallel`, calls after the first are dropped. The sum of the pieces does not depend on how the text was cut.
    """

    def __init__(self, kind: ParserKind, names: Collection[str], *, parallel: bool = True) -> None:
        self._markup = MARKUP[kind]
        self._names = names
        self._parallel = parallel
        self._text = ""
        self._may_be_bare = self._markup.bare
        # What to do with the text: each gives pieces, or None when more must come first.
        self._step: Callable[[bool], list[Piece] | None] = self._outside
        self._object = _ObjectScanner(0)
        self._head_may_come = False
        self.num_calls = 0

    @property
    def called(self) -> bool:
        """The answer has calls, and none of them is still being written."""
        return self.num_calls > 0 and not (self._step == self._arguments and self._shown)

    def feed(self, text: str, *, final: bool = False) -> list[Piece]:
        """What is certain now; `final` ends the answer."""
        self._text += text
        found: list[Piece] = []
        while (pieces := self._step(final)) is not None:
            found += pieces
        if final and self._text:
            if self._step != self._arguments:
                found.append(self._text)
            self._text = ""
        return _joined(found)

    # -- outside of calls ----------------------------------------------------------------------------------------------

    def _outside(self, final: bool) -> list[Piece] | None:
        start, text = self._markup.start, self._text
        bare = text.lstrip()
        if self._may_be_bare and bare:
            if bare[0] == "{":
                return self._enter(len(text) - len(bare))
            self._may_be_bare = False
        at = text.find(start)
        if at >= 0:
            if shown := text[:at].rstrip():
                self._text = text[len(shown) :]
                return [shown]
            after = text[at + len(start) :].lstrip()
            if not after:
                return None
            if after[0] == "{":
                return self._enter(len(text) - len(after))
            self._text = text[at + len(start) :]
            return [text[: at + len(start)]]
        keep = _overlap(text, start)
        shown = text[: len(text) - keep].rstrip()
        self._text = text[len(shown) :]
        if final and self.num_calls and not self._text.strip():
            self._text = ""
        return [shown] if shown else None

    def _enter(self, at: int) -> list[Piece]:
        """An object begins at this place of the text, behind what is text if it turns out to be no call."""
        self._object = _ObjectScanner(at)
        self._head_may_come = True
        self._step = self._before_arguments
        return []

    # -- in a call -----------------------------------------------------------------------------------------------------

    def _before_arguments(self, final: bool) -> list[Piece] | None:
        if self._head_may_come and (started := self._started()):
            return started
        start, end = self._object.start, self._object.end(self._text)
        if end is None:
            return None
        call = self._whole(self._text[start:end])
        shown, self._text = self._text[:end], self._text[end:]
        if call is None:
            self._may_be_bare = False
            self._step = self._outside
            return [shown]
        self._step = self._behind_call
        name, arguments = call
        begun = self._begin(name)
        return [*begun, CallArguments(self.num_calls - 1, arguments, complete=True)] if begun else []

    def _started(self) -> list[Piece] | None:
        """A call whose arguments have begun."""
        at = self._object.start
        head = _HEAD.match(self._text, at, at + _MAX_HEAD)
        self._head_may_come = head is None and len(self._text) < at + _MAX_HEAD
        name = _loaded(f"{head.group()}{{}}}}").get("name") if head else None
        if head is None or not isinstance(name, str) or name not in self._names:
            return None
        self._text = self._text[head.end() :]
        self._object = _ObjectScanner(0)
        self._step = self._arguments
        return self._begin(name)

    def _begin(self, name: str) -> list[Piece]:
        self.num_calls += 1
        return [CallStart(self.num_calls - 1, f"call_{uuid.uuid4().hex[:24]}", name)] if self._shown else []

    @property
    def _shown(self) -> bool:
        return self._parallel or self.num_calls == 1

    def _arguments(self, final: bool) -> list[Piece] | None:
        end = self._object.end(self._text)
        pieces = self._piece(end)
        if end is not None:
            self._step = self._behind_arguments
            return pieces
        return pieces or None

    def _piece(self, end: int | None = None) -> list[Piece]:
        """Arguments up to their end, or all that is there."""
        size = len(self._text) if end is None else end
        if end is None and self._object.in_escape:
            size -= 1
        text, self._text = self._text[:size], self._text[size:]
        self._object.drop(size)
        return [CallArguments(self.num_calls - 1, text, complete=end is not None)] if text and self._shown else []

    def _behind_arguments(self, final: bool) -> list[Piece] | None:
        """The rest of the object, which is nobody's, and may be missing."""
        bare = self._text.lstrip()
        if self._markup.end.startswith(bare):
            self._text = "" if final else self._text
            return None
        if bare[0] == ",":
            self._object = _ObjectScanner(0, depth=1)
            self._step = self._rest
        else:
            self._text = bare[1:] if bare[0] == "}" else self._text
            self._step = self._behind_call
        return []

    def _rest(self, final: bool) -> list[Piece] | None:
        end = self._object.end(self._text)
        if end is None:
            self._text = "" if final else self._text
            return None
        self._text = self._text[end:]
        self._step = self._behind_call
        return []

    def _behind_call(self, final: bool) -> list[Piece] | None:
        end, bare = self._markup.end, self._text.lstrip()
        if not bare.startswith(end) and end.startswith(bare):
            self._text = "" if final else self._text
            return None
        self._text = bare.removeprefix(end) if bare.startswith(end) else self._text
        self._may_be_bare = self._markup.bare
        self._step = self._outside
        return []

    def _whole(self, text: str) -> tuple[str, str] | None:
        """Name and arguments of an object that is a call without having begun as one."""
        try:
            value = json.loads(text)
            arguments = value.get("arguments", value.get("parameters", {}))
            if isinstance(arguments, str):
                arguments = json.loads(arguments)
            if value.get("name") not in self._names or not isinstance(arguments, Mapping):
                return None
            written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
            if _HALF.search(written):
                written = json.dumps(arguments)  # UTF-8 has no halves of pairs
        except (ValueError, TypeError, RecursionError):
            return None
        return value["name"], written


class _ObjectScanner:
    """Finds the end of the JSON object that begins at `start` of a text that grows; each character is read once.

    depth: how many objects are open before the first character.
    """

    _STRUCTURE = re.compile(r'["{}]')
    _IN_STRING = re.compile(r'["\\]')

    def __init__(self, start: int, depth: int = 0) -> None:
        self.start = start
        # The text so far ends with a backslash whose character is missing.
        self.in_escape = False
        self._position = start
        self._depth = depth
        self._in_string = False

    def end(self, text: str) -> int | None:
        """The index behind the object, or None when it is not complete."""
        self.in_escape = False
        while match := (self._IN_STRING if self._in_string else self._STRUCTURE).search(text, self._position):
            character, self._position = match.group(), match.end()
            if character == "\\":
                if self._position == len(text):
                    self._position -= 1
                    self.in_escape = True
                    return None
                self._position += 1
            elif character == '"':
                self._in_string = not self._in_string
            else:
                self._depth += 1 if character == "{" else -1
                if self._depth == 0:
                    return self._position
        self._position = len(text)
        return None

    def drop(self, size: int) -> None:
        """The first characters of the text, which have been read, are gone."""
        self._position -= size


def _loaded(text: str) -> dict[str, object]:
    """A JSON object, empty where the text is none."""
    try:
        return dict(json.loads(text))
    except ValueError:
        return {}


def _overlap(text: str, start: str) -> int:
    """Length of the longest end of `text` with which `start` begins."""
    return next((size for size in range(min(len(start) - 1, len(text)), 0, -1) if start.startswith(text[-size:])), 0)


def _joined(found: list[Piece]) -> list[Piece]:
    """With neighbouring texts as one."""
    joined: list[Piece] = []
    for piece in found:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined
