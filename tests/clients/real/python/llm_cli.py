"""simonw's llm, the command. It has no way to ask that a tool be called, so a tool is offered only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import BASE, MODEL, QUESTION, SHAPES, Paint, run, see

CONFIG = f"""
- model_id: sightline
  model_name: {MODEL}
  api_base: {BASE}
  api_key_name: sightline
  vision: true
  supports_schema: true
  supports_tools: true
"""


def llm(*args: str) -> str:
    done = subprocess.run(
        [Path(sys.executable).parent / "llm", "-m", "sightline", QUESTION, "-a", SHAPES, "--key", "none", *args],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def picture() -> None:
    see(llm("--no-stream"))


def streaming() -> None:
    see(llm())
    logged = subprocess.check_output([Path(sys.executable).parent / "llm", "logs", "--json", "-n", "1"], text=True)
    assert json.loads(logged)[0]["input_tokens"] > 64


def structured() -> None:
    assert Paint.model_validate_json(llm("--schema", json.dumps(Paint.model_json_schema())))


def offered() -> None:
    assert llm("-T", "llm_version").strip()


with tempfile.TemporaryDirectory() as folder:
    os.environ["LLM_USER_PATH"] = folder
    (Path(folder) / "extra-openai-models.yaml").write_text(CONFIG)
    run(picture, streaming, structured, offered)
