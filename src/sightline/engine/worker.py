"""A rank of a tensor-parallel engine other than the first: `python -m sightline.engine.worker RUN_DIR RANK`.

It loads its share of the model and does what rank 0 tells it, until rank 0 is gone.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

from sightline.engine.loop import limit_spinning
from sightline.engine.setup import EngineSetup, run_process


def main() -> int:
    """Serve rank 0; the exit code says how a start failed."""
    # The terminal's Ctrl-C and the supervisor's SIGTERM reach the whole group: rank 0 says when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    run_dir, rank = Path(sys.argv[1]), int(sys.argv[2])
    EngineSetup.read(run_dir).start_log(f", rank {rank}")
    limit_spinning()
    # torch takes a second
    from sightline.engine.rank_loop import run_rank

    return run_rank(run_dir, rank)


def _end_with_parent() -> None:
    """Rank 0 holds the other end of our standard input and sends nothing: what comes is the end, when it dies or closes it."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(0)


if __name__ == "__main__":
    run_process(main)
