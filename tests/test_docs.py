"""The documentation is true: code blocks run and answer what they promise, links lead somewhere, tables are computed.

A fenced block that names its language stands right below a comment that says what happens to it here:

    <!-- test: contains "red" -->     bash, python: run against a real server; the output must contain the words (in any case)
    <!-- test: body of /v1/... -->    json: posted to the server, with a sample picture for `...` in its data URL
    <!-- test: settings -->           yaml: what `sightline serve --config` reads
    <!-- no test: the reason -->      shown only

json, yaml and toml are parsed in any case. Blocks of `text` or of no language show what a program prints, or a drawing.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
import yaml

from scripts.write_cli import CLI
from scripts.write_docs import PAGES as WRITTEN
from scripts.write_operations import OPERATIONS
from sightline.config import ServerConfig, declared
from sightline.demo import sample_path

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "deploy").glob("*.md")])
ADDRESS = re.compile(r"(?:localhost|127\.0\.0\.1):8000")
SHOWN = {"", "text"}
TYPED = re.compile(r"^(\$ |(curl|pip|python|make|sightline (serve|ask|chat|batch|bench|doctor|models)) )", re.MULTILINE)
PARSERS: dict[str, Callable[[str], Any]] = {"json": json.loads, "yaml": yaml.safe_load, "toml": tomllib.loads}
# What the comment above a block may be, by language, beside the reason for no test.
MARKS = {
    "bash": r'test: contains ".*',
    "python": r'test: contains ".*',
    "json": r"(test: body of /v1/\S+)?",
    "yaml": r"(test: settings)?",
    "toml": "",
}


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
        for match in re.finditer(r"^```([\w+-]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
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


def marked(prefix: str) -> list[Any]:
    """Parameters: the blocks whose comment begins so."""
    return [pytest.param(b, id=f"{b.page}:{b.line}") for b in BLOCKS if b.comment.startswith(prefix)]


def is_silent(block: Block) -> bool:
    """Neither tested nor excused."""
    if block.language in SHOWN:
        return bool(TYPED.search(block.code))
    mark = MARKS.get(block.language)
    return not re.fullmatch(r"no test: \w.*" + (f"|{mark}" if mark is not None else ""), block.comment)


def test_every_block_is_tested_or_says_why_not() -> None:
    silent = [f"{b.page}:{b.line}" for b in BLOCKS if is_silent(b)]
    assert not silent, f"put a test comment above these blocks: {silent}"


def test_the_readme_opens_with_two_commands() -> None:
    first = next(b for b in BLOCKS if b.page == "README.md")
    commands = [line.partition("#")[0].strip() for line in first.code.splitlines()]
    assert commands == ["make serve", "make test"]


def test_no_block_escapes() -> None:
    """Fences in lists or of tildes would not be found."""
    for page in PAGES:
        text = page.read_text()
        assert not re.search(r"^(?: +```| *~~~|````)", text, re.MULTILINE), page.name
        found = sum(block.page == page.relative_to(ROOT).as_posix() for block in BLOCKS)
        assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * found, page.name


def test_a_block_that_is_data_can_be_parsed() -> None:
    data = [block for block in BLOCKS if block.language in PARSERS]
    assert {block.language for block in data} >= {"json", "yaml"}
    for block in data:
        try:
            assert PARSERS[block.language](block.code)
        except (ValueError, yaml.YAMLError) as error:
            pytest.fail(f"{block.page}:{block.line}: {error}")


@pytest.mark.parametrize("block", marked("test: body of "))
def test_a_body_is_answered(block: Block, server: str) -> None:
    picture = base64.b64encode(sample_path("shapes.png").read_bytes()).decode()
    body = json.loads(block.code.replace("base64,...", f"base64,{picture}"))
    answer = requests.post(server + block.comment.removeprefix("test: body of "), json=body, timeout=100)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("block", marked("test: settings"))
def test_settings_of_a_page_are_read(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(block.code)
    config = ServerConfig.load(["--config", str(file)], env={})
    given = yaml.safe_load(block.code)
    assert given
    spellings = {flag.lstrip("-"): row[0] for row in declared(ServerConfig) for flag in row[1]}
    for name, value in given.items():
        assert getattr(config, spellings[name]) == (tuple(value) if isinstance(value, list) else value), name


@pytest.mark.parametrize("block", marked("test: contains "))
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


@pytest.mark.parametrize("name", ["tuning.md", "operations.md", "quick-start.md", "scaling.md"])
def test_a_page_names_flags_and_metrics_that_exist(name: str) -> None:
    page = (ROOT / "docs" / name).read_text()
    flag = r"(?<![\w-])--[a-z][\w-]+"
    prose = re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S)
    known = set(re.findall(flag, CLI.read_text())) | {"--config"}
    assert not [name for name in re.findall(flag, prose) if name not in known]
    metrics = re.findall(r"`(sightline_\w+)`", page)
    table = OPERATIONS.read_text()
    assert not [metric for metric in metrics if f"| `{metric}` |" not in table]


def test_the_site_is_built_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    """With mkdocs.yml as `make docs` does; strict, so that a dead link ends it."""
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    names = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"README"} | {"index"}
    assert names <= {page.stem for page in tmp_path.glob("*.html")}
    for page in tmp_path.glob("*.html"):
        text = page.read_text()
        assert not re.findall(
            r"<(?:script|img|iframe)[^>]*src=\"?(?:https?:)?//|<link[^>]*href=\"?(?:https?:)?//", text
        ), page.name
        # Links out of docs/ were turned into files of the site.
        assert all((tmp_path / name).exists() for name in re.findall(r"href=\"?(files/[^\"#> ]+)", text)), page.name


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
