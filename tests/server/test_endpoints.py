"""What holds for every endpoint that generates: keys, admission, the deadline, and a client that goes away."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from sightline.errors import OverloadedError
from sightline.server.errors import error_response
from tests import tiny
from tests.server.conftest import ask
from tests.servers import ServerProcess

LONG = {"ignore_eos": True, "stream": True}
GENERATING: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": ask("hello"), "max_tokens": 4000, **LONG},
    "/v1/completions": {"prompt": "hello", "max_tokens": 4000, **LONG},
    "/v1/responses": {"input": "hello", "max_output_tokens": 4000, **LONG},
    "/generate": {"text": "hello", "sampling_params": {"max_new_tokens": 4000, "ignore_eos": True}, "stream": True},
}
COUNTING: dict[str, dict[str, Any]] = {
    "/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": [1]},
    "/v1/responses/input_tokens": {"input": "hello"},
}
KEY = {"Authorization": "Bearer k"}
many = pytest.mark.parametrize(("path", "body"), GENERATING.items(), ids=GENERATING)


@pytest.fixture(scope="module")
def small_server() -> Iterator[str]:
    """One request at a time, a second and a half each."""
    flags = ["--max-queued-requests", "1", "--request-timeout", "1.5", "--api-key", "k", "--allow-private-media"]
    with ServerProcess([str(tiny.qwen2_vl()), *flags]) as process:
        process.wait_ready()
        yield process.base_url
        assert process.terminate() == 0


@pytest.fixture
def url(small_server: str) -> str:
    """The server, once the test before has left it."""
    wait_until_idle(small_server)
    return small_server


def in_flight(url: str) -> int:
    return requests.get(f"{url}/server_info", headers=KEY, timeout=5).json()["requests_in_flight"]


@pytest.mark.parametrize("path", [*GENERATING, *COUNTING, "/flush_cache", "/abort_request"])
def test_a_key_is_needed(path: str, url: str) -> None:
    response = requests.post(url + path, json={}, timeout=5)
    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")


@many
def test_one_too_many_is_told_when_to_come_back(path: str, body: dict, url: str) -> None:
    with requests.post(url + path, json=body, headers=KEY, stream=True, timeout=30) as running:
        pieces = running.iter_content(64)  # dropping it would close the connection
        assert next(pieces)
        for other, small in {path: {**body, "stream": False}, **COUNTING}.items():
            refused = requests.post(url + other, json=small, headers=KEY, timeout=5)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
            assert int(refused.headers["retry-after"]) >= 1
            assert "x-should-retry" not in refused.headers
    wait_until_idle(url)


@many
def test_a_client_that_goes_ends_its_request(path: str, body: dict, url: str) -> None:
    with requests.post(url + path, json=body, headers=KEY, stream=True, timeout=30) as response:
        pieces = response.iter_content(64)
        assert next(pieces)
        assert in_flight(url) == 1
    wait_until_idle(url)
    with pytest.raises(requests.Timeout):
        requests.post(url + path, json={**body, "stream": False}, headers=KEY, timeout=0.4)
    wait_until_idle(url)


def wait_until_idle(url: str) -> None:
    began = time.monotonic()
    while in_flight(url):
        assert time.monotonic() - began < 1.0, "the request still runs a second after its client has gone"
        time.sleep(0.02)


@many
def test_the_deadline_ends_it(path: str, body: dict, url: str) -> None:
    sooner = {**KEY, "x-request-timeout": "0.4"}
    whole = requests.post(url + path, json={**body, "stream": False}, headers=sooner, timeout=30)
    assert (whole.status_code, whole.json()["error"]["code"]) == (504, "request_timeout")
    assert whole.headers["retry-after"]
    wait_until_idle(url)
    streamed = requests.post(url + path, json=body, headers=KEY, timeout=30)
    last = json.loads(streamed.text.rstrip().rpartition("data: ")[2])
    error = last["response"]["error"] if path == "/v1/responses" else last["error"]
    assert error["code"] == ("server_error" if path == "/v1/responses" else "request_timeout")


def test_the_deadline_counts_the_pictures_too(url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        picture = f"http://127.0.0.1:{silent.getsockname()[1]}/never.png"
        body = {"messages": ask({"type": "image_url", "image_url": {"url": picture}})}
        began = time.monotonic()
        response = requests.post(f"{url}/v1/chat/completions", json=body, headers=KEY, timeout=30)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "request_timeout")
    # Fetching alone would have taken five seconds.
    assert time.monotonic() - began < 3.5


def test_more_prompts_than_the_server_takes_at_once(url: str) -> None:
    body = {"prompt": ["a", "b"], "max_tokens": 1}
    response = requests.post(f"{url}/v1/completions", json=body, headers=KEY, timeout=5)
    assert response.status_code == 400
    assert "at most 1" in response.json()["error"]["message"]


def test_a_rate_limit_is_429_with_a_time() -> None:
    response = error_response(OverloadedError("Slow down.", code="rate_limit", status=429, retry_after=7))
    assert response.status_code == 429
    assert response.headers["retry-after"] == "7"
    assert json.loads(response.body)["error"]["type"] == "rate_limit_exceeded"


def test_many_batches_at_once(tiny_server: str) -> None:
    """Prompts of one call are merged as they come; each gets its own answer."""
    prompts = ["hello", "a", "b b", "hello there"]
    alone = [
        requests.post(f"{tiny_server}/v1/completions", json={"prompt": p, "temperature": 0}, timeout=30).json()
        for p in prompts
    ]
    expected = [answer["choices"][0]["text"] for answer in alone]
    answers: list[list[str]] = []

    def batch() -> None:
        body = {"prompt": prompts, "temperature": 0}
        answer = requests.post(f"{tiny_server}/v1/completions", json=body, timeout=60).json()
        answers.append([choice["text"] for choice in answer["choices"]])

    threads = [threading.Thread(target=batch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [expected] * 8
