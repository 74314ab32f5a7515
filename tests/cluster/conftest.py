"""A Ray cluster of this machine alone, with logical CPUs enough for two replicas, and one application at a time on it.

Each of its nodes has one `slot`, so that what wants two has two nodes: the head, and what `second_node` adds.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import requests

from tests.servers import free_port

ray = pytest.importorskip("ray", reason="Ray is an extra; `make test-cluster` installs it")

Deploy = Callable[..., str]

# In the environment of every process of this cluster: others may run on the same machine.
_MARK = "TEST_CLUSTER"


_STORE = 80 << 20


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    from ray import serve
    from ray.serve.config import HTTPOptions, ProxyLocation

    port = free_port()
    os.environ[_MARK] = str(os.getpid())
    ray.init(
        "local",
        num_cpus=4,
        resources={"slot": 1},
        object_store_memory=_STORE,
        include_dashboard=False,
        log_to_driver=False,
    )
    try:
        serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=HTTPOptions(host="127.0.0.1", port=port))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture
def second_node(cluster: str) -> Iterator[None]:
    (head,) = living_nodes()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", "2"]
    command += ["--address", ray.get_runtime_context().gcs_address, "--node-ip-address", head["NodeManagerAddress"]]
    command += ["--resources", '{"slot": 1}', "--object-store-memory", str(_STORE)]
    node = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _wait_until(lambda: len(living_nodes()) == 2)
    yield
    node.terminate()
    node.wait(30)
    _wait_until(lambda: len(living_nodes()) == 1)


def living_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _wait_until(done: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def deploy(cluster: str) -> Iterator[Deploy]:
    """Start an application with these arguments, below a prefix if it is one of several; returns its URL."""
    from ray import serve

    from sightline.serve.ray import build_app

    names = set()

    def start(prefix: str = "", **args: Any) -> str:
        name = prefix.strip("/") or "default"
        names.add(name)
        application = build_app({"num_threads": 1, "health_check_period_s": 1, **args})
        serve.run(application, name=name, route_prefix=prefix or "/")
        answer = requests.get(f"{cluster}{prefix}/readyz", timeout=10)
        assert (answer.status_code, answer.json()) == (200, {"status": "ready"})
        return f"{cluster}{prefix}"

    yield start
    for name in names:
        serve.delete(name)
    deadline = time.monotonic() + 20
    while left := [process.cmdline() for process in replicas() + engines() + workers()]:
        assert time.monotonic() < deadline, f"processes were left behind: {left}"
        time.sleep(0.2)


def fixed(count: int) -> dict[str, Any]:
    return {"min_replicas": count, "max_replicas": count}


def replicas() -> list[psutil.Process]:
    """The processes of the engine deployments' replicas."""
    # Ray adds what it does just now.
    return _processes(lambda line: re.match(r"ray::ServeReplica:\w+:engine", line[0]) is not None)


def engines() -> list[psutil.Process]:
    """Their children that hold the model."""
    return _processes(lambda line: "sightline.engine.process" in line)


def workers() -> list[psutil.Process]:
    """The other ranks of those that have several."""
    return _processes(lambda line: "sightline.engine.worker" in line)


def _processes(wanted: Callable[[list[str]], bool]) -> list[psutil.Process]:
    # Ray's workers are children of its raylet, not of the test.
    found = []
    for process in psutil.process_iter():
        try:
            line = [part.strip() for part in process.cmdline() if part.strip()]
            if line and wanted(line) and process.environ().get(_MARK) == str(os.getpid()):
                found.append(process)
        except psutil.Error:
            continue
    return found
