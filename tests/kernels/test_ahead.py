"""The rehearsal of a start compiles what the start then launches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no triton on this machine")

from tests import released


@pytest.mark.parametrize("kind", ["qwen2-vl-7b", "llava-onevision-7b"])
def test_a_start_launches_nothing_that_was_not_compiled_ahead(kind: str, tmp_path: Path) -> None:
    released.write(kind, tmp_path)
    # under TRITON_INTERPRET, which other tests here may run with, nothing is compiled
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": ":".join(sys.path),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-m", "tests.kernels.rehearsal", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    first, *late = done.stdout.splitlines()
    assert late == []
    assert int(first.split()[1]) > 20
