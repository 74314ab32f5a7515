"""`sightline chat`, by a pipe and as a person at a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sightline import demo
from tests.servers import ServerProcess

SHAPES, HELLO = demo.sample_path("shapes.png"), demo.sample_path("word.png")


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess(["--api-key", "a-secret"]) as process:
        process.wait_ready()
        yield process


def piped(server: ServerProcess, text: str, *flags: str, key: str = "a-secret") -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "sightline",
        "chat",
        "--url",
        f"{server.base_url}/v1",
        "--temperature",
        "0",
        *flags,
    ]
    env = {**os.environ, "OPENAI_API_KEY": key}
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False, env=env)


def golden(picture: Path) -> tuple[str, str]:
    """A question about this one sample alone, and its answer."""
    for entry in demo.golden():
        content = entry.messages[-1]["content"]
        pictures = [part for part in content if part["type"] != "text"]
        if len(entry.messages) == 1 and len(pictures) == 1 and picture.name in repr(pictures):
            return next(part["text"] for part in content if part["type"] == "text"), entry.answer.strip()
    raise AssertionError(picture)


def test_a_pipe_gets_answers_and_nothing_else(server: ServerProcess, tmp_path: Path) -> None:
    question, answer = golden(SHAPES)
    saved = tmp_path / "talk.json"
    done = piped(server, f"/image {SHAPES}\n{question}\n/save {saved}\n/clear\n{SHAPES}\n{question}\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [answer, answer]
    user, assistant = json.loads(saved.read_text())
    assert user["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert assistant == {"role": "assistant", "content": answer}


def test_trouble_is_said_and_the_picture_is_kept_for_the_next_question(server: ServerProcess, tmp_path: Path) -> None:
    question, answer = golden(SHAPES)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    done = piped(
        server, f"/image {broken}\n{question}\n/clear\n/image nowhere.png\n/imag x\n/image {SHAPES}\n{question}\n"
    )
    assert done.returncode == 1
    assert done.stdout.split() == answer.split()
    first, second, third = done.stderr.splitlines()
    assert "image" in first
    assert "nowhere.png" in second
    assert "/imag is no command" in third


def test_a_wrong_key_is_said_at_once(server: ServerProcess) -> None:
    done = piped(server, "hello\n", key="wrong")
    assert done.returncode == 2
    assert "OPENAI_API_KEY" in done.stderr


class Person:
    """Types into a terminal and reads what it shows."""

    def __init__(self, *command: str, **env: str) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            # Whoever runs the tests in the background may have had it ignored, which a process inherits.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.environ.update(env, TERM="dumb")
            os.execv(sys.executable, [sys.executable, "-m", "sightline", *command])
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait_for(self, text: str, seconds: float = 30) -> str:
        """What came up to and with `text`."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self._fd], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come; the terminal shows:\n{self.seen}"
            self.seen += os.read(self._fd, 4096).decode(errors="replace").replace("\r\n", "\n")
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def interrupt(self, text: str) -> None:
        """Ctrl-C until `text` comes: Python's line editor may only see a signal with the next key, if it falls between the
        editor's look for signals and its wait for keys."""
        for _ in range(3):
            self.type("\x03")
            ready, _, _ = select.select([self._fd], [], [], 10)
            if ready:
                break
        self.wait_for(text)

    def ended(self, seconds: float = 30) -> int:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError("it did not end")


def test_a_person_stops_an_answer_and_goes_on(server: ServerProcess) -> None:
    question, answer = golden(SHAPES)
    person = Person("chat", "--url", server.base_url, "--temperature", "0", OPENAI_API_KEY="a-secret")
    person.wait_for("> ")
    person.type(f"/image {SHAPES}\n")
    person.wait_for("[1 picture] > ")
    person.type(question + "\n")
    person.wait_for(answer)
    assert "tokens in (88 for pictures" in person.wait_for("first after")
    person.wait_for("> ")
    person.type("half a line")
    # The echo shows that the line editor is reading.
    person.wait_for("half a line")
    person.interrupt("\n> ")
    person.type("/help\n")
    person.wait_for("/save FILE")
    person.wait_for("> ")
    person.type("\x04")
    assert person.ended() == 0


def test_control_c_stops_the_answer_not_the_conversation(server: ServerProcess) -> None:
    flags = ("--temperature", "1.9", "--max-tokens", "3000")
    person = Person("chat", "--url", server.base_url, *flags, OPENAI_API_KEY="a-secret")
    person.wait_for("> ")
    person.type(f"/image {SHAPES}\n")
    person.wait_for("[1 picture] > ")
    for _ in range(20):
        person.type("Describe it.\n")
        shown = person.wait_for("Describe it.\n")
        time.sleep(0.05)
        person.type("\x03")
        shown = person.wait_for("> ")
        if "..." in shown:
            break
    assert "..." in shown
    person.type("/exit\n")
    assert person.ended() == 0
