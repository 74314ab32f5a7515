"""How long the property tests search: TEST_DEPTH=50 makes them fifty times longer, with fresh random choices."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

DEPTH = int(os.environ.get("TEST_DEPTH", "1"))


def deep(examples: int, steps: int = 50) -> settings:
    """Hypothesis settings for a state machine: `examples` runs of up to `steps` rules, times TEST_DEPTH."""
    return settings(
        max_examples=examples * DEPTH,
        stateful_step_count=steps,
        deadline=None,
        derandomize=DEPTH == 1,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
