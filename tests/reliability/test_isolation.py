"""One request among strangers: cut off, poisoned, set back or too long, it harms nobody."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from tests import tiny
from tests.reliability.conftest import POISON, Guarded
from tests.reliability.hostile import HostileHost, silence
from tests.scorecard import SEED, scaled
from tests.server.conftest import ask, image_part

Count = Callable[..., None]
KEY = {"Authorization": "Bearer alpha"}


def many(server: Guarded, bodies: list[dict[str, Any]], threads: int = 16) -> list[Any]:
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return list(pool.map(server.post, bodies))


def body(number: int, **more: Any) -> dict[str, Any]:
    pictures = [image_part(number % 5)] if number % 2 else []
    return {"messages": ask(*pictures, f"question {number}"), "max_tokens": 24, "ignore_eos": True, **more}


def content(response: Any) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


@pytest.mark.check(1)
def test_clients_cut_off_anywhere(guarded: Guarded, count: Count) -> None:
    """Half stream, half have pictures, some from a host that never answers; the survivors answer as if alone."""
    total, rng = scaled(2000), random.Random(SEED)
    alone = [content(guarded.post(body(n))) for n in range(8)]

    async def cut(session: aiohttp.ClientSession, host: HostileHost, n: int) -> None:
        request = body(n, max_tokens=200, stream=n % 4 < 2)
        if n % 5 == 0:
            request["messages"] = ask({"type": "image_url", "image_url": {"url": host.url("silence")}})

        async def go() -> None:
            async with session.post(f"{guarded.url}/v1/chat/completions", json=request, headers=KEY) as response:
                async for _ in response.content:
                    continue

        try:
            await asyncio.wait_for(go(), rng.random() * 0.25)
        except TimeoutError:
            return

    async def run(host: HostileHost) -> list[str]:
        places = asyncio.Semaphore(24)
        survivors = []
        async with aiohttp.ClientSession() as session:

            async def limited(n: int) -> None:
                async with places:
                    await cut(session, host, n)

            cuts = asyncio.gather(*map(limited, range(total)))
            for n in range(8):
                request = body(n)
                async with session.post(
                    f"{guarded.url}/v1/chat/completions", headers=KEY, json={"temperature": 0, **request}
                ) as response:
                    survivors.append((await response.json())["choices"][0]["message"]["content"])
            await cuts
        return survivors

    with HostileHost({"silence": silence}) as host:
        assert asyncio.run(run(host)) == alone
        began = time.monotonic()
        guarded.wait_idle(5)
        count(total, f"idle {time.monotonic() - began:.1f} s after the last")
        assert host.open == 0, "an outbound connection outlived its client"


@pytest.mark.check(2)
@pytest.mark.parametrize("state", ["queued", "decoding", "not streaming", "uploading"])
def test_a_closed_socket_reaches_the_scheduler(guarded: Guarded, state: str, count: Count) -> None:
    import http.client
    from urllib.parse import urlsplit

    total, slowest, aborted = -(-scaled(500, 10) // 4), 0.0, 0
    for _ in range(total):
        before = guarded.info()["calls"]
        connections = []
        for i in range(20 if state == "queued" else 1):
            connection = http.client.HTTPConnection(urlsplit(guarded.url).netloc)
            data = json.dumps(body(i, max_tokens=400, stream=state != "not streaming")).encode()
            if state == "uploading":
                connection.putrequest("POST", "/v1/chat/completions")
                connection.putheader("Authorization", "Bearer alpha")
                connection.putheader("Content-Length", str(len(data)))
                connection.endheaders(data[: len(data) // 2])
            else:
                connection.request("POST", "/v1/chat/completions", data, KEY)
            connections.append(connection)
        deadline = time.monotonic() + 5
        while guarded.info()["calls"]["in_flight"] < len(connections) and time.monotonic() < deadline:
            time.sleep(0.01)
        began = time.monotonic()
        for connection in connections:
            assert connection.sock is not None
            connection.sock.close()
            connection.close()
        while (after := guarded.info()["calls"])["in_flight"]:
            assert time.monotonic() - began < 1.0, "more than a second"
            time.sleep(0.005)
        slowest = max(slowest, time.monotonic() - began)
        # Some may have ended before they were closed, on a machine that was busy elsewhere.
        aborted += after["aborted"] > before["aborted"]
        assert after["aborted"] + after["finished"] == before["aborted"] + before["finished"] + len(connections)
    assert aborted > total / 2
    count(total, f"slowest {slowest * 1e3:.0f} ms; limit 1 s")


@pytest.mark.check(2)
@pytest.mark.parametrize("stream", [False, True], ids=["not streaming", "streaming"])
def test_a_client_that_sent_ahead_and_goes(guarded: Guarded, stream: bool, count: Count) -> None:
    """What it sent ahead is not run, and that it went is noticed although the server had not read all of that."""
    total, slowest = scaled(100, 4), 0.0
    data = json.dumps(body(0, max_tokens=400, stream=stream)).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nx-api-key: alpha\r\nContent-Length: %d\r\n\r\n" % len(
        data
    )
    host, port = guarded.url.removeprefix("http://").split(":")
    for n in range(total):
        before = guarded.info()["calls"]
        with socket.create_connection((host, int(port)), 5) as connection:
            connection.sendall((request + data) * 3)
            while guarded.info()["calls"]["received"] == before["received"]:
                time.sleep(0.001)
            if n % 2:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        began = time.monotonic()
        while (after := guarded.info()["calls"])["in_flight"]:
            assert time.monotonic() - began < 1.0
            time.sleep(0.005)
        slowest = max(slowest, time.monotonic() - began)
        # It may have ended before the connection was closed.
        assert after["aborted"] + after["finished"] == before["aborted"] + before["finished"] + 1
        assert (after["received"], after["failed"]) == (before["received"] + 1, before["failed"])
    count(total, f"slowest {slowest * 1e3:.0f} ms; limit 1 s")


@pytest.mark.check(3)
def test_a_client_that_goes_closes_the_outbound_socket(guarded: Guarded, count: Count) -> None:
    total, slowest = scaled(200, 10), 0.0

    async def once(host: HostileHost, n: int) -> float:
        request = {"messages": ask({"type": "image_url", "image_url": {"url": host.url("silence")}})}
        async with aiohttp.ClientSession() as session:
            task = asyncio.ensure_future(session.post(f"{guarded.url}/v1/chat/completions", json=request, headers=KEY))
            while host.open == 0:
                assert not task.done(), "it did not fetch"
                await asyncio.sleep(0.005)
            task.cancel()
        began = time.monotonic()
        while host.open:
            assert time.monotonic() - began < 1.0
            await asyncio.sleep(0.005)
        return time.monotonic() - began

    with HostileHost({"silence": silence}) as host:
        for n in range(total):
            slowest = max(slowest, asyncio.run(once(host, n)))
    count(total, f"slowest {slowest * 1e3:.0f} ms; limit 1 s")


@pytest.mark.check(14)
def test_four_times_the_memory_changes_no_answer(guarded: Guarded, count: Count) -> None:
    total = scaled(400, 24)
    bodies = [body(n, max_tokens=200) for n in range(24)]
    alone = [content(guarded.post(b)) for b in bodies]
    before = guarded.info()["engine"]["retractions"]
    for _ in range(max(1, total // 24)):
        assert list(map(content, many(guarded, bodies, threads=24))) == alone
    retractions = guarded.info()["engine"]["retractions"] - before
    assert retractions > 0, "nothing was ever set back"
    count(total, f"{retractions} retractions")


@pytest.mark.check(15)
def test_prompts_longer_than_everything(guarded: Guarded, count: Count) -> None:
    total, slowest = scaled(100, 10), 0.0
    alone = content(guarded.post(body(1)))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        other = pool.submit(guarded.post, body(1))
        for n in range(total):
            began = time.monotonic()
            response = guarded.post({"messages": ask("word " * (400 + 2000 * n))})
            slowest = max(slowest, time.monotonic() - began)
            assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert content(other.result()) == alone
    assert slowest < 1.0
    count(total, f"slowest {slowest:.2f} s; limit 1 s")


@pytest.mark.check(16)
def test_poison_harms_only_itself(guarded: Guarded, count: Count) -> None:
    """One request in a hundred breaks every step that it is part of; it fails, and the others answer as if alone."""
    total = scaled(5000)
    engine_before = guarded.info()["engine"]
    distinct = [body(n) for n in range(20)]
    alone = [content(guarded.post(b)) for b in distinct]
    bodies = [distinct[n % 20] for n in range(total)]
    poisoned = set(range(7, total, 100))
    for n in poisoned:
        bodies[n] = {"messages": ask(f"{POISON} number {n}", *([image_part(1)] if n % 200 > 100 else []))}
    answers = many(guarded, bodies)
    for n, answer in enumerate(answers):
        if n in poisoned:
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
            assert "breaks" not in answer.text
        else:
            assert content(answer) == alone[n % 20], f"request {n} answers otherwise beside poison"
    assert guarded.info()["engine"]["steps"] > engine_before["steps"], "the engine was restarted"
    count(total, f"{len(poisoned)} poisoned, {total - len(poisoned)} equal to the same alone")


@pytest.mark.check(17)
def test_special_tokens_as_text(guarded: Guarded, count: Count) -> None:
    cases = 0
    for token in tiny.SPECIAL_TOKENS:
        for pictures in range(3):
            images = [image_part(i) for i in range(pictures)]
            messages = ask(*images, f"what is {token}? <{token}> {token}{token}")
            response = guarded.post({"messages": messages, "max_tokens": 1})
            assert response.status_code == 200, response.text
            assert response.json()["usage"]["prompt_tokens_details"]["image_tokens"] == 12 * pictures
            cases += 1
    count(cases)


@pytest.mark.check(18)
def test_idle_page_equation(guarded: Guarded, count: Count) -> None:
    """The fixture asks it after each test of this server; here with aborts in the middle of everything."""
    threads = [threading.Thread(target=many, args=(guarded, [body(n) for n in range(16)])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine = guarded.wait_idle()["engine"]
    assert engine["pages_free"] + engine["pages_cached"] == engine["pages_total"]
    count(1, "and after every other test of this server")
