"""Faults for the engine process of a test's server: PYTHONPATH points here, so the server itself has no hook for them.

A prompt that holds the ids of POISON breaks every step that it is part of, as a request would that meets a bug in a kernel.
"""

import os
import sys

POISON = os.environ.get("SIGHTLINE_TEST_POISON")

if POISON and "sightline.engine.process" in getattr(sys, "orig_argv", []):
    from sightline.engine import runner

    poison = bytes.fromhex(POISON)
    forward = runner.ModelRunner.forward

    def poisoned(self, rows, num_decode):
        for row in rows:
            if poison in row.request.prompt_ids.astype("<i4").tobytes():
                raise RuntimeError("this request breaks every step")
        return forward(self, rows, num_decode)

    runner.ModelRunner.forward = poisoned
