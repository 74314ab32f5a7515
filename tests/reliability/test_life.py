"""Death, stops and starts: loud, soon, and with nothing left behind."""

from __future__ import annotations

import concurrent.futures
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import requests

from tests import tiny
from tests.scorecard import SEED, scaled
from tests.server.conftest import ask
from tests.servers import ServerProcess

Count = Callable[..., None]


def engine_of(server: ServerProcess) -> psutil.Process:
    (engine,) = [c for c in psutil.Process(server.pid).children() if "sightline.engine.process" in c.cmdline()]
    return engine


def stream(server: ServerProcess, lines: list[str], max_tokens: int = 3000, timeout: float = 40) -> None:
    body = {"messages": ask("x"), "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    url = f"{server.base_url}/v1/chat/completions"
    with requests.post(url, json=body, stream=True, timeout=timeout) as response:
        lines.append(str(response.status_code))
        lines.extend(response.iter_lines(decode_unicode=True))


def streams(server: ServerProcess, number: int, **options: float) -> tuple[list[list[str]], list[threading.Thread]]:
    lines: list[list[str]] = [[] for _ in range(number)]
    threads = [threading.Thread(target=stream, args=(server, each), kwargs=options) for each in lines]
    for thread in threads:
        thread.start()
    return lines, threads


@pytest.mark.check(4)
def test_kill_9_of_the_engine(count: Count) -> None:
    total, rng = scaled(50, 5), random.Random(SEED)
    slowest = slowest_exit = 0.0
    for _ in range(max(1, total)):
        with ServerProcess([str(tiny.qwen2_vl())]) as server:
            server.wait_ready()
            engine, folder = engine_of(server), Path(engine_of(server).cmdline()[-1])
            lines, threads = streams(server, 4)
            time.sleep(0.3 + rng.random())
            engine.kill()
            killed = time.monotonic()
            for thread in threads:
                thread.join(10)
            slowest = max(slowest, time.monotonic() - killed)
            assert server.wait_exit(10) == 7
            slowest_exit = max(slowest_exit, time.monotonic() - killed)
            assert all('"code":"engine_dead"' in "".join(each) and "data: [DONE]" not in each for each in lines)
            assert not folder.exists()
    assert slowest < 2
    count(max(1, total), f"clients knew after {slowest:.2f} s (limit 2), exit after {slowest_exit:.2f} s (limit 10)")


@pytest.mark.check(4)
def test_kill_9_of_the_server_leaves_no_engine(count: Count) -> None:
    with ServerProcess([str(tiny.qwen2_vl())]) as server:
        server.wait_ready()
        engine, folder = engine_of(server), Path(engine_of(server).cmdline()[-1])
        os.kill(server.pid, signal.SIGKILL)
        began = time.monotonic()
        engine.wait(10)
        took = time.monotonic() - began
        assert not folder.exists()
        server.wait_exit()
    with ServerProcess([str(tiny.qwen2_vl())], port=server.port) as again:
        again.wait_for("/livez")
    count(1, f"the engine ended after {took:.1f} s")


@pytest.mark.check(5)
def test_a_stopped_engine_is_found_out(count: Count) -> None:
    with ServerProcess([str(tiny.qwen2_vl()), "--stall-timeout", "3"]) as server:
        server.wait_ready()
        lines, threads = streams(server, 2)
        time.sleep(0.7)
        engine_of(server).suspend()
        began = time.monotonic()
        unready = server.wait_for("/readyz", 503, timeout=5)
        assert server.status("/livez") == 200
        for thread in threads:
            thread.join(20)
        took = time.monotonic() - began
        assert all('"code":"engine_dead"' in "".join(each) for each in lines)
        assert server.wait_exit(10) == 7
        assert "sign of life" in server.log()
    assert took < 3 + 2
    count(1, f"not ready after {unready:.1f} s, clients knew after {took:.1f} s; limit 3 s")


@pytest.mark.check(6)
@pytest.mark.check(9)
def test_sigterm_drops_nobody(count: Count) -> None:
    """The probes' states on the way: alive and not ready, ready, draining."""
    number = scaled(64, 8)
    with ServerProcess([str(tiny.qwen2_vl())]) as server:
        server.wait_for("/livez")
        server.wait_ready()
        assert (server.status("/livez"), server.status("/startupz")) == (200, 200)
        lines, threads = streams(server, number, max_tokens=150)
        deadline = time.monotonic() + 20
        while requests.get(f"{server.base_url}/server_info", timeout=5).json()["calls"]["in_flight"] < number:
            assert time.monotonic() < deadline
        os.kill(server.pid, signal.SIGTERM)
        server.wait_for("/readyz", 503, timeout=5)
        assert server.status("/livez") == 200
        url = f"{server.base_url}/v1/chat/completions"
        refused = requests.post(url, json={"messages": ask("new")}, timeout=5)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_draining")
        for thread in threads:
            thread.join(40)
        assert all(each[0] == "200" and "data: [DONE]" in each for each in lines)
        assert all('"finish_reason":"length"' in "".join(each) for each in lines)
        assert server.wait_exit() == 0
    count(number)


@pytest.mark.check(7)
def test_sigterm_does_not_wait_for_ever(count: Count) -> None:
    with ServerProcess([str(tiny.qwen2_vl()), "--drain-timeout", "1"]) as server:
        server.wait_ready()
        lines, threads = streams(server, 2, max_tokens=4000)
        time.sleep(0.5)
        os.kill(server.pid, signal.SIGTERM)
        began = time.monotonic()
        for thread in threads:
            thread.join(20)
        assert server.wait_exit(20) == 0
        took = time.monotonic() - began
    assert all('"code":"server_draining"' in "".join(each) for each in lines)
    assert took < 1 + 5
    count(2, f"ended after {took:.1f} s; limit 1 s and a moment")


def _faults(folder: Path) -> dict[str, tuple[list[str], int]]:
    """Name -> (flags, exit code)."""
    faults: dict[str, tuple[list[str], int]] = {}

    def copy(name: str, change: Callable[[Path], object], code: int = 3) -> None:
        target = folder / name.replace(" ", "-")
        shutil.copytree(tiny.qwen2_vl(), target)
        change(target)
        faults[name] = ([str(target)], code)

    weights = "model.safetensors"
    copy("cut weights", lambda d: (d / weights).write_bytes((d / weights).read_bytes()[:1000]))
    copy("weights of noise", lambda d: (d / weights).write_bytes(random.Random(SEED).randbytes(5000)))
    copy("no weights", lambda d: (d / weights).unlink())
    copy("no tokenizer", lambda d: (d / "tokenizer.json").unlink())
    copy("broken tokenizer", lambda d: (d / "tokenizer.json").write_text("{"))
    copy("no config", lambda d: (d / "config.json").unlink())
    copy("broken config", lambda d: (d / "config.json").write_text("{"))
    copy("config of nothing", lambda d: (d / "config.json").write_text("{}"))
    copy("unknown architecture", lambda d: (d / "config.json").write_text('{"architectures": ["Nobody"]}'))
    faults["no folder"] = (["/no/such/folder"], 3)
    faults["too long a context"] = ([str(tiny.qwen2_vl()), "--max-total-tokens", "64", "--context-length", "4096"], 4)
    faults["wrong flag"] = ([str(tiny.qwen2_vl()), "--no-such-flag"], 2)
    faults["key file that is not there"] = ([str(tiny.qwen2_vl()), "--api-key-file", "/no/such/file"], 2)
    faults["template that is not there"] = ([str(tiny.qwen2_vl()), "--chat-template", "/no/such.jinja"], 3)
    return faults


@pytest.mark.check(8)
def test_faults_at_start(tmp_path: Path, count: Count) -> None:
    faults = dict(random.Random(SEED).sample(sorted(_faults(tmp_path).items()), min(14, scaled(14, 5))))

    def start(fault: tuple[list[str], int]) -> tuple[int, str]:
        with ServerProcess(fault[0]) as server:
            return server.wait_exit(60), server.log()

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for (name, (_, code)), (found, log) in zip(faults.items(), pool.map(start, faults.values()), strict=True):
            assert found == code, (name, found, log[-2000:])
            assert "Traceback" not in log, (name, log[-2000:])
    count(len(faults))
