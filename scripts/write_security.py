"""The table of limits in docs/security.md, from `sightline.server.limits`."""

from __future__ import annotations

import re
from pathlib import Path

from sightline.config import ServerConfig
from sightline.prompt.media import MediaLimits
from sightline.server.limits import table

SECURITY = Path(__file__).resolve().parent.parent / "docs" / "security.md"


def security_page() -> str:
    """The page as it is, with the table as it should be."""
    lines = ["| limit | default | flag | past it | of |", "|---|---|---|---|---|"]
    for limit in table(ServerConfig(), MediaLimits()):
        value = ", ".join(limit.value) if isinstance(limit.value, list) else limit.value
        shown = "none" if value is None else f"{value:g} {limit.unit}" if isinstance(value, int | float) else value
        if isinstance(limit.value, bool):
            shown = "yes" if limit.value else "no"
        flag = f"`{limit.flag}`" if limit.flag else ""
        lines.append(f"| {limit.name.replace('_', ' ')} | {shown} | {flag} | {limit.status} | {limit.meaning} |")
    begin, end = "<!-- limits: written by `make docs` -->\n", "<!-- end of limits -->"
    text = "\n".join(lines)
    return re.sub(
        f"{re.escape(begin)}.*?{end}", lambda _: f"{begin}\n{text}\n\n{end}", SECURITY.read_text(), flags=re.DOTALL
    )
