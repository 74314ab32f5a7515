"""docs/cli.md: what every command prints for --help."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path
from unittest import mock

CLI = Path(__file__).resolve().parent.parent / "docs" / "cli.md"

HEAD = """# Command line

<!-- Written by `make docs` from each command's --help. A test fails when this page is not current. -->

`python -m sightline` is the same as `sightline`, and `python -m sightline.launch_server` the same as `sightline serve`. Exit codes
are in [Operations](operations.md#exit-codes).
"""


def cli_page() -> str:
    """The whole page."""
    from sightline.bench import COMMANDS as BENCHMARKS

    overview = _help([])
    names = [name for name in re.findall(r"^  (\w+)", overview, re.MULTILINE) if name != "version"]
    parts = [HEAD]
    for command in ("", *names, *(f"bench {name}" for name in BENCHMARKS)):
        text = _help(command.split()).rstrip()
        parts.append(f"\n## sightline{' ' * bool(command)}{command}\n\n```text\n{text}\n```\n")
    return "".join(parts)


def _help(command: list[str]) -> str:
    """Printed as in a terminal of 100 columns without colors, whatever the present one is."""
    from sightline.cli import main

    printed = io.StringIO()
    plain = {"COLUMNS": "100", "NO_COLOR": "1", "PYTHON_COLORS": "0"}
    with mock.patch.dict(os.environ, plain), contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return printed.getvalue()
