"""Strict reading of a checkpoint's JSON: what is missing, of the wrong type or unsupported is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from sightline.errors import CheckpointError

T = TypeVar("T")
_REQUIRED: Any = object()


class Fields:
    """Typed access to one JSON object. `where` is its place in messages, e.g. "config.json: vision_config"."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self.values = values
        self.where = where

    def error(self, key: str, problem: str) -> CheckpointError:
        """The error that names `key` and its place."""
        separator = ": " if self.where.endswith(".json") else "."
        return CheckpointError(f"{self.where}{separator}{key} {problem}")

    def get(self, kind: type[T], *keys: str, default: Any = _REQUIRED) -> T:
        """The first of `keys` (spellings of different releases) that is present and not null."""
        for key in keys:
            value = self.values.get(key)
            if value is None:
                continue
            if kind is float and type(value) is int:
                return kind(value)  # type: ignore[call-arg]
            if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
                raise self.error(key, f"is {value!r}, where {kind.__name__} is expected")
            return value
        if default is _REQUIRED:
            raise self.error(keys[0], "is missing")
        return default

    def positive(self, *keys: str, default: int | None = None) -> int:
        """An integer of at least 1."""
        value = self.get(int, *keys, default=_REQUIRED if default is None else default)
        if value < 1:
            raise self.error(keys[0], f"is {value}, where a positive number is expected")
        return value

    def section(self, key: str, *, optional: bool = False) -> Fields | None:
        """A nested object; None if `optional` and absent."""
        values = self.get(dict, key, default=None if optional else _REQUIRED)
        if values is None:
            return None
        separator = ": " if self.where.endswith(".json") else "."
        return Fields(values, f"{self.where}{separator}{key}")

    def floats(self, key: str, length: int, default: Sequence[float]) -> tuple[float, ...]:
        """A list of `length` numbers."""
        value = self.get(list, key, default=list(default))
        if len(value) != length or not all(isinstance(x, int | float) for x in value):
            raise self.error(key, f"is {value!r}, where {length} numbers are expected")
        return tuple(float(x) for x in value)

    def one_of(self, kind: type[T], *keys: str, allowed: Sequence[T], default: Any = _REQUIRED) -> T:
        """A value that we implement."""
        value = self.get(kind, *keys, default=default)
        if value not in allowed:
            choices = ", ".join(repr(x) for x in allowed)
            raise self.error(keys[0], f"is {value!r}, which is not supported (supported: {choices})")
        return value


def refuse_quantization(config: Mapping[str, Any]) -> None:
    """Quantised weights would load as garbage or fail on their names: say what is the matter instead."""
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise CheckpointError(
            f"config.json: quantization_config ({method}) is not supported; use the unquantised checkpoint of this model"
        )
