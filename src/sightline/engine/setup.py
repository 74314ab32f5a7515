"""What the processes of an engine are told at their start, in files of their run directory. Imports no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn, Self

import msgspec

from sightline.config import EngineConfig
from sightline.logging import setup_logging

_SETUP, _MEETING = "engine.json", "meeting.json"


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
        (run_dir / _SETUP).write_text(json.dumps(fields))

    @classmethod
    def read(cls, run_dir: Path) -> Self:
        """What the parent wrote."""
        fields = json.loads((run_dir / _SETUP).read_text())
        config = EngineConfig.model_validate(fields.pop("config"))
        return cls(config=config, model_dir=Path(fields.pop("model_dir")), **fields)

    def start_log(self, suffix: str = "") -> None:
        """Log as the parent wants it."""
        setup_logging(self.log_level, self.log_format, role=self.name + suffix)


class Meeting(msgspec.Struct):
    """Where the ranks of an engine meet. store: by which their collectives find each other, a file's or `tcp:` URL. orders: ZeroMQ's
    address of rank 0 for each other rank, in order."""

    store: str
    orders: list[str]

    def write(self, run_dir: Path) -> None:
        """Leave it for this machine's ranks."""
        (run_dir / _MEETING).write_bytes(msgspec.json.encode(self))

    @classmethod
    def read(cls, run_dir: Path) -> Self:
        """What the process that starts ranks wrote."""
        return msgspec.json.decode((run_dir / _MEETING).read_bytes(), type=cls)


def start_rank(run_dir: Path, rank: int) -> subprocess.Popen[bytes]:
    """A process for a rank other than the first. It ends when its standard input does, and so with this process in whatever way."""
    command = [sys.executable, "-m", "sightline.engine.worker", str(run_dir), str(rank)]
    return subprocess.Popen(command, stdin=subprocess.PIPE)


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
