"""`sightline models`: what can be served. Without a folder, from tables alone, so it answers at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

_USAGE = """usage: sightline models               families, architectures and chat templates
       sightline models FOLDER [flags]
                                     what a checkpoint is, what it needs, and whether it fits this machine;
                                     flags as for `sightline serve`, which shows them: --dtype, --device ..."""


def main(argv: Sequence[str]) -> int:
    """Exit code 0 if the folder can be served here, else that of `sightline serve` (docs/operations.md)."""
    if argv and argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    if not argv:
        print(table())
        return 0
    from sightline import hub
    from sightline.config import ServerConfig
    from sightline.errors import StartupError

    config = ServerConfig.load(argv, prog="sightline models").engine_config()
    if not Path(config.model).expanduser().is_dir():
        print(f"sightline models: {config.model!r} is no folder; name one that holds config.json", file=sys.stderr)
        return 2
    from sightline.engine.describe import describe

    try:
        facts, problem = describe(config, hub.resolve(config.model))
    except StartupError as error:
        print(f"sightline models: {error}", file=sys.stderr)
        return error.exit_code
    for name, value in facts:
        print(f"{name:<16} {value}")
    if problem is None:
        return 0
    print(f"{'fits':<16} no: {problem}")
    return problem.exit_code


def table() -> str:
    """Every architecture with its family and the chat template used when a checkpoint brings none."""
    from sightline.prompt.named_templates import NAMED_TEMPLATES
    from sightline.registry import FAMILIES

    rows = [("family", "architectures in config.json", "pictures", "chat template without its own")]
    for name, family in FAMILIES.items():
        rows.append((family.name, name, "yes" if family.processor else "no", family.chat_template))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, (*widths, 0), strict=True)) for row in rows]
    return "\n".join(
        [
            *lines,
            "",
            f"--chat-template: {', '.join(sorted(NAMED_TEMPLATES))}, a .jinja file, or a .json file in SGLang's form",
            "Layouts: transformers' of 2024 and of version 5; the authors' for LLaVA. Weights: safetensors.",
        ]
    )
