"""The environments that `make test-clients` makes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).parent


def python(environment: str) -> Path:
    """The interpreter of .venv-clients/`environment`."""
    path = ROOT / ".venv-clients" / environment / "bin" / "python"
    assert path.exists(), f"{path.relative_to(ROOT)} is missing: run make test-clients"
    return path


def node() -> str:
    """The node that runs tests/clients/real/node, which must be installed."""
    path = shutil.which("node")
    assert path, "node is missing: install Node.js 20 or newer"
    assert (HERE / "node" / "node_modules").exists(), "node_modules is missing: run make test-clients"
    return path


def environ(server: str) -> dict[str, str]:
    """No proxy stands between a client and its own machine, and no key of the environment gets anywhere.

    HF_HUB_OFFLINE goes: with it, aiperf takes no local folder for a tokenizer.
    """
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "HF_HUB_OFFLINE"))}
    return {**keep, "SERVER": server, "OPENAI_API_KEY": "none", "NO_PROXY": "*", "no_proxy": "*"}


def output(command: list[str | Path], server: str, timeout: float = 110, **more: object) -> str:
    """What the command prints; its errors in the failure."""
    done = subprocess.run(
        command,
        env=environ(server),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        **more,  # type: ignore[call-overload]
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"[-6000:]
    return done.stdout


def run_block(environment: str, language: str, code: str, server: str, folder: Path) -> str:
    """What a block of docs/clients.md prints, run in `folder` with `server` as localhost:8000."""
    code = code.replace("http://localhost:8000", server)
    if language == "js":
        (folder / "node_modules").symlink_to(HERE / "node" / "node_modules")
        (folder / "block.mjs").write_text(code)
        return output([node(), "block.mjs"], server, cwd=folder)
    if language == "python":
        return output([python(environment), "-c", code], server, cwd=folder)
    paths = f'export PATH="{python(environment).parent}:$PATH" LLM_USER_PATH="$PWD"'
    return output(["bash", "-euo", "pipefail", "-c", f"{paths}\n{code}"], server, cwd=folder)
