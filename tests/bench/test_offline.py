"""The engine alone, on a small scale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sightline.bench import main


def test_what_is_measured_is_what_was_asked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    flags = ["--num-requests", "5", "--runs", "3", "--max-tokens", "6", "--image-sizes", "64x96", "96x64"]
    engine = {"device": "cpu", "max_total_tokens": 4096}
    assert main(["offline", *flags, "--engine", json.dumps(engine), "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["output_tokens"] == 5 * 6
    assert result["prompt_tokens"] > 5 * 24, "pictures count"
    assert result["memory"]["num_pages"] == 256, "the engine's settings are passed on"
    assert result["request_throughput"] == pytest.approx(5 / result["batch_seconds"])
    for timing in (result["latency"], result["latency_cached"]):
        assert timing["latency_ms"]["count"] == 3
        assert timing["time_to_first_token_ms"]["max"] < timing["latency_ms"]["max"]
    out = capsys.readouterr().out
    assert "3 requests one by one, then 5 at once" in out
    assert "first token, ms, again" in out


def test_mistakes_are_sentences(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["offline", "--engine", '{"dtyp": "float32"}']) == 2
    assert "dtyp" in capsys.readouterr().err
    assert main(["offline", str(tmp_path / "nothing")]) == 3
    assert "no folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["offline", "--engine", "{"])
