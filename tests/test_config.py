"""Settings: one declaration, four sources, clear mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from sightline.config import EngineConfig, ServerConfig, declared, dump_public


def load(*argv: str, env: dict[str, str] | None = None) -> ServerConfig:
    return ServerConfig.load(argv, env=env or {})


def test_command_line_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("port: 1001\nhost: 0.0.0.0\nmax-num-seqs: 3\napi-key: [a, b]\n")
    config = load(
        "--config", str(file), "--port", "1003", env={"SIGHTLINE_PORT": "1002", "SIGHTLINE_LOG_LEVEL": "error"}
    )
    assert (config.port, config.host, config.log_level) == (1003, "0.0.0.0", "error")
    assert (config.max_running_requests, config.api_key, config.dtype) == (3, ("a", "b"), "auto")
    assert load("--config", str(file), env={"SIGHTLINE_PORT": "1002"}).port == 1002


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (["--model", "m"], ["--model-path", "m"]),
        (["--model", "m"], ["m"]),
        (["--context-length", "99"], ["--max-model-len=99"]),
        (["--mem-fraction-static", "0.5"], ["--gpu-memory-utilization", "0.5"]),
        (["--max-running-requests", "7"], ["--max-num-seqs", "7"]),
        (["--chunked-prefill-size", "64"], ["--max-num-batched-tokens", "64"]),
        (["--random-seed", "1"], ["--seed", "1"]),
        (["--chat-template", "qwen2-vl"], ["--chat-template=qwen2-vl"]),
    ],
)
def test_both_spellings(ours: list[str], theirs: list[str]) -> None:
    assert load(*ours) == load(*theirs)


def test_lists_repeat_and_switches_have_a_negative() -> None:
    assert load("--api-key", "a", "--api-key", "b").api_key == ("a", "b")
    assert load(env={"SIGHTLINE_API_KEY": "a, b"}).api_key == ("a", "b")
    assert load("--disable-radix-cache").disable_radix_cache is True
    assert load("--no-disable-radix-cache", env={"SIGHTLINE_DISABLE_RADIX_CACHE": "1"}).disable_radix_cache is False


def test_names_without_our_prefix_are_not_read() -> None:
    assert load(env={"PORT": "1", "HOST": "x", "MODEL": "y"}) == load()


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--prot", "1"], "unknown flag --prot; did you mean --port?"),
        (["--port", "70000"], "--port"),
        (["--port", "x"], "--port"),
        (["--dtype", "int4"], "int4"),
        (["--mem-fraction-static", "1.5"], "--mem-fraction-static"),
        (["--config", "/nowhere.yaml"], "--config"),
    ],
)
def test_mistakes_end_with_code_2(argv: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load(*argv)
    assert ended.value.code == 2
    assert text in capsys.readouterr().err


def test_unknown_key_in_the_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("max_runing_requests: 3\n")
    with pytest.raises(SystemExit):
        load("--config", str(file))
    assert "did you mean 'max-running-requests'" in capsys.readouterr().err


def test_engine_part_survives_the_trip_to_the_engine_process() -> None:
    engine = load("m", "--dtype", "float32", "--port", "1").engine_config()
    assert EngineConfig.model_validate(engine.model_dump(mode="json")) == engine
    assert "port" not in engine.model_dump()


def test_public_view_has_no_keys_and_no_paths() -> None:
    shown = str(dump_public(load("/data/secret-model", "--api-key", "hunter2", "--download-dir", "/data/x")))
    assert "hunter2" not in shown
    assert "/data" not in shown


def test_every_setting_has_help_and_no_flag_is_used_twice() -> None:
    rows = declared(ServerConfig)
    assert all(help for _, _, _, help, _ in rows)
    flags = [flag for _, spellings, *_ in rows for flag in spellings]
    assert len(flags) == len(set(flags))
