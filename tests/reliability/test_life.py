"""Death, stops and starts: loud, soon, and with nothing left behind."""

from __future__ import annotations

import concurrent.futures
import json
import os
import random
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import requests
from safetensors.numpy import load_file, save_file

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


class Fault(NamedTuple):
    """A start that must end: with which flags and environment, and with which exit code."""

    flags: list[str]
    code: int
    env: dict[str, str] = {}
    port: int | None = None


def rewritten(file: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    """Change a JSON file of a checkpoint."""

    def apply(folder: Path) -> None:
        value = json.loads((folder / file).read_text())
        change(value)
        (folder / file).write_text(json.dumps(value))

    return apply


def reweighed(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    """Change the tensors of a checkpoint."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return apply


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def sharded(folder: Path) -> None:
    """An index that names a file which is not there."""
    names = dict.fromkeys(load_file(folder / WEIGHTS), "model-00001-of-00002.safetensors")
    (folder / WEIGHTS).unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


WEIGHTS = "model.safetensors"
LAYER = "model.layers.0.mlp.up_proj.weight"
# Each is done to a copy of a checkpoint, which is then refused.
DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut weights": lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:1000]),
    "weights of noise": lambda d: (d / WEIGHTS).write_bytes(random.Random(SEED).randbytes(5000)),
    "no weights": lambda d: (d / WEIGHTS).unlink(),
    "empty weights": lambda d: (d / WEIGHTS).write_bytes(b""),
    "pickled weights": pickled,
    "a missing shard": sharded,
    "a missing tensor": reweighed(lambda tensors: tensors.pop(LAYER)),
    "a tensor of another shape": reweighed(lambda tensors: tensors.update({LAYER: tensors[LAYER][:-1].copy()})),
    "no tokenizer": lambda d: (d / "tokenizer.json").unlink(),
    "broken tokenizer": lambda d: (d / "tokenizer.json").write_text("{"),
    "tokenizer of nothing": lambda d: (d / "tokenizer.json").write_text("[]"),
    "no config": lambda d: (d / "config.json").unlink(),
    "broken config": lambda d: (d / "config.json").write_text("{"),
    "config of nothing": lambda d: (d / "config.json").write_text("{}"),
    "config that is a list": lambda d: (d / "config.json").write_text("[]"),
    "config of noise": lambda d: (d / "config.json").write_bytes(random.Random(SEED).randbytes(500)),
    "config without sizes": rewritten("config.json", lambda c: c["text_config"].pop("hidden_size")),
    "unknown architecture": lambda d: (d / "config.json").write_text('{"architectures": ["Nobody"]}'),
    "broken template": lambda d: (d / "chat_template.jinja").write_text("{% for"),
    "broken settings of pictures": lambda d: (d / "preprocessor_config.json").write_text("{"),
}


def _faults(folder: Path, taken: int) -> dict[str, Fault]:
    faults: dict[str, Fault] = {}
    for name, damage in DAMAGE.items():
        target = folder / name.replace(" ", "-")
        shutil.copytree(tiny.qwen2_vl(), target)
        damage(target)
        faults[name] = Fault([str(target)], 3)
    good, empty = str(tiny.qwen2_vl()), folder / "empty"
    empty.write_text("# none\n")
    return {
        **faults,
        "no folder": Fault(["/no/such/folder"], 3),
        "a file": Fault([f"{good}/config.json"], 3),
        "no network": Fault(["owner/name"], 3, {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder)}),
        "too long a context": Fault([good, "--max-total-tokens", "64", "--context-length", "4096"], 4),
        "more than the memory": Fault([good, "--max-total-tokens", str(10**12)], 4),
        "a port that is taken": Fault([good], 5, port=taken),
        "wrong flag": Fault([good, "--no-such-flag"], 2),
        "wrong value": Fault([good, "--context-length", "-1"], 2),
        "wrong value in the environment": Fault([good], 2, {"SIGHTLINE_CONTEXT_LENGTH": "many"}),
        "settings that are not there": Fault([good, "--config", "/no/such.yaml"], 2),
        "key file that is not there": Fault([good, "--api-key-file", "/no/such/file"], 2),
        "key file without a key": Fault([good, "--api-key-file", str(empty)], 2),
        "template that is not there": Fault([good, "--chat-template", "/no/such.jinja"], 3),
    }


@pytest.mark.check(8)
def test_faults_at_start(tmp_path: Path, count: Count) -> None:
    def start(fault: Fault) -> tuple[int, str]:
        with ServerProcess(fault.flags, fault.env, port=fault.port) as server:
            code = server.wait_exit(60)
            assert not psutil.pid_exists(server.pid) or not psutil.Process(server.pid).children()
            return code, server.log()

    with socket.create_server(("127.0.0.1", 0)) as other, concurrent.futures.ThreadPoolExecutor(2) as pool:
        every = _faults(tmp_path, other.getsockname()[1])
        faults = dict(random.Random(SEED).sample(sorted(every.items()), scaled(len(every), 5)))
        wrong = {}
        for (name, fault), (code, log) in zip(faults.items(), pool.map(start, faults.values()), strict=True):
            if code != fault.code or "Traceback" in log:
                wrong[name] = f"{code} instead of {fault.code}: {log[-1500:]}"
    assert not wrong, "\n".join(f"{name}: {what}" for name, what in wrong.items())
    count(len(faults))
