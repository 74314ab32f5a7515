"""The command line as a person types it."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sightline
from sightline import demo


def run(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sightline", *args], capture_output=True, text=True, timeout=120, check=False, cwd=cwd
    )


def test_help_lists_the_commands_without_loading_anything() -> None:
    began = time.monotonic()
    result = run("--help")
    assert time.monotonic() - began < 3
    assert result.returncode == 0
    for command in ("serve", "ask", "chat", "batch", "bench", "doctor", "version"):
        assert command in result.stdout
    imported = subprocess.run(
        [sys.executable, "-c", "import sys, sightline.cli; print(*sorted(sys.modules))"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert not {"torch", "fastapi", "pydantic", "numpy"} & set(imported)


def test_http_process_imports_no_torch() -> None:
    code = "import sys, sightline.server.serve, sightline.prompt.qwen2_vl; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_version() -> None:
    text = run("version").stdout.strip()
    assert text.startswith(f"sightline {sightline.__version__} (Python {platform.python_version()}, torch ")
    assert run("--version").stdout == run("version").stdout


def test_unknown_command_names_the_nearest() -> None:
    result = run("sevre")
    assert result.returncode == 2
    assert "did you mean serve?" in result.stderr


def test_every_command_has_its_help() -> None:
    for command in ("serve", "ask", "doctor", "bench"):
        result = run(command, "--help")
        assert result.returncode == 0, result.stderr
        assert "usage" in result.stdout


def test_ask(tmp_path: Path) -> None:
    result = run("ask", str(demo.sample_path("shapes.png")), "What is in this picture?", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "red circle" in result.stdout
    assert "blue square" in result.stdout
    missing = run("ask", "nothing.png", "What?", cwd=tmp_path)
    assert missing.returncode == 2
    assert "nothing.png" in missing.stderr
    (tmp_path / "text.png").write_text("no picture")
    broken = run("ask", "text.png", "What?", cwd=tmp_path)
    assert broken.returncode == 2
    assert "Traceback" not in broken.stderr


def test_selftest_in_an_empty_folder(tmp_path: Path) -> None:
    began = time.monotonic()
    result = run("doctor", "--selftest", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert time.monotonic() - began < 15
    assert result.stdout.count("\nok ") == len(demo.golden())
    assert "selftest    passed" in result.stdout


def test_selftest_fails_when_an_answer_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from sightline import doctor

    first = demo.golden()[0]
    monkeypatch.setattr(demo, "golden", lambda: [first._replace(answer="The image shows a purple elephant.")])
    assert doctor.selftest() is False
    assert "FAIL" in capsys.readouterr().out
