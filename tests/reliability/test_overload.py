"""More than the server can do: refused at once, bounded in memory and time, and over when it is over."""

from __future__ import annotations

import concurrent.futures
import json
import re
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
import requests

from tests import tiny
from tests.reliability.hostile import HostileHost, silence
from tests.scorecard import scaled
from tests.server.conftest import ask, data_url, image_part, picture
from tests.servers import ServerProcess

Count = Callable[..., None]
FLAGS = """--served-model-name tiny --allow-private-media --max-queued-requests 4 --max-running-requests 2 --queue-timeout 1
--client-timeout 2 --request-timeout 20 --stream-keep-alive 0.2 --max-queued-mb 30 --context-length 4096 --max-total-tokens 9000""".split()


@pytest.fixture(scope="module")
def busy_process() -> Iterator[ServerProcess]:
    with ServerProcess([str(tiny.qwen2_vl()), *FLAGS]) as process:
        process.wait_ready()
        yield process
        assert process.running
        assert process.terminate() == 0


@pytest.fixture
def url(busy_process: ServerProcess) -> str:
    deadline = time.monotonic() + 10
    while info(busy_process.base_url)["calls"]["in_flight"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return busy_process.base_url


def info(url: str) -> dict:
    return requests.get(f"{url}/server_info", timeout=10).json()


def post(url: str, timeout: float = 30, **body: object) -> requests.Response:
    return requests.post(f"{url}/v1/chat/completions", json={"temperature": 0, **body}, timeout=timeout)


class Occupied:
    """All places taken by streams that go on until the block ends."""

    def __init__(self, url: str, number: int = 4) -> None:
        body = {"messages": ask("go on"), "max_tokens": 3000, "ignore_eos": True, "stream": True}
        self._open = lambda: requests.post(f"{url}/v1/chat/completions", json=body, stream=True, timeout=30)
        self._url, self._number = url, number

    def __enter__(self) -> None:
        with concurrent.futures.ThreadPoolExecutor(self._number) as pool:
            self._streams = [f.result() for f in [pool.submit(self._open) for _ in range(self._number)]]

    def __exit__(self, *error: object) -> None:
        for stream in self._streams:
            stream.close()


@pytest.mark.check(10)
def test_ten_times_too_much(url: str, busy_process: ServerProcess, count: Count) -> None:
    def one(_: int) -> tuple[int, float, dict]:
        began = time.monotonic()
        response = post(url, messages=ask("hi"), max_tokens=8, ignore_eos=True)
        return response.status_code, time.monotonic() - began, dict(response.headers)

    alone = statistics.median(one(0)[1] for _ in range(5))
    memory = psutil.Process(busy_process.pid).memory_info().rss
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(one, range(scaled(6000))))
    refused = [a for a in answers if a[0] == 503]
    served = [a for a in answers if a[0] == 200]
    assert len(refused) + len(served) == len(answers)
    assert refused
    assert served
    assert all(int(headers["retry-after"]) >= 1 for _, _, headers in refused)
    growth = (psutil.Process(busy_process.pid).memory_info().rss - memory) / 1e6
    assert growth < 100
    time.sleep(0.5)
    assert one(0)[1] < max(1.0, 10 * alone), "it did not recover"
    slow = statistics.quantiles([s for _, s, _ in refused], n=20)[18]
    count(
        len(answers),
        f"{len(refused)} refused; memory +{growth:.0f} MB; refusals' p95 {slow * 1e3:.0f} ms with 40 threads of this test",
    )


@pytest.mark.check(11)
def test_what_is_refused_costs_no_fetch_and_no_decode(url: str, count: Count) -> None:
    total = scaled(500)
    with HostileHost({"silence": silence}) as host:
        before, times = info(url)["media"], []
        # Two of the four wait for their turn, a second at most: the places are taken anew after every few.
        for first in range(0, total, 25):
            with Occupied(url):
                for n in range(first, min(first + 25, total)):
                    part = {"type": "image_url", "image_url": {"url": host.url("silence")}} if n % 2 else image_part(n)
                    began = time.monotonic()
                    response = post(url, messages=ask(part))
                    times.append(time.monotonic() - began)
                    assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
                    assert response.headers["retry-after"]
            while info(url)["calls"]["in_flight"]:
                time.sleep(0.01)
        assert info(url)["media"] == before
        assert host.asked == []
    median = statistics.median(times)
    assert median < 0.1
    count(total, f"median {median * 1e3:.1f} ms, slowest {max(times) * 1e3:.0f} ms; limit 100 ms")


@pytest.mark.check(11)
def test_one_too_many_is_refused_before_its_body_is_read(url: str, count: Count) -> None:
    """Twenty megabytes are announced and none is sent: the answer does not wait for them."""
    host, port = url.removeprefix("http://").split(":")
    with Occupied(url), socket.create_connection((host, int(port)), timeout=1) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 20000000\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 503"
    count(1)


@pytest.mark.check(12)
def test_the_queues_deadline(url: str, count: Count) -> None:
    """Two run, the third and fourth wait for their turn a second at most."""
    total, slowest = scaled(200, 4) // 4, 0.0
    for _ in range(max(1, total // 2)):
        with Occupied(url, 2):
            began = time.monotonic()
            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                late = list(pool.map(lambda _: post(url, messages=ask("my turn?"), max_tokens=5), range(2)))
            for response in late:
                assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_timeout")
                assert response.headers["retry-after"]
            slowest = max(slowest, time.monotonic() - began)
        assert slowest < 1.0 + 0.5 + 0.25
    count(max(1, total // 2) * 2, f"slowest {slowest:.2f} s; limit 1 s")


@pytest.mark.check(12)
def test_the_runs_deadline(url: str, count: Count) -> None:
    began = time.monotonic()
    response = requests.post(
        f"{url}/v1/chat/completions",
        json={"messages": ask("go on"), "max_tokens": 4000, "ignore_eos": True},
        headers={"x-request-timeout": "0.5"},
        timeout=10,
    )
    took = time.monotonic() - began
    assert (response.status_code, response.json()["error"]["code"]) == (504, "request_timeout")
    assert took < 1.0
    count(1, f"{took:.2f} s; limit 0.5 s")


def write_stalls(url: str) -> tuple[float, float]:
    """How often answers waited for slow readers, and for how many seconds."""
    page = requests.get(f"{url}/metrics", timeout=5).text
    found = dict(re.findall(r"^sightline_write_stall_seconds_(count|sum) (\S+)$", page, re.MULTILINE))
    return float(found["count"]), float(found["sum"])


@pytest.mark.check(13)
def test_readers_that_stop_are_cut_off(url: str, busy_process: ServerProcess, count: Count) -> None:
    """A reader that takes nothing: its stream ends at the client's deadline once the buffers are full."""
    aborted, (stalls, stalled) = info(url)["calls"]["aborted"], write_stalls(url)
    body = json.dumps(
        {
            "messages": ask("x"),
            "max_tokens": 4000,
            "ignore_eos": True,
            "stream": True,
            "n": 2,
            "logprobs": True,
            "top_logprobs": 20,
        }
    ).encode()
    host, port = url.removeprefix("http://").split(":")
    memory = psutil.Process(busy_process.pid).memory_info().rss
    readers = []
    for _ in range(1):
        reader = socket.socket()
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect((host, int(port)))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        reader.sendall(head.encode() + body)
        readers.append(reader)
    began = time.monotonic()
    time.sleep(0.3)
    answer = post(url, messages=ask("a normal one"), max_tokens=4)
    assert answer.status_code in (200, 503)
    while info(url)["calls"]["in_flight"]:
        assert time.monotonic() - began < 15, "a reader that stopped still holds its place"
        time.sleep(0.05)
    took = time.monotonic() - began
    growth = (psutil.Process(busy_process.pid).memory_info().rss - memory) / 1e6
    for reader in readers:
        reader.close()
    assert growth < 30
    assert info(url)["calls"]["aborted"] == aborted + 1
    assert write_stalls(url)[0] > stalls
    assert write_stalls(url)[1] > stalled + 1.9
    count(1, f"cut off {took:.1f} s after the request: the buffers fill, then 2 s; memory +{growth:.0f} MB")


@pytest.mark.check(13)
def test_silent_streams_get_a_comment(url: str) -> None:
    with Occupied(url, 2), concurrent.futures.ThreadPoolExecutor(1) as pool:
        stream = {"messages": ask("wait"), "max_tokens": 3, "stream": True}
        waiting = pool.submit(requests.post, f"{url}/v1/chat/completions", json=stream, timeout=10)
        text = waiting.result().text
    assert text.startswith(": keep-alive\n\n")
    assert '"code":"queue_timeout"' in text


def test_bodies_in_flight_are_bounded(url: str) -> None:
    """Three bodies of 12 MB that never end do not fit into 30 MB: the third is refused, and nothing is left of them."""
    host, port = url.removeprefix("http://").split(":")
    sockets, statuses = [], []
    for _ in range(3):
        connection = socket.create_connection((host, int(port)))
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 13000000\r\n\r\n")
        sender = threading.Thread(target=connection.sendall, args=(b"x" * 12_000_000,))
        sender.start()
        sender.join(3)
        sockets.append(connection)
    for connection in sockets:
        connection.settimeout(5)
        statuses.append(int(connection.recv(100).split()[1]))
        connection.close()
    assert sorted(statuses) == [408, 408, 503]
    deadline = time.monotonic() + 5
    while info(url)["calls"]["in_flight"]:
        assert time.monotonic() < deadline
    assert post(url, messages=ask({"type": "image_url", "image_url": {"url": data_url(picture(1))}}), max_tokens=1).ok
