"""Log lines on stderr: time, level, process role, message; or one JSON object a line."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime
from typing import Any


class Fields(dict[str, Any]):
    """What a line says, by name: `a=1 b=2` in text, members of the object in JSON. None stands for "did not happen"."""

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.items() if value is not None)


class _TextFormatter(logging.Formatter):
    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        stamp = datetime.fromtimestamp(record.created).isoformat(sep=" ", timespec="seconds")
        line = f"[{stamp} {self._role}] {record.levelname}: {record.getMessage()}"
        if record.levelno == logging.INFO:
            line = f"[{stamp} {self._role}] {record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _JsonFormatter(logging.Formatter):
    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "role": self._role,
            "message": record.getMessage(),
        }
        # logging unwraps a mapping that is the only argument.
        if isinstance(record.args, Fields):
            entry |= {"logger": record.name, **record.args}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def setup_logging(level: str = "info", format: str = "text", *, role: str = "server") -> None:
    """Configure the loggers of this process, OpenTelemetry's warnings included; role is in every line (server, engine)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter(role) if format == "json" else _TextFormatter(role))
    for name, least in (("sightline", level.upper()), ("opentelemetry", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(least)
        logger.propagate = False
