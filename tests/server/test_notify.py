"""A unit of `Type=notify`, with this test in systemd's place."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import requests

from sightline.server.notify import ServiceManager
from tests import tiny
from tests.servers import ServerProcess


def listen(path: Path | str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind(str(path))
    listener.settimeout(30)
    return listener


def heard(listener: socket.socket) -> dict[str, str]:
    return dict(line.split("=", 1) for line in listener.recv(4096).decode().splitlines())


def test_a_unit_from_start_to_end(tmp_path: Path) -> None:
    env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
    with listen(tmp_path / "notify") as listener, ServerProcess([str(tiny.qwen2_vl())], env) as server:
        phases = []
        while "READY" not in (message := heard(listener)):
            assert int(message["EXTEND_TIMEOUT_USEC"]) >= 60e6
            phases.append(message["STATUS"])
        assert any("weights" in phase for phase in phases), phases
        assert len(phases) == len(set(phases))
        # Ready means ready: a request runs.
        assert requests.get(f"{server.base_url}/health_generate", timeout=10).status_code == 200
        began = time.monotonic()
        for _ in range(5):
            assert heard(listener) == {"WATCHDOG": "1"}
        assert time.monotonic() - began < 5 * 0.2
        assert server.terminate() == 0
        last = [heard(listener)]
        while "STOPPING" not in last[-1]:
            last.append(heard(listener))
        assert last[-1]["STATUS"].startswith("draining")


def test_abstract_names_and_silence() -> None:
    with listen("\0sightline-test-notify") as listener:
        ServiceManager({"NOTIFY_SOCKET": "@sightline-test-notify"}).ready("serves a")
        assert heard(listener) == {"READY": "1", "STATUS": "serves a"}
    # Nobody listens any more, and nobody ever did: neither is an error.
    ServiceManager({"NOTIFY_SOCKET": "@sightline-test-notify"}).ready("serves a")
    ServiceManager({}).ready("serves a")
