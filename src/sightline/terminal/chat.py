"""`sightline chat`: a conversation with pictures in the terminal, with a server of its own or the one at `--url`."""

from __future__ import annotations

import argparse
import base64
import contextlib
import mimetypes
import shlex
import sys
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import msgspec
from rich.console import Console

from sightline.errors import StartupError
from sightline.terminal.service import Service, add_arguments, from_options, split_flags

_HELP = """  /image PATH or URL ...   pictures for the next question; dropping a file into the terminal types its path
  /system TEXT             how to answer, for the whole conversation
  /clear                   begin a new conversation
  /save FILE               write the conversation as messages for the API, pictures included
  /exit                    or Ctrl-D
Anything else is a question. Ctrl-C stops an answer; what it said so far stays."""


class Trouble(Exception):
    """A command or a question that came to nothing; the message says why."""


class Conversation:
    """Messages as the API takes them. pictures: for the next question."""

    def __init__(self, service: Service, model: str, max_tokens: int | None, temperature: float | None) -> None:
        self._service = service
        fields = {"model": model, "max_tokens": max_tokens, "temperature": temperature}
        self._fields = {name: value for name, value in fields.items() if value is not None}
        self.messages: list[dict[str, Any]] = []
        self.pictures: list[dict[str, Any]] = []
        self.figures = ""

    def add_pictures(self, names: Sequence[str]) -> None:
        """Paths and http(s) URLs. Raises `Trouble` when one cannot be read, and adds none then."""
        self.pictures += [{"type": "image_url", "image_url": {"url": _url(name)}} for name in names]

    def set_system(self, text: str) -> None:
        """The first message."""
        self.messages = [m for m in self.messages if m["role"] != "system"]
        self.messages.insert(0, {"role": "system", "content": text})

    def clear(self) -> None:
        """Begin anew."""
        self.messages, self.pictures = [], []

    def save(self, name: str) -> None:
        """Raises `Trouble`."""
        try:
            Path(name).expanduser().write_bytes(msgspec.json.format(msgspec.json.encode(self.messages), indent=2))
        except OSError as error:
            raise Trouble(f"{name}: {error.strerror}") from error

    def ask(self, question: str) -> Generator[str]:
        """Pieces of the answer as they come. Closing it early keeps what was said; an error leaves everything as it was."""
        content = [*self.pictures, {"type": "text", "text": question}] if self.pictures else question
        messages = [*self.messages, {"role": "user", "content": content}]
        said = ""
        began, first = time.monotonic(), None
        usage: dict[str, Any] = {}
        try:
            for chunk in self._stream(messages):
                usage = chunk.get("usage") or usage
                for choice in chunk.get("choices", ()):
                    if text := choice["delta"].get("content"):
                        first = first or time.monotonic()
                        said += text
                        yield text
        finally:
            if said:
                self.messages = [*messages, {"role": "assistant", "content": said}]
                self.pictures = []
        self.figures = _figures(usage, began, first or time.monotonic())

    def _stream(self, messages: list[dict[str, Any]]) -> Generator[dict[str, Any]]:
        body = {"messages": messages, "stream": True, "stream_options": {"include_usage": True}, **self._fields}
        timeout = httpx2.Timeout(10.0, read=600.0)
        try:
            with httpx2.stream(
                "POST",
                f"{self._service.url}/v1/chat/completions",
                content=msgspec.json.encode(body),
                headers={"content-type": "application/json", **self._service.headers},
                timeout=timeout,
                trust_env=False,
            ) as answer:
                if answer.status_code != 200:
                    raise Trouble(_message(answer.read()))
                for line in answer.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        chunk = msgspec.json.decode(line[6:])
                        if error := chunk.get("error"):
                            raise Trouble(str(error.get("message", error)))
                        yield chunk
        except httpx2.HTTPError as error:
            raise Trouble(f"{self._service.url}: {error or type(error).__name__}") from error


def _url(name: str) -> str:
    if name.lower().startswith(("http://", "https://", "data:")):
        return name
    path = Path(name.removeprefix("file://")).expanduser()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Trouble(f"{name}: {error.strerror}") from error
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _message(body: bytes) -> str:
    try:
        return str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return body[:200].decode(errors="replace")


def _figures(usage: dict[str, Any], began: float, first: float) -> str:
    details = usage.get("prompt_tokens_details") or {}
    names = {"image_tokens": "for pictures", "cached_tokens": "cached"}
    notes = ", ".join(f"{details[key]} {name}" for key, name in names.items() if details.get(key))
    out = usage.get("completion_tokens", 0)
    text = f"{usage.get('prompt_tokens', 0)} tokens in{f' ({notes})' if notes else ''}, {out} out"
    if out > 1:
        text += f", {(out - 1) / max(time.monotonic() - first, 1e-6):.0f} tokens/s"
    return f"{text}, first after {(first - began) * 1e3:.0f} ms"


class Terminal:
    """Reads lines, runs commands, prints answers. With a pipe instead of a person: a question a line, answers only."""

    def __init__(self, conversation: Conversation) -> None:
        self._talk = conversation
        self._person = sys.stdin.isatty() and sys.stdout.isatty()
        self._notes = Console(stderr=True, highlight=False, soft_wrap=True)
        self.failed = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": lambda rest: self._talk.add_pictures(shlex.split(rest)),
            "/system": self._talk.set_system,
            "/clear": lambda rest: self._talk.clear(),
            "/save": lambda rest: self._talk.save(rest),
            "/help": lambda rest: print(_HELP),
        }

    def run(self) -> None:
        """Until the end of input or /exit."""
        if self._person:
            # arrow keys and a history for input()
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401
            print("Type a question, or /help.")
        while (line := self._read()) is not None and line != "/exit":
            try:
                self._take(line)
            except (Trouble, ValueError) as error:
                self.failed = True
                self._notes.print(str(error), style="red", markup=False)

    def _read(self) -> str | None:
        while True:
            try:
                if not self._person:
                    line = sys.stdin.readline()
                    return line.strip() if line else None
                waiting = len(self._talk.pictures)
                return input(f"[{waiting} picture{'s' * (waiting > 1)}] > " if waiting else "> ").strip()
            except EOFError:
                print()
                return None
            except KeyboardInterrupt:
                if not self._person:
                    raise
                print()

    def _take(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if not line:
            return
        if _is_picture(line):
            self._talk.add_pictures(shlex.split(line))
        elif name in self._commands:
            self._commands[name](rest.strip())
        elif name.startswith("/"):
            raise Trouble(f"{name} is no command; /help lists them.")
        else:
            self._answer(line)

    def _answer(self, question: str) -> None:
        with contextlib.closing(self._talk.ask(question)) as pieces:
            try:
                for piece in pieces:
                    print(piece, end="", flush=True)
            except KeyboardInterrupt:
                if not self._person:
                    raise
                print(" ...")
                return
            finally:
                if not sys.stdout.closed:
                    print(flush=True)
        if self._person:
            self._notes.print(self._talk.figures, style="dim")


def _is_picture(line: str) -> bool:
    """A file dropped into the terminal: its path and nothing else, absolute."""
    try:
        words = shlex.split(line)
    except ValueError:
        return False
    return bool(words) and all(word.startswith(("/", "~/")) and Path(word).expanduser().is_file() for word in words)


def _first_model(service: Service) -> str:
    try:
        answer = httpx2.get(f"{service.url}/v1/models", headers=service.headers, timeout=10.0, trust_env=False)
    except httpx2.HTTPError as error:
        raise StartupError(f"{service.url}: {error or type(error).__name__}") from error
    if answer.status_code != 200:
        raise StartupError(f"{service.url}: {_message(answer.content)}")
    return str(answer.json()["data"][0]["id"])


def main(argv: Sequence[str]) -> int:
    """The command. Returns its exit code."""
    words, flags = split_flags(argv)
    parser = argparse.ArgumentParser(
        prog="sightline chat",
        usage="sightline chat [flags] [-- flags of sightline serve]",
        description="A conversation with pictures. Without a terminal: a question a line, answers to standard output.",
    )
    add_arguments(parser)
    parser.add_argument("--max-tokens", type=int, metavar="TOKENS")
    parser.add_argument("--temperature", type=float)
    options = parser.parse_args(words)
    try:
        with from_options(options, flags) as service:
            terminal = Terminal(Conversation(service, _first_model(service), options.max_tokens, options.temperature))
            terminal.run()
    except StartupError as error:
        print(f"sightline chat: {error}", file=sys.stderr)
        return error.exit_code
    return 1 if terminal.failed and not sys.stdin.isatty() else 0
