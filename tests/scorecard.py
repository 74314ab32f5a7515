"""The scorecard of reliability: which test stands for which of the forty checks, how many cases it ran, and what came of it.

    @pytest.mark.check(27)
    def test_something(count): ... count(60, "slowest 0.1 s")

RELIABILITY_SCALE (0.1 by default, 1 for the full counts) scales the cases; RELIABILITY_SEED chooses them. With RELIABILITY_REPORT
the results are written there as JSON, and `scripts/write_reliability.py` turns them into docs/reliability.md.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCALE = float(os.environ.get("RELIABILITY_SCALE", "0.1"))
SEED = int(os.environ.get("RELIABILITY_SEED", "20261123"))

_results: dict[str, dict[str, Any]] = {}


def scaled(full: int, least: int = 1) -> int:
    """That many of the full count of cases."""
    return max(least, round(full * SCALE))


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.addinivalue_line("markers", "check(number): stands for this row of docs/reliability.md")


@pytest.fixture
def count(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Say how many cases ran, and what was measured."""

    def say(cases: int, measured: str = "") -> None:
        record_property("cases", cases)
        record_property("measured", measured)

    return say


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Reports carry the number of their check, also those of tests that fail."""
    for item in items:
        marks = list(item.iter_markers("check"))
        if marks:
            cases = max(mark.kwargs.get("cases", 0) for mark in marks)
            item.user_properties += [("checks", [mark.args[0] for mark in marks]), ("cases", cases)]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect, in the process that sees all reports."""
    properties = dict(report.user_properties)
    if "checks" in properties and (report.when == "call" or report.failed):
        _results[report.nodeid] = {**properties, "passed": report.passed, "seconds": round(report.duration, 2)}


def _commit() -> str:
    """What the tests ran on; "" outside of a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the report, if one was asked for."""
    path = os.environ.get("RELIABILITY_REPORT")
    if path and not hasattr(session.config, "workerinput"):
        about = {
            "date": datetime.date.today().isoformat(),
            "scale": SCALE,
            "seed": SEED,
            "commit": _commit(),
            "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}",
        }
        Path(path).write_text(json.dumps({"about": about, "tests": _results}, indent=1))
