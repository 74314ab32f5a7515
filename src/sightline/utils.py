"""Helpers for notebooks, with the names that SGLang's pages use: start a server, wait for it, end it."""

from __future__ import annotations

import atexit
import html
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

_GRACE = 40.0

_running: set[subprocess.Popen[bytes]] = set()

# No proxy of the environment stands between a notebook and its own machine.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def launch_server_cmd(
    command: str, host: str = "127.0.0.1", port: int | None = None
) -> tuple[subprocess.Popen[bytes], int]:
    """Start a server from its command line (`python3 -m sightline.launch_server ...`) on a free port.

    Words like NAME=value in front are its environment. Returns the process and the port. The server ends with this
    process at the latest; `terminate_process` ends it earlier.
    """
    words = shlex.split(command.replace("\\\n", " "))
    env = dict(os.environ)
    while words and re.match(r"[A-Za-z_]\w*=", words[0]):
        name, _, env[name] = words.pop(0).partition("=")
    if not words:
        raise ValueError("the command is empty")
    if words[0] in ("python", "python3"):
        # The interpreter that has sightline, whatever is first on the PATH.
        words[0] = sys.executable
    port = port or _free_port(host)
    # A session of its own: Ctrl-C in a notebook interrupts the cell, not the server.
    process = subprocess.Popen([*words, "--port", str(port)], env=env, start_new_session=True)
    _running.add(process)
    return process, port


def wait_for_server(
    base_url: str, timeout: float | None = None, process: subprocess.Popen[bytes] | None = None
) -> None:
    """Return when the server would answer a request.

    Raises TimeoutError after `timeout` seconds, and RuntimeError when `process` ends before.
    """
    began = time.monotonic()
    while not _is_ready(base_url):
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {process.returncode}; its log says why")
        if timeout is not None and time.monotonic() - began > timeout:
            raise TimeoutError(f"the server was not ready after {timeout:g} seconds")
        time.sleep(0.1)


def terminate_process(process: subprocess.Popen[bytes]) -> None:
    """End a server and everything that it started: in order, and by force when that takes too long."""
    _running.discard(process)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@atexit.register
def _terminate_all() -> None:
    for process in tuple(_running):
        terminate_process(process)


def print_highlight(text: object) -> None:
    """Show a text in blue in a notebook, and print it elsewhere."""
    if "ipykernel" in sys.modules:
        from IPython.display import HTML, display

        display(HTML(f"<strong style='color: #00008B; white-space: pre-wrap'>{html.escape(str(text))}</strong>"))
    else:
        print(text)


def _is_ready(base_url: str) -> bool:
    try:
        with _direct.open(f"{base_url.rstrip('/')}/readyz", timeout=5) as answer:
            return int(answer.status) == 200
    except (urllib.error.URLError, OSError):
        return False


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
