"""Fixtures and settings that all tests share."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

# Before anything imports torch or huggingface_hub, also in child processes: no network, and one thread, because the models
# of tests are so small that threads of one operation mostly wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from tests import servers

for name in [n for n in os.environ if n.startswith("SIGHTLINE_") and n != "SIGHTLINE_TEST_DEVICE"]:
    del os.environ[name]
# Without a GPU, kernels run in Triton's interpreter: it must know before anything imports triton, as transformers may.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

pytest_plugins = ["tests.scorecard"]

GPU_TESTS = Path(__file__).parent / "gpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of tests/gpu are marked `gpu`; what is marked so is skipped where there is no CUDA device.

    SIGHTLINE_TEST_DEVICE=cpu runs those that have a `device` fixture all the same, to test the tests.
    """
    elsewhere = os.environ.get("SIGHTLINE_TEST_DEVICE", "cuda") != "cuda"
    for item in items:
        if GPU_TESTS in item.path.parents and not (elsewhere and "device" in getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.gpu)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=f"no CUDA device (torch {torch.__version__})"))


def pytest_runtest_setup() -> None:
    """One thread again: an engine in this process asks for more, and would leave them to all tests that follow."""
    torch.set_num_threads(1)


_log_marks: dict[str, int] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows what the shared server printed during it."""
    report = yield
    process = getattr(item, "funcargs", {}).get("server_process")
    if isinstance(process, servers.ServerProcess) and process.process is not None:
        if report.failed:
            report.sections.append(("server log", process.log(_log_marks.get(item.nodeid, 0))[-20_000:]))
        elif report.when == "setup":
            _log_marks[item.nodeid] = process.log_size()
    return report


@pytest.fixture
def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    return servers.free_port()


@pytest.fixture(scope="session")
def server_process() -> Iterator[servers.ServerProcess]:
    """One server of the bundled model for all tests that leave it as they found it."""
    with servers.ServerProcess() as process:
        process.wait_ready()
        yield process
        assert process.running, f"the server died during the tests:\n{process.log()}"
        code = process.terminate()
        assert code == 0, f"SIGTERM ended the server with exit code {code}:\n{process.log()}"


@pytest.fixture(scope="session")
def server(server_process: servers.ServerProcess) -> str:
    """The base URL of the shared server, without the /v1."""
    return server_process.base_url
