"""The rehearsal of a start compiles what the start then launches."""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no triton on this machine")

from triton import AsyncCompileMode

from sightline.engine import ahead
from tests import released


@pytest.mark.parametrize("kind", ["qwen2-vl-7b", "llava-onevision-7b", "llama-3.2-11b-vision"])
def test_a_start_launches_nothing_that_was_not_compiled_ahead(kind: str, tmp_path: Path) -> None:
    released.write(kind, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    # what a layer launches does not depend on how many there are
    text = config.get("text_config", config)
    text |= {"num_hidden_layers": 5} | ({"cross_attention_layers": [3]} if "cross_attention_layers" in text else {})
    (tmp_path / "config.json").write_text(json.dumps(config))
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


def test_a_fork_leaves_what_it_did_on_disk_and_harms_nobody(tmp_path: Path) -> None:
    here = os.getpid()

    def work() -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        raise ValueError("told to nobody")

    ahead._in_a_fork(work)
    assert int((tmp_path / "pid").read_text()) != here
    assert os.getpid() == here


def test_a_fork_that_hangs_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ahead, "_FORK_SECONDS", 1.0)

    def hang() -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(60)

    began = time.monotonic()
    ahead._in_a_fork(hang)
    assert time.monotonic() - began < 10
    assert "stopped" in caplog.text
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_without_forks_threads_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory() -> int:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(os, "fork", no_memory)
    compiled = []

    class Kernel:
        run = None

    def compile_kernel() -> Kernel:
        compiled.append(Kernel())
        return compiled[-1]

    assert ahead._compile_in_a_fork(compile_kernel) is compiled[0]
    assert len(compiled) == 1


def test_only_what_the_cache_lacks_is_compiled_in_forks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.cache import get_cache_manager

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    forked = []
    monkeypatch.setattr(ahead, "_in_a_fork", forked.append)

    def compile_kernel() -> str:
        get_cache_manager(hashlib.sha256(b"key").hexdigest()).put("code", "kernel.ptx", binary=False)
        return "kernel"

    for _ in range(2):
        with ThreadPoolExecutor(1) as threads:
            mode = ahead._mode(threads)
            # what the mode calls when the kernel is there, and in newer versions when it failed
            more = [lambda *_: None] * (len(inspect.signature(AsyncCompileMode.submit).parameters) - 3)
            assert mode.submit("key", compile_kernel, *more).result() == "kernel"
    assert forked == [compile_kernel]
