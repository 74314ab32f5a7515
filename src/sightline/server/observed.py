"""What the HTTP process sees of answers: the times that clients feel, and how answers end."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from sightline.types import Histogram


@dataclass
class Observed:
    """Since start. first_token: from a request's body to its first token. between_tokens: from one token of a choice to the
    next. request: from the body to the end. finishes: choices by finish reason."""

    first_token: Histogram = field(default_factory=Histogram)
    between_tokens: Histogram = field(default_factory=Histogram)
    request: Histogram = field(default_factory=Histogram)
    finishes: Counter[str] = field(default_factory=Counter)
