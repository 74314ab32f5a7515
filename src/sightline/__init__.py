"""sightline: an inference server for vision-language models with OpenAI-compatible APIs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sightline.engine.offline import Engine
    from sightline.engine.output import RequestOutput
    from sightline.types import SamplingParams

__version__ = "0.1.0"
__all__ = ["Engine", "RequestOutput", "SamplingParams", "__version__"]

_HOME = {
    "Engine": "sightline.engine.offline",
    "RequestOutput": "sightline.engine.output",
    "SamplingParams": "sightline.types",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that the command line and the HTTP process start without the engine's imports.
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
