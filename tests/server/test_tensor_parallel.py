"""`--tp 2`: a server whose engine is two processes lives and dies as one."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest
import requests

from tests import tiny
from tests.server.conftest import ask, image_part
from tests.server.test_replicas import start_streams
from tests.servers import ServerProcess

FLAGS = [str(tiny.qwen2_vl()), "--tp", "2", "--num-threads", "1"]


def ranks(server: ServerProcess) -> tuple[psutil.Process, psutil.Process]:
    """Rank 0, which is the engine's process, and rank 1, its child."""
    (engine,) = [c for c in psutil.Process(server.pid).children() if "sightline.engine.process" in c.cmdline()]
    (worker,) = [c for c in engine.children() if "sightline.engine.worker" in c.cmdline()]
    return engine, worker


@pytest.mark.parametrize("victim", ["server", "rank 0", "rank 1"])
def test_one_that_dies_ends_all(victim: str) -> None:
    with ServerProcess(FLAGS) as server:
        server.wait_ready()
        streams = start_streams(server, 2)
        processes = dict(zip(("server", "rank 0", "rank 1"), (psutil.Process(server.pid), *ranks(server)), strict=True))
        folder = Path(processes["rank 0"].cmdline()[-1])
        processes[victim].kill()
        killed = time.monotonic()
        if victim != "server":
            for last, ended in streams():
                assert '"code":"engine_dead"' in last
                assert ended - killed < 2
            assert server.wait_exit(10) == 7
        assert psutil.wait_procs([processes["rank 0"], processes["rank 1"]], timeout=5)[1] == []
        assert not folder.exists()
        assert ("rank 1 died (exit code -9)" in server.log()) == (victim == "rank 1")


def test_a_start_that_cannot_be(tmp_path: Path) -> None:
    with ServerProcess([FLAGS[0], "--tp", "3"]) as server:
        assert server.wait_exit(60) == 2
        assert "--tp-size 3" in server.log()
        assert "valid sizes: 1, 2, 4." in server.log()
        assert "Traceback" not in server.log()


def test_sigterm_ends_all_ranks() -> None:
    """... and before that they answer about a picture, the second time from the caches."""
    with ServerProcess(FLAGS) as server:
        server.wait_ready()
        body = {"messages": ask(image_part(1), "what?"), "max_tokens": 4, "ignore_eos": True, "temperature": 0}
        url = f"{server.base_url}/v1/chat/completions"
        first, again = (requests.post(url, json=body, timeout=30).json() for _ in range(2))
        assert first["choices"][0]["message"] == again["choices"][0]["message"]
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        processes = ranks(server)
        assert server.terminate() == 0
        assert psutil.wait_procs(processes, timeout=2)[1] == []
        assert "Traceback" not in server.log()
        assert "arning" not in server.log()
