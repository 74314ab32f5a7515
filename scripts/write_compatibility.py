"""docs/compatibility.md: the rows of tests/server/conformance*.py, whose checks have just passed."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

COMPATIBILITY = Path(__file__).resolve().parent.parent / "docs" / "compatibility.md"

HEAD = """# Compatibility

<!-- Written by `make docs`, after tests/server/test_conformance.py passed. A test fails when this page is not current. -->

What OpenAI's clients, and those of vLLM and SGLang, may send and what they get. Every row is a test in
`tests/server/conformance_*.py` that runs against a real server; this page is written from those rows when all of them pass.

- **works**: does what the API's documentation says
- **accepted**: read, without effect on the answer; echoed where the response has the field
- **refused**: a 400 in OpenAI's shape whose `param` is the field

Fields that nobody knows are accepted, and said once in the server's log.
"""


def compatibility_page() -> str:
    """The whole page."""
    from tests.server import conformance_chat, conformance_others
    from tests.server.conformance import ROWS

    assert conformance_chat
    assert conformance_others
    parts = [HEAD]
    sections = list(dict.fromkeys(row.section for row in ROWS))
    rows = sorted(ROWS, key=lambda row: sections.index(row.section))
    for section, group in groupby(rows, key=lambda row: row.section):
        parts.append(f"\n## {section}\n\n| | | |\n|---|---|---|\n")
        for row in group:
            cells = (f"`{row.name}`", row.mark, row.note)
            parts.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |\n")
    return "".join(parts)


def conformance_passes() -> bool:
    """Run the rows' checks."""
    import pytest

    return pytest.main(["-q", "-p", "no:cacheprovider", "tests/server/test_conformance.py"]) == 0
