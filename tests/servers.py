"""A real sightline server as a child process, for tests that talk to it over HTTP."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

# No proxy of the environment stands between a test and its own machine.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class ServerProcess:
    """`sightline serve` on a free loopback port; its output goes to a file.

        with ServerProcess(["--max-running-requests", "4"]) as server:
            server.wait_ready()
            requests.get(server.base_url + "/v1/models")
            assert server.terminate() == 0

    Leaving the block ends the server in any case. `module` is what `python -m` runs; `env` is added to the
    environment.
    """

    def __init__(
        self,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        *,
        module: Sequence[str] = ("sightline", "serve"),
        port: int | None = None,
    ) -> None:
        self.port = port or free_port()
        self.base_url = f"http://127.0.0.1:{self.port}"
        self.command = [sys.executable, "-m", *module, *args, "--host", "127.0.0.1", "--port", str(self.port)]
        self.env = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
        self.process: subprocess.Popen[bytes] | None = None
        self._log = Path(tempfile.mkstemp(prefix="sightline-test-", suffix=".log")[1])

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.running:
            self.terminate()
        if error is not None:
            print(f"--- {' '.join(self.command)}\n{self.log()}---", file=sys.stderr)
        self._log.unlink(missing_ok=True)

    @property
    def pid(self) -> int:
        """The process id of the HTTP process."""
        assert self.process is not None, "the server was not started"
        return self.process.pid

    @property
    def running(self) -> bool:
        """Whether the HTTP process lives."""
        return self.process is not None and self.process.poll() is None

    def log(self, start: int = 0) -> str:
        """What the server has printed since byte `start`."""
        with self._log.open("rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace")

    def log_size(self) -> int:
        """A mark for `log(start)`."""
        return self._log.stat().st_size

    def status(self, path: str, timeout: float = 5.0) -> int | None:
        """The status code of a GET, or None when nobody answers."""
        try:
            with _direct.open(self.base_url + path, timeout=timeout) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None

    def wait_for(self, path: str, status: int = 200, timeout: float = 60.0) -> float:
        """Poll until GET `path` answers with `status`; return the seconds it took."""
        began = time.monotonic()
        while time.monotonic() - began < timeout:
            if not self.running:
                raise AssertionError(f"the server ended with exit code {self.process and self.process.returncode}")
            if self.status(path) == status:
                return time.monotonic() - began
            time.sleep(0.05)
        raise AssertionError(f"GET {path} did not answer {status} within {timeout:.0f} s")

    def wait_ready(self, timeout: float = 60.0) -> float:
        """Wait until a request would really run; return the seconds it took."""
        return self.wait_for("/readyz", 200, timeout)

    def wait_exit(self, timeout: float = 30.0) -> int:
        """Wait for the process to end by itself; return its exit code."""
        assert self.process is not None, "the server was not started"
        return self.process.wait(timeout)

    def terminate(self, timeout: float = 30.0) -> int:
        """Ask for an orderly end (SIGTERM) and return the exit code; -9 when it had to be killed after `timeout`."""
        assert self.process is not None, "the server was not started"
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            return self.process.wait()
