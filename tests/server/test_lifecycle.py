"""Start and keys: what a supervisor and a terminal see. Drain and death: tests/reliability/test_life.py."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import requests

from tests import tiny
from tests.server.conftest import ask
from tests.server.test_playground import HTML
from tests.servers import ServerProcess


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sightline", "serve", *args], capture_output=True, text=True, timeout=60, check=False
    )


def test_listens_before_it_is_ready() -> None:
    """Loading a tiny model takes a second or two; a machine that stalls just then gets another try."""
    for _ in range(3):
        with ServerProcess([str(tiny.qwen2_vl())]) as server:
            server.wait_for("/livez", timeout=20)
            ready = requests.get(f"{server.base_url}/readyz", timeout=5)
            startup = requests.get(f"{server.base_url}/startupz", timeout=5)
            early = requests.post(f"{server.base_url}/v1/chat/completions", json={"messages": ask("x")}, timeout=5)
            page = requests.get(server.base_url, headers=HTML, timeout=5)
            models = requests.get(f"{server.base_url}/v1/models", timeout=5)
            server.wait_ready()
            if models.status_code == 200:
                continue
            assert models.status_code == early.status_code == ready.status_code == startup.status_code == 503
            assert int(ready.headers["retry-after"]) >= 1
            assert ready.json()["error"]["code"] == "server_starting"
            assert startup.json()["state"] == "loading"
            assert startup.json()["elapsed_seconds"] >= 0
            assert page.text.startswith("<!doctype html>")
            _check_ready(server)
            assert server.terminate() == 0
            return
    pytest.fail("the server was ready before it answered anything, three times")


def _check_ready(server: ServerProcess) -> None:
    assert requests.get(f"{server.base_url}/health", timeout=5).status_code == 200
    assert requests.get(f"{server.base_url}/health_generate", timeout=5).status_code == 200
    assert requests.get(f"{server.base_url}/startupz", timeout=5).json()["state"] == "ready"
    log = server.log()
    for phase in ("imports", "weights", "warm-up"):
        assert f"loading: {phase}" in log
    assert "pages of 16 tokens" in log
    assert "a picture of 1024x1024 takes" in log


def test_sglangs_command_line_is_the_same_server_and_leaves_nothing_behind() -> None:
    # Our own flags are understood too.
    flags = ["--model-path", str(tiny.qwen2_vl()), "--chat-template=qwen2-vl", "--no-enable-playground"]
    with ServerProcess(flags, module=("sightline.launch_server",)) as server:
        server.wait_ready()
        body = {"messages": ask("hello"), "max_tokens": 2}
        assert requests.post(f"{server.base_url}/v1/chat/completions", json=body, timeout=30).status_code == 200
        assert requests.get(server.base_url, headers=HTML, timeout=5).json()["name"] == "sightline"
        assert requests.get(f"{server.base_url}/playground/app.js", timeout=5).status_code == 404
        children = psutil.Process(server.pid).children(recursive=True)
        # What the two processes share is in there.
        (folder,) = [Path(c.cmdline()[-1]) for c in children if "sightline.engine.process" in c.cmdline()]
        assert folder.is_dir()
        assert server.terminate() == 0
    assert not any(child.is_running() for child in children)
    assert not folder.exists()


def test_keys_guard_everything_but_the_probes(keyed_server: str) -> None:
    for path in ("/v1/models", "/server_info", "/model_info", "/health_generate", "/nothing"):
        response = requests.get(keyed_server + path, timeout=5)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key"), path
    for key in ("alpha", "beta"):
        headers = {"Authorization": f"Bearer {key}"}
        assert requests.get(f"{keyed_server}/v1/models", headers=headers, timeout=5).status_code == 200
    for wrong in ("Bearer alph", "Bearer alphaa", "Basic alpha", "alpha", b"Bearer \xff\xfe"):
        response = requests.get(f"{keyed_server}/v1/models", headers={"Authorization": wrong}, timeout=5)
        assert response.status_code == 401
    # The host header must not decide what is open.
    response = requests.get(f"{keyed_server}/v1/models", headers={"Host": "x/health?y="}, timeout=5)
    assert response.status_code in (400, 401)
    for path in ("/livez", "/readyz", "/health", "/startupz", "/ping", "/version"):
        assert requests.get(keyed_server + path, timeout=5).status_code == 200


def test_only_the_http_port_listens(tiny_process: ServerProcess) -> None:
    family = [psutil.Process(tiny_process.pid), *psutil.Process(tiny_process.pid).children(recursive=True)]
    listening = [c.laddr.port for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert listening == [tiny_process.port]


def test_batches_are_logged(tiny_process: ServerProcess) -> None:
    """In the words that SGLang's users look for; a decode line every forty steps."""
    mark = tiny_process.log_size()
    body = {"messages": ask("x"), "max_tokens": 90, "ignore_eos": True}
    assert requests.post(f"{tiny_process.base_url}/v1/chat/completions", json=body, timeout=30).status_code == 200
    deadline = time.monotonic() + 5
    lines = (
        r"Prefill batch\. #new-seq: 1, #new-token: \d+, #cached-token: \d+, #image: 0, token usage: \d\.\d\d, #running-req: \d+, "
        r"#queue-req: 0",
        r"Decode batch\. #running-req: 1, #token: \d+, token usage: \d\.\d\d, gen throughput \(token/s\): [\d.]+, "
        r"#queue-req: 0",
    )
    while not all(re.search(line, tiny_process.log(mark)) for line in lines):
        assert time.monotonic() < deadline, tiny_process.log(mark)
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["--prot", "1"], 2, "did you mean --port?"),
        (["--port", "seven"], 2, "--port"),
        (["/no/such/folder"], 3, "/no/such/folder"),
        (["--device", "cuda", str(tiny.qwen2_vl())], 6, "--device cpu"),
        (["--max-total-tokens", "100", "--context-length", "4096", str(tiny.qwen2_vl())], 4, "--context-length"),
    ],
)
def test_exit_codes(args: list[str], code: int, text: str) -> None:
    if code == 6:
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a CUDA device")
    result = run(*args) if "--prot" in args or "--port" in args else run(*args, "--port", "0")
    assert result.returncode == code, result.stderr
    assert text in result.stderr
    assert "Traceback" not in result.stderr


def test_taken_port_is_exit_5() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = run(str(tiny.qwen2_vl()), "--port", str(taken.getsockname()[1]))
    assert result.returncode == 5
    assert "--port" in result.stderr


def test_startup_failure_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    result = run(str(tmp_path), "--port", "0")
    assert result.returncode == 3
    assert "GPT2LMHeadModel" in result.stderr
    assert "Traceback" not in result.stderr
