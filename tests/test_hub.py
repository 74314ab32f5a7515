"""Folders as they are, hub names by download: from a stand-in hub on the loopback, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sightline import hub
from sightline.errors import ModelNotFoundError
from tests.hub_server import COMMIT, HubServer

WEIGHTS = os.urandom(3_000_000)
FILES = {
    "config.json": b'{"architectures": ["Qwen2VLForConditionalGeneration"]}',
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"never fetched",
    "modeling_custom.py": b"never fetched",
    "README.md": b"never fetched",
}

CHILD = """
import json, sys
from sightline import hub
from sightline.errors import ModelNotFoundError
progress = []
try:
    path = hub.resolve(sys.argv[1], on_progress=lambda f, d: progress.append((f, d)), **json.loads(sys.argv[2]))
    print(json.dumps({"path": str(path), "progress": progress}))
except ModelNotFoundError as error:
    print(json.dumps({"error": str(error)}))
"""


def child(url: str, home: Path, model: str, options: dict[str, str] | None = None, **env: str) -> subprocess.Popen[str]:
    """A process that resolves `model` from the hub at `url`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        "NO_PROXY": "127.0.0.1",
        **env,
    }
    command = [sys.executable, "-c", CHILD, model, json.dumps(options or {})]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def resolve(url: str, home: Path, model: str, options: dict[str, str] | None = None, **env: str) -> dict:
    """What the child found."""
    process = child(url, home, model, options, **env)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return json.loads(out)


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer(FILES) as hub_server:
        yield hub_server


def test_a_folder_is_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert hub.resolve(str(tmp_path)) == tmp_path.resolve()


def test_a_folder_needs_no_hub_library(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    code = "import sys; from sightline import hub; hub.resolve(sys.argv[1]); print('huggingface_hub' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("/no/such/folder", "no folder /no/such/folder"),
        ("./missing", "no folder missing"),
        ("a/b/c", "no folder a/b/c"),
        ("{tmp}", "holds no config.json. Did you mean {tmp}/inner?"),
        ("{tmp}/inner/config.json", "is a file"),
    ],
)
def test_what_is_no_checkpoint_folder(tmp_path: Path, model: str, words: str) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "config.json").write_text("{}")
    with pytest.raises(ModelNotFoundError) as error:
        hub.resolve(model.format(tmp=tmp_path))
    assert words.format(tmp=tmp_path) in str(error.value)


def test_download_with_progress_then_from_the_cache(server: HubServer, tmp_path: Path) -> None:
    found = resolve(server.url, tmp_path, "owner/tiny")
    folder = Path(found["path"])
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    fractions = [f for f, _ in found["progress"] if f is not None]
    assert fractions == sorted(fractions)
    assert fractions[-1] > 0.99
    assert found["progress"][-1][1] == "3.0 of 3.0 MB"
    assert not any("never" in r or ".bin" in r or ".py" in r for r in server.requests)

    server.requests.clear()
    assert resolve(server.url, tmp_path, "owner/tiny", {"revision": "main"})["path"] == found["path"]
    assert not any("resolve" in r for r in server.requests)
    # without a network, by switch and by fact
    assert resolve(server.url, tmp_path, "owner/tiny", HF_HUB_OFFLINE="1")["path"] == found["path"]
    assert resolve("http://127.0.0.1:9", tmp_path, "owner/tiny")["path"] == found["path"]


def test_a_broken_connection_resumes_in_the_middle_of_a_file(tmp_path: Path) -> None:
    # the hub's library writes pieces of 10 MiB
    weights = os.urandom(1 << 20) * 24
    with HubServer({**FILES, "model.safetensors": weights}) as server:
        server.cut = ("model.safetensors", 16 << 20)
        found = resolve(server.url, tmp_path, "owner/tiny")
        assert (Path(found["path"]) / "model.safetensors").read_bytes() == weights
        assert len(server.ranges) == 1
        assert 10 << 20 <= server.ranges[0] <= 16 << 20
        assert found["progress"][-1][0] > 0.99


def test_a_killed_download_keeps_finished_files(server: HubServer, tmp_path: Path) -> None:
    server.stall = ("model.safetensors", 2_000_000)
    process = child(server.url, tmp_path, "owner/tiny")
    assert server.stalled.wait(30)
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("**/snapshots/*/*.json"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    server.stall = None
    server.release.set()
    server.requests.clear()

    found = resolve(server.url, tmp_path, "owner/tiny")
    assert (Path(found["path"]) / "model.safetensors").read_bytes() == WEIGHTS
    assert [r for r in server.requests if r.startswith("GET") and "resolve" in r] == [
        f"GET /owner/tiny/resolve/{COMMIT}/model.safetensors"
    ]
    assert found["progress"][-1][0] > 0.99


def test_download_dir_and_revision(server: HubServer, tmp_path: Path) -> None:
    options = {"download_dir": str(tmp_path / "here"), "revision": COMMIT}
    found = resolve(server.url, tmp_path, "owner/tiny", options)
    assert Path(found["path"]).is_relative_to((tmp_path / "here").resolve())


@pytest.mark.parametrize(
    ("model", "options", "env", "words"),
    [
        ("owner/misspelt", {}, {}, "Check the spelling"),
        ("owner/gated", {}, {}, "HF_TOKEN"),
        ("owner/broken", {}, {}, "no *.safetensors"),
        ("owner/tiny", {"revision": "nope"}, {}, "no revision nope"),
        ("owner/tiny", {}, {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ("owner/tiny", {}, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached"),
        ("what is this?", {}, {}, "neither a folder here nor a hub name"),
    ],
)
def test_remedies(
    server: HubServer, tmp_path: Path, model: str, options: dict[str, str], env: dict[str, str], words: str
) -> None:
    found = resolve(server.url, tmp_path, model, options, **env)
    assert words in found["error"]
