"""A hook of MkDocs: links out of docs/ lead to the text of the file, which is copied into the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_OUT = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`](../FILE)` becomes `](files/FILE.txt)`; fragments of such files are dropped."""
    return _OUT.sub(lambda match: f"](files/{match[1]}.txt)", markdown)


def on_files(files: Any, config: Any) -> Any:
    """Adds the files that pages link to."""
    from mkdocs.structure.files import File

    wanted = {match[1] for page in Path(config.docs_dir).glob("*.md") for match in _OUT.finditer(page.read_text())}
    for name in sorted(wanted):
        files.append(File.generated(config, f"files/{name}.txt", content=(ROOT / name).read_text()))
    return files
