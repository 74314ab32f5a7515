"""The server that a command talks to: the one at `--url`, or one of its own for as long as the command runs."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import httpx2
from rich.console import Console

from sightline.errors import StartupError

_PR_SET_PDEATHSIG = 1
_GRACE = 10.0


class ServiceError(StartupError):
    """There is no server to talk to."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Service(NamedTuple):
    """url: without /v1. headers: with the key. process: of a server of our own."""

    url: str
    headers: dict[str, str]
    process: subprocess.Popen[bytes] | None = None

    @property
    def exit_code(self) -> int | None:
        """Of our own server, once it has ended."""
        return None if self.process is None else self.process.poll()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that `from_options` reads."""
    parser.add_argument(
        "--url", help="a running server, for instance http://127.0.0.1:30000; without one, starts its own"
    )
    parser.add_argument("--model", help="model of the server started here; the bundled sightline-tiny by default")
    parser.add_argument("--api-key", metavar="KEY", help="of the server at --url; better in OPENAI_API_KEY")


def split_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before `--`, and behind it: flags of `sightline serve`."""
    words = list(argv)
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


@contextlib.contextmanager
def from_options(options: argparse.Namespace, flags: Sequence[str]) -> Iterator[Service]:
    """A server that is ready. flags: of `sightline serve`, for one of our own. Raises `ServiceError`."""
    if options.url is None:
        if options.api_key is not None:
            raise ServiceError(
                "--api-key belongs to --url; a server of its own has a key that nobody needs to know.", 2
            )
        with _own(options.model, flags) as service:
            yield service
        return
    if options.model is not None or flags:
        raise ServiceError("--model and flags behind -- are for a server started here; --url names one that runs.", 2)
    key = options.api_key or os.environ.get("OPENAI_API_KEY")
    url = options.url.rstrip("/").removesuffix("/v1")
    service = Service(url, {"authorization": f"Bearer {key}"} if key else {})
    _check(service)
    yield service


@contextlib.contextmanager
def _own(model: str | None, flags: Sequence[str]) -> Iterator[Service]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Other users of this machine reach the loopback too; the list of processes shows no environment to them.
    key = secrets.token_urlsafe(24)
    command = [sys.executable, "-m", "sightline", "serve", *([model] if model else []), *flags]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno(),
        env={**os.environ, "SIGHTLINE_API_KEY": key},
        # Ctrl-C ends an answer or a batch in order, not the server under it.
        start_new_session=True,
        preexec_fn=_end_with(os.getpid()),
    )
    service = Service(f"http://127.0.0.1:{port}", {"authorization": f"Bearer {key}"}, process)
    try:
        _wait(service)
        yield service
    finally:
        process.terminate()
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _check(service: Service) -> None:
    """A wrong address or key is better said at once than after a hundred attempts."""
    try:
        answer = httpx2.get(f"{service.url}/v1/models", headers=service.headers, timeout=10.0, trust_env=False)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise ServiceError(f"{service.url} cannot be reached: {error or type(error).__name__}", 1) from error
    if answer.status_code in (401, 403):
        raise ServiceError(f"{service.url} wants another key: set OPENAI_API_KEY, or --api-key.", 2)


def _end_with(parent: int) -> Callable[[], None]:
    """In the child: be told to stop also when this command is killed."""

    def ask_for_signal() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)

    return ask_for_signal


def _wait(service: Service) -> None:
    """Until requests run, with the phase of loading on a terminal."""
    assert service.process is not None
    console = Console(stderr=True)
    with (
        httpx2.Client(base_url=service.url, timeout=5.0, trust_env=False) as client,
        console.status("starting ...") if console.is_terminal else contextlib.nullcontext() as status,
    ):
        while True:
            if (code := service.exit_code) is not None:
                raise ServiceError("the model could not be served; the lines above say why.", code or 1)
            with contextlib.suppress(httpx2.HTTPError):
                answer = client.get("/startupz")
                if answer.status_code == 200:
                    return
                loading = answer.json()
                if status is not None:
                    share = loading["progress"]
                    status.update(f"loading: {loading['phase']}{'' if share is None else f' {share:.0%}'}")
            time.sleep(0.05)
