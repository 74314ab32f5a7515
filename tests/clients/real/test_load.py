"""Load tools of others, unmodified."""

from __future__ import annotations

import json
from pathlib import Path

from sightline.demo import model_path
from tests.clients.real.environments import run_block
from tests.clients.real.test_page import BLOCKS


def test_aiperf(server: str, tmp_path: Path) -> None:
    """The page's command: six requests with pictures, streamed."""
    (tmp_path / "sightline-tiny").symlink_to(model_path())
    ((language, code),) = [(language, code) for where, language, code in BLOCKS if where == "load"]
    run_block("load", language, code, server, tmp_path)
    (report,) = (tmp_path / "artifacts").rglob("profile_export_aiperf.json")
    result = json.loads(report.read_text())
    assert result["request_count"]["avg"] == 6
    assert not result["error_summary"]
    assert result["num_images"]["avg"] == 1
    assert result["time_to_first_token"]["avg"] > 0
    assert result["usage_completion_tokens"]["avg"] > 1
    # more than the sixteen of the text: the pictures' are among them
    assert result["usage_prompt_tokens"]["avg"] > 32
