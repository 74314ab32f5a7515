"""What the processes of an engine are told at their start, in a file of their run directory. Imports no torch."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn, Self

from sightline.config import EngineConfig
from sightline.logging import setup_logging

_FILE = "engine.json"


class EngineSetup(NamedTuple):
    """name: the engine's in its log."""

    config: EngineConfig
    model_dir: Path
    log_level: str = "info"
    log_format: str = "text"
    name: str = "engine"

    def write(self, run_dir: Path) -> None:
        """Leave it for processes to come."""
        fields = {**self._asdict(), "config": self.config.model_dump(mode="json"), "model_dir": str(self.model_dir)}
        (run_dir / _FILE).write_text(json.dumps(fields))

    @classmethod
    def read(cls, run_dir: Path) -> Self:
        """What the parent wrote."""
        fields = json.loads((run_dir / _FILE).read_text())
        config = EngineConfig.model_validate(fields.pop("config"))
        return cls(config=config, model_dir=Path(fields.pop("model_dir")), **fields)

    def start_log(self, suffix: str = "") -> None:
        """Log as the parent wants it."""
        setup_logging(self.log_level, self.log_format, role=self.name + suffix)


def run_process(main: Callable[[], int]) -> NoReturn:
    """Run main and end this process with its exit code; 1, and a traceback, for an exception.

    At once, without the interpreter's goodbye: threads of collectives would wait there for ranks that are gone.
    """
    code = 1
    try:
        code = main()
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
