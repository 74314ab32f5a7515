"""The documentation is true: code blocks run and answer what they promise, links lead somewhere, tables are computed.

Each bash or python block of a page stands right below a comment that says what happens to it here:

    <!-- test: contains "red" -->     run it against a real server; its output must contain the words (in any case)
    <!-- no test: the reason -->      shown only
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from scripts.write_docs import PAGES as WRITTEN

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
ADDRESS = re.compile(r"(?:localhost|127\.0\.0\.1):8000")


class Block(NamedTuple):
    """One fenced code block and the comment above it ("" if there is none)."""

    page: str
    line: int
    language: str
    comment: str
    code: str


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^```(bash|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            above = text[: match.start()].rstrip("\n").rpartition("\n")[2]
            comment = re.fullmatch(r"<!--\s*(.*?)\s*-->", above)
            found.append(
                Block(
                    page.relative_to(ROOT).as_posix(),
                    text.count("\n", 0, match.start()) + 1,
                    match.group(1),
                    comment.group(1) if comment else "",
                    match.group(2),
                )
            )
    return found


BLOCKS = blocks()
TESTED = [pytest.param(b, id=f"{b.page}:{b.line}") for b in BLOCKS if b.comment.startswith("test:")]


def test_every_block_is_tested_or_says_why_not() -> None:
    silent = [f"{b.page}:{b.line}" for b in BLOCKS if not re.match(r'test: contains "|no test: \w', b.comment)]
    assert not silent, f"put a test comment above these blocks: {silent}"


def test_the_readme_opens_with_two_commands() -> None:
    first = next(b for b in BLOCKS if b.page == "README.md")
    commands = [line.partition("#")[0].strip() for line in first.code.splitlines()]
    assert commands == ["make serve", "make test"]


@pytest.mark.parametrize("block", TESTED)
def test_a_block_does_what_it_promises(block: Block, server: str, tmp_path: Path) -> None:
    """From the project's root, with the tests' Python first on the PATH and the shared server as localhost:8000."""
    code = ADDRESS.sub(server.removeprefix("http://"), block.code)
    if block.language == "bash":
        command = ["bash", "-euo", "pipefail", "-c", code]
    else:
        command = [sys.executable, "-c", code]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PATH": path, "TMPDIR": str(tmp_path), "NO_PROXY": "*"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    words = re.findall(r'"([^"]+)"', block.comment)
    missing = [word for word in words if word.lower() not in done.stdout.lower()]
    assert not missing, f"{missing} not in the output:\n{done.stdout}\n{done.stderr}"


def anchors(page: Path) -> set[str]:
    """The fragments that headings of a Markdown page can be linked by."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if fragment:
            assert fragment in anchors(file), f"{page.name} links to {target}"


def test_every_page_can_be_found_from_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    missing = [p.name for p in (ROOT / "docs").glob("*.md") if p.name != "README.md" and f"({p.name})" not in index]
    assert not missing


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_a_written_page_is_current(page: Path) -> None:
    assert page.read_text() == WRITTEN[page](), "run: make docs"


def test_the_api_page_knows_every_route_and_field() -> None:
    from sightline.server.app import MODULES
    from sightline.server.schema import ChatCompletionRequest

    page = (ROOT / "docs" / "http-api.md").read_text()
    routes = {route.path.replace(":path", "") for module in MODULES for route in module.router.routes}
    names = routes | set(ChatCompletionRequest.model_fields)
    assert "/v1/chat/completions" in routes
    assert not {name for name in names if name not in page}


def test_the_models_page_knows_every_family_and_template() -> None:
    from sightline.prompt.named_templates import NAMED_TEMPLATES
    from sightline.registry import FAMILIES

    page = (ROOT / "docs" / "models.md").read_text()
    names = {*FAMILIES, *NAMED_TEMPLATES}
    assert not {name for name in names if f"`{name}`" not in page}


def test_the_table_of_picture_tokens_is_computed() -> None:
    """With the processor that serves, at the released checkpoints' bounds."""
    from sightline.prompt.qwen2_vl import Qwen2VLProcessor
    from tests import tiny

    processor = Qwen2VLProcessor(tiny.qwen2_vl(max_pixels=12_845_056))
    page = (ROOT / "docs" / "pictures-and-tokens.md").read_text()
    table = page.partition("<!-- table: qwen2-vl tokens -->")[2].partition("<!-- end -->")[0]
    rows = re.findall(r"^\| (\d+) x (\d+) \| (\d+) x (\d+) \| (\d+) \|$", table, re.MULTILINE)
    assert len(rows) >= 5
    for width, height, *shown in (map(int, row) for row in rows):
        plan = processor.plan(width, height)
        assert [plan.width, plan.height, plan.num_tokens] == shown, f"{width} x {height}"


def test_the_page_on_new_families_names_what_exists() -> None:
    """Every path is there, and every other name in code is defined somewhere in the package or its tests."""
    page = (ROOT / "docs" / "adding_a_model.md").read_text()
    names = set(re.findall(r"`([\w./]+)`", page))
    paths = {name for name in names if "/" in name or name.endswith(".md")}
    assert len(paths) > 12
    assert not [path for path in paths if not (ROOT / path).exists()]
    sources = "\n".join(p.read_text() for folder in ("src", "tests") for p in (ROOT / folder).rglob("*.py"))
    known = {"config.json", "preprocessor_config.json", "detail"}
    missing = [
        name
        for name in names - paths - known
        if not re.search(rf"^\s*(?:def |class )?{re.escape(name)}\b\s*[(:=]", sources, re.MULTILINE)
    ]
    assert not missing
