"""The blocks of docs/clients.md, each with the client that it is about."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sightline.demo import sample_path
from tests.clients.real.environments import HERE, ROOT, run_block

PAGE = (ROOT / "docs" / "clients.md").read_text()
BLOCKS = re.findall(r"<!-- no test: make test-clients runs it in (\w+) -->\n```(\w+)\n(.*?)^```$", PAGE, re.M | re.S)


def test_every_block_is_run() -> None:
    assert len(BLOCKS) == len(re.findall(r"^```(?:python|bash|js)$", PAGE, re.M)) > 10


@pytest.mark.parametrize(
    ("environment", "language", "code"),
    [pytest.param(*block, id=f"{i}-{block[0]}") for i, block in enumerate(BLOCKS) if block[0] != "load"],
)
def test_a_block(server: str, tmp_path: Path, environment: str, language: str, code: str) -> None:
    """In a folder with the picture that it names."""
    (tmp_path / "shapes.png").symlink_to(sample_path("shapes.png"))
    printed = run_block(environment, language, code, server, tmp_path)
    assert ("color='" if "Shape" in code else "red circle") in printed


def test_the_versions_are_those_installed() -> None:
    """Each client of the table, with its version, is in a lock file."""
    locks = [*(ROOT / "requirements").glob("clients-*.txt"), HERE / "node" / "package.json"]
    known = {
        (name.lower(), version)
        for lock in locks
        for name, version in re.findall(r'"?([@\w/.-]+?)(?:\[[\w,]+\])?(?:==|": ")([\w.]+)', lock.read_text())
    }
    table = PAGE.partition("| version tested |")[2].partition("\n\n")[0]
    for label, cell in re.findall(r"^\| \[([^\]]+)\]\([^)]*\) \| ([^|]+) \|", table, re.M):
        default = {"openai-python": "openai", "openai-node": "openai"}.get(label, label).lower()
        for item in re.split(r", | and ", cell.strip()):
            name, _, version = item.rpartition(" ")
            assert (name or default, version) in known, f"{label}: {item}"
