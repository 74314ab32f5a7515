"""The device under test, and a table of what the bfloat16 tests measured."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

AGREEMENT = pytest.StashKey[dict[str, str]]()


@pytest.fixture(scope="session")
def device() -> Iterator[str]:
    """`cuda`; SIGHTLINE_TEST_DEVICE=cpu runs the tests that use this fixture on a CPU, to test the tests."""
    before = torch.backends.cudnn.allow_tf32
    # the judge's convolutions in float32, too
    torch.backends.cudnn.allow_tf32 = False
    yield os.environ.get("SIGHTLINE_TEST_DEVICE", "cuda")
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def report(request: pytest.FixtureRequest) -> dict[str, str]:
    """Lines of the table that is printed at the end."""
    return request.config.stash.setdefault(AGREEMENT, {})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash.get(AGREEMENT, {})
    if lines:
        terminalreporter.section("greedy answers in bfloat16")
        for name, line in lines.items():
            terminalreporter.write_line(f"{name}: {line}")
