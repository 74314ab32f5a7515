"""The table of metrics in docs/operations.md, from `sightline.server.metrics`."""

from __future__ import annotations

import re
from pathlib import Path

from sightline.server.metrics import DEFINITIONS

OPERATIONS = Path(__file__).resolve().parent.parent / "docs" / "operations.md"


def operations_page() -> str:
    """The page as it is, with the table as it should be."""
    lines = ["| metric | kind | labels | |", "|---|---|---|---|"]
    for each in DEFINITIONS:
        labels = ", ".join(f"`{label}`" for label in each.labels)
        lines.append(f"| `sightline_{each.name}` | {each.kind} | {labels} | {each.help} |")
    begin, end = "<!-- metrics: written by `make docs` -->\n", "<!-- end of metrics -->"
    text = "\n".join(lines)
    return re.sub(
        f"{re.escape(begin)}.*?{end}", lambda _: f"{begin}\n{text}\n\n{end}", OPERATIONS.read_text(), flags=re.DOTALL
    )
