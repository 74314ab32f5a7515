"""`sightline batch`, killed and resumed, with the server's own counters as witness."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests import tiny
from tests.servers import ServerProcess

CONCURRENCY = 16


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess([str(tiny.qwen2_vl()), "--served-model-name", "tiny"]) as process:
        process.wait_ready()
        yield process


def picture(index: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (56, 56), (index % 256, index // 256, 99)).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def line(index: int, **body: object) -> dict:
    content = [
        {"type": "image_url", "image_url": {"url": picture(index)}},
        {"type": "text", "text": f"picture {index}"},
    ]
    fields = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 4, "ignore_eos": True}
    return {
        "custom_id": f"request-{index}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {**fields, "temperature": 0, **body},
    }


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return path


def command(source: Path, target: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "sightline", "batch", str(source), "-o", str(target), *flags]


def run(source: Path, target: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(source, target, *flags), capture_output=True, text=True, timeout=120, check=False)


def results(target: Path) -> list[dict]:
    return [json.loads(each) for each in target.read_text().splitlines()]


def counted(server: ServerProcess, *names: str) -> float:
    text = requests.get(f"{server.base_url}/metrics", timeout=10).text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return sum(s.value for s in samples if s.name.removeprefix("sightline_") in names)


def answers_paid(server: ServerProcess) -> float:
    """Answers that the server finished, and those that it had begun when a client went; when it is idle."""
    deadline = time.monotonic() + 10
    while counted(server, "calls_in_flight") and time.monotonic() < deadline:
        time.sleep(0.05)
    return counted(server, "choices_total", "aborts_total")


def test_five_hundred_pictures_killed_twice(server: ServerProcess, tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", [line(i) for i in range(500)]), tmp_path / "out.jsonl"
    flags = ("--url", server.base_url, "--concurrency", str(CONCURRENCY))
    before = answers_paid(server)
    for enough in (100, 300):
        process = subprocess.Popen(command(source, target, *flags), stderr=subprocess.DEVNULL)
        while not target.exists() or target.read_bytes().count(b"\n") < enough:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        process.kill()
        process.wait()
    # As a machine that stops leaves it: half a line.
    whole = target.read_bytes()
    kept = whole.count(b"\n")
    target.write_bytes(whole + b'{"id": "batch_req_torn", "custom_id": "requ')
    last = run(source, target, *flags)
    assert last.returncode == 0, last.stderr
    assert f"{kept} of 500 results are there already" in last.stderr
    assert "tokens in" in last.stderr
    found = results(target)
    assert sorted(r["custom_id"] for r in found) == sorted(f"request-{i}" for i in range(500))
    assert {r["response"]["status_code"] for r in found} == {200}
    assert all(r["error"] is None and r["response"]["request_id"] for r in found)
    assert all(r["response"]["body"]["usage"]["completion_tokens"] == 4 for r in found)
    assert 500 <= answers_paid(server) - before <= 500 + 2 * CONCURRENCY

    again = run(source, target, *flags)
    assert (again.returncode, results(target)) == (0, found)


def test_failures_have_lines_and_an_exit_code(server: ServerProcess, tmp_path: Path) -> None:
    lines = [
        line(0),
        line(1, model="other"),
        {**line(2), "url": "/v1/responses", "body": {"input": "hi", "max_output_tokens": 16}},
    ]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    done = run(source, target, "--url", server.base_url)
    assert done.returncode == 1
    assert "1 failed (1 with 404)" in done.stderr
    by_id = {r["custom_id"]: r["response"] for r in results(target)}
    assert {name: r["status_code"] for name, r in by_id.items()} == {
        "request-0": 200,
        "request-1": 404,
        "request-2": 200,
    }
    assert by_id["request-1"]["body"]["error"]["code"] == "model_not_found"
    assert by_id["request-2"]["body"]["object"] == "response"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no requests"),
        ("{]\n", "line 1"),
        (
            json.dumps(line(0)) + "\n" + json.dumps(line(0)) + "\n",
            "line 2: custom_id 'request-0' is that of line 1 too",
        ),
        (json.dumps({**line(0), "url": "/v1/embeddings"}), "/v1/embeddings"),
        (json.dumps({**line(0), "method": "GET"}), "GET"),
        (json.dumps(line(0, stream=True)), "no streams"),
        (json.dumps({"custom_id": "a", "url": "/v1/completions"}), "body"),
    ],
)
def test_a_bad_file_is_refused_before_anything_is_asked(tmp_path: Path, text: str, message: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(text)
    done = run(source, tmp_path / "out.jsonl", "--url", "http://127.0.0.1:9")
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_results_of_another_file_are_not_continued(tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", [line(0)]), write(tmp_path / "out.jsonl", [{"custom_id": "stranger"}])
    done = run(source, target, "--url", "http://127.0.0.1:9")
    assert done.returncode == 2
    assert "stranger" in done.stderr
    assert results(target) == [{"custom_id": "stranger"}]


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    import fcntl

    source, target = write(tmp_path / "in.jsonl", [line(0)]), tmp_path / "out.jsonl"
    with target.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = run(source, target, "--url", "http://127.0.0.1:9")
    assert done.returncode == 2
    assert "another run" in done.stderr


def test_a_server_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    done = run(write(tmp_path / "in.jsonl", [line(0)]), tmp_path / "out.jsonl", "--url", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert "cannot be reached" in done.stderr
    assert time.monotonic() - began < 20


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_its_own_server_ends_with_it(tmp_path: Path) -> None:
    """In order at the end, and also when the command is killed."""
    own = [str(tiny.qwen2_vl())]
    source, target = write(tmp_path / "in.jsonl", [line(i) for i in range(4)]), tmp_path / "out.jsonl"
    flags = ("--model", *own, "--", "--served-model-name", "tiny")
    done = run(source, target, *flags)
    assert done.returncode == 0, done.stderr
    assert len(results(target)) == 4

    process = subprocess.Popen(command(source, tmp_path / "other.jsonl", *flags), stderr=subprocess.DEVNULL)
    while not (found := children(process.pid)):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in found) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in found)
