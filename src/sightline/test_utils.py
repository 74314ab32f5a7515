"""What SGLang's pages import from its test utilities."""

from __future__ import annotations

import os


def is_in_ci() -> bool:
    """Whether SIGHTLINE_IS_IN_CI says so; pages then take their server from elsewhere."""
    return os.environ.get("SIGHTLINE_IS_IN_CI", "").lower() in ("1", "true")
