"""Write the pages of docs/ that are made from the code: `make docs`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.write_cli import CLI, cli_page
from scripts.write_compatibility import COMPATIBILITY, compatibility_page, conformance_passes
from scripts.write_migrating import MIGRATING, migrating_page
from scripts.write_operations import OPERATIONS, operations_page
from scripts.write_security import SECURITY, security_page
from sightline.config import ENV_PREFIX, EngineConfig, ServerConfig, declared

CONFIGURATION = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

HEAD = f"""# Configuration

<!-- Written by `make docs` from src/sightline/config.py. A test fails when this page is not current. -->

Every setting is declared once and can be given in four places. The first that names it wins:

1. the command line: `sightline serve --port 9000`
2. the environment: `{ENV_PREFIX}PORT=9000`; lists are separated by commas
3. a YAML file: `sightline serve --config server.yaml` with a line `port: 9000`
4. the default

`sightline serve MODEL` is short for `--model MODEL`. Flags with several spellings accept each of them, in the file too. A wrong
value or an unknown flag ends the command with exit code 2 and a message that names it.
"""

ENGINE = """
The offline `Engine` takes these as keywords: `Engine("folder", context_length=4096)`.
"""


def configuration_page() -> str:
    """The whole page."""
    engine = set(EngineConfig.model_fields)
    rows = declared(ServerConfig)
    parts = [HEAD, "\n## Server\n\n", _table([r for r in rows if r[0] not in engine])]
    parts += ["\n## Engine\n", ENGINE, "\n", _table([r for r in rows if r[0] in engine])]
    return "".join(parts)


def _table(rows: list[tuple[str, tuple[str, ...], str, str, object]]) -> str:
    lines = ["| flag | environment | type | default | |", "|---|---|---|---|---|"]
    for name, flags, kind, help, default in rows:
        spellings = "<br>".join(f"`{flag}`" for flag in flags)
        value = "" if default in (None, (), "") else f"`{str(default).lower() if kind == 'switch' else default}`"
        cells = (spellings, f"`{ENV_PREFIX}{name.upper()}`", kind, value, help)
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(lines) + "\n"


PAGES: dict[Path, Callable[[], str]] = {
    CONFIGURATION: configuration_page,
    CLI: cli_page,
    MIGRATING: migrating_page,
    COMPATIBILITY: compatibility_page,
    SECURITY: security_page,
    OPERATIONS: operations_page,
}

if __name__ == "__main__":
    if not conformance_passes():
        sys.exit("docs/compatibility.md says what the conformance tests prove: make them pass first")
    for path, page in PAGES.items():
        path.write_text(page())
