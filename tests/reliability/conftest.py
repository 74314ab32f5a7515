"""One guarded server for the scorecard: small, with keys, short limits, and requests that break every step they are in."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from sightline.prompt.tokenizer import Tokenizer
from sightline.types import ids_to_bytes
from tests import tiny
from tests.servers import ServerProcess

POISON = "☠☠☠☠☠☠"
FLAGS = """--served-model-name tiny --allow-private-media --api-key alpha --api-key beta --admin-api-key operator --media-timeout 1
--client-timeout 3 --stream-keep-alive 0.3 --context-length 512 --max-total-tokens 1024 --max-running-requests 16""".split()


@dataclass
class Guarded:
    """The server, and short ways to ask it."""

    process: ServerProcess
    url: str

    def post(self, body: dict[str, Any], key: str = "alpha", **options: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {key}", **options.pop("headers", {})}
        body = {"temperature": 0, "max_tokens": 4, **body}
        return requests.post(f"{self.url}/v1/chat/completions", json=body, headers=headers, timeout=60, **options)

    def text(self, body: dict[str, Any]) -> str:
        response = self.post(body)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["message"]["content"]

    def info(self) -> dict[str, Any]:
        return requests.get(f"{self.url}/server_info", headers={"x-api-key": "alpha"}, timeout=10).json()

    def flush(self) -> None:
        assert (
            requests.post(f"{self.url}/flush_cache", headers={"x-api-key": "operator"}, timeout=10).status_code == 200
        )

    def wait_idle(self, seconds: float = 5.0) -> dict[str, Any]:
        """The counters once nothing is in flight and no page in use. The engine's come with its next event."""
        deadline = time.monotonic() + seconds
        while True:
            assert self.post({"messages": [{"role": "user", "content": "tick"}], "max_tokens": 1}).status_code == 200
            info = self.info()
            engine = info["engine"]
            if info["calls"]["in_flight"] == 0 and engine["num_running"] == engine["pages_in_use"] == 0:
                return info
            assert time.monotonic() < deadline, f"still busy after {seconds} s: {info['calls']}, {engine}"
            time.sleep(0.05)


def poisoned_environment(model: Path) -> dict[str, str]:
    """The environment of a server whose engine fails in every step that holds POISON."""
    ids = Tokenizer(model).encode(POISON)[3:-3]
    faults = Path(__file__).parent / "faults"
    path = os.pathsep.join([str(faults), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "SIGHTLINE_TEST_POISON": ids_to_bytes(ids).hex()}


@pytest.fixture(scope="session")
def guarded_session() -> Iterator[Guarded]:
    model = tiny.qwen2_vl()
    with ServerProcess([str(model), *FLAGS], env=poisoned_environment(model)) as process:
        process.wait_ready()
        yield Guarded(process, process.base_url)
        assert process.running, f"the server died during the tests:\n{process.log()[-5000:]}"
        assert process.terminate() == 0


@pytest.fixture
def guarded(guarded_session: Guarded) -> Iterator[Guarded]:
    """After each test, every call has ended in one counted state, every page is free or cached, and a flush frees all (18)."""
    yield guarded_session
    info = guarded_session.wait_idle()
    calls = info["calls"]
    ended = {name: calls[name] for name in ("finished", "rejected", "refused", "timeout", "aborted", "failed")}
    assert calls["received"] == sum(ended.values()), calls
    engine = info["engine"]
    assert engine["pages_free"] + engine["pages_cached"] == engine["pages_total"]
    guarded_session.flush()
    engine = guarded_session.wait_idle()["engine"]
    # The request that asked has cached a page or two of its own.
    assert engine["pages_total"] - engine["pages_free"] == engine["pages_cached"] <= 3
