"""`sightline doctor` on machines that lack something."""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import socket
import stat
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from sightline import doctor
from tests.models.test_released import SIZES

Usage = namedtuple("Usage", "total used free")


def found(name: str) -> doctor.Finding:
    return next(finding for finding in doctor.findings() if finding.name == name)


def run(*flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sightline", "doctor", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **env})


def test_a_sound_machine() -> None:
    done = run("--json")
    told = json.loads(done.stdout)
    assert (done.returncode, told["ok"]) == (0, True), done.stdout
    names = [finding["name"] for finding in told["findings"]]
    assert names[0] == "sightline"
    assert {"memory", "disk", "driver", "torch", "fits"} <= set(names)
    text = run().stdout
    assert all(finding["value"] in text or finding["name"] == "memory" for finding in told["findings"])


def test_the_machine_is_described_before_torch_is_imported() -> None:
    code = (
        "import sys\nfrom sightline import doctor\n"
        "for finding in doctor.findings():\n    print(finding.name, 'torch' in sys.modules)\n    if finding.name == 'driver': break\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    lines = done.stdout.splitlines()
    assert len(lines) == 9
    assert all(line.endswith("False") for line in lines)


def test_what_fits_goes_by_the_releases_sizes() -> None:
    known = {name.lower(): millions / 1e3 for name, (millions, _) in SIZES.items()}
    assert {name: known[name.lower()] for name in doctor.RELEASES} == pytest.approx(doctor.RELEASES, rel=0.01)


def smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_gpu_that_torch_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if torch.version.cuda is not None:
        pytest.skip("this torch is a CUDA build")
    smi(tmp_path, monkeypatch, "echo 'NVIDIA H200, 143771, 580.159.04'")
    assert found("driver").value == "NVIDIA 580.159.04, 1 GPU"
    finding = found("torch")
    assert finding.verdict == "warn"
    assert "CUDA build" in finding.fix


def test_a_driver_that_fails_leaves_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, monkeypatch, "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    finding = found("driver")
    assert finding.verdict == "warn"
    assert "mismatch" in finding.value
    done = run()
    assert done.returncode == 0
    assert "warning: the CPU serves; for the GPU nvidia-smi must work" in done.stdout


@pytest.mark.parametrize("module", ["pydantic", "msgspec"])
def test_a_broken_installation_is_reported_not_met(module: str) -> None:
    """Even where our own modules could not be imported."""
    code = (
        f"import sys, importlib.metadata as m\nsys.modules[{module!r}] = None\nversion = m.version\n"
        "def without(name):\n"
        f"    if name == {module!r}: raise m.PackageNotFoundError(name)\n"
        "    return version(name)\n"
        "m.version = without\nfrom sightline import cli\nsys.exit(cli.main(['doctor']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert f"PROBLEM: pip install {module}" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_bad_setting_does_not_end_the_report() -> None:
    done = run("--json", SIGHTLINE_PORT="abc")
    told = json.loads(done.stdout)
    assert (done.returncode, told["ok"]) == (1, False)
    settings = next(finding for finding in told["findings"] if finding["name"] == "settings")
    assert "--port" in settings["value"]
    assert told["findings"][-1]["name"] == "fits"


def test_an_address_of_another_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGHTLINE_HOST", "::1")
    finding = found("address")
    assert "family" not in finding.value


def test_a_missing_package_ends_with_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def without(name: str) -> str:
        if name == "pyzmq":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    lines: list[str] = []
    assert doctor.report(out=lines.append) is False
    assert any("PROBLEM: pip install pyzmq" in line for line in lines)


def test_small_rooms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage(64 << 20, 0, 64 << 20))
    assert found("shared memory").verdict == "warn"
    assert "--shm-size" in found("shared memory").fix
    assert "HF_HOME" in found("disk").fix
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        assert "ulimit -n" in found("open files").fix
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_limits_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"cpu.max": "50000 100000", "memory.max": str(1 << 30), "memory.current": str(1 << 29)}
    monkeypatch.setattr(doctor, "_cgroup", files.get)
    assert "limited to 0.5" in found("processor").value
    assert found("processor").verdict == "warn"
    assert found("memory").value == "1.0 GiB, 0.5 available"


def test_a_taken_port(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setenv("SIGHTLINE_PORT", str(other.getsockname()[1]))
        finding = found("address")
    assert finding.verdict == "warn"
    assert "--port" in finding.fix


def test_a_token_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert found("hub").value == "with a token"
