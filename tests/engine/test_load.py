"""Two hundred clients at once over HTTP (fifty with the bundled model, whose steps cost more), on a server with few pages: right
answers, no page left over, no memory lost.

LOAD_REQUESTS=2000 makes it ten times longer.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import psutil
import pytest

from sightline import demo
from tests import oracle, tiny
from tests.servers import ServerProcess

NUM_REQUESTS = int(os.environ.get("LOAD_REQUESTS", "200"))
MAX_TOKENS = 40
# A rounding error may turn an answer where two tokens are this close, which says nothing about the engine.
MARGIN = 1e-3
ARGS = [
    "--served-model-name", "tiny", "--max-total-tokens", "640", "--context-length", "320", "--device", "cpu",
    "--chunked-prefill-size", "96", "--vision-cache-gb", "0.0001", "--num-threads", "1", "--random-seed", "1",
]  # fmt: skip


class Answer(NamedTuple):
    """What one client read: the text, the tokens' log-probabilities, usage, and how the choice ended."""

    text: str
    logprobs: list[float]
    margins: list[float]
    usage: dict[str, Any]
    finish_reason: str


def body(number: int) -> dict[str, Any]:
    """A picture question; some share the picture, some the text, every fourth has two pictures."""
    rng = random.Random(number)
    content: list[dict[str, Any]] = [
        {
            "type": "image_url",
            "image_url": {"url": data_url(60 + 20 * (number % 7), 56 + 10 * (number % 5), number // 2)},
        }
        for _ in range(2 if number % 4 == 0 else 1)
    ]
    words = rng.choices("what red blue circle square left right two is the of picture".split(), k=rng.randint(1, 12))
    content.insert(rng.randint(0, len(content)), {"type": "text", "text": " ".join(words)})
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": MAX_TOKENS - number % 3,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 2,
    }


def data_url(width: int, height: int, seed: int) -> str:
    buffer = io.BytesIO()
    oracle.picture(width, height, seed).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


async def ask(session: aiohttp.ClientSession, url: str, number: int, cut_after: int | None = None) -> Answer | None:
    """Read the whole stream, or hang up after so many chunks."""
    text, entries, usage, reason, done, chunks = "", [], {}, "", False, 0
    async with session.post(f"{url}/v1/chat/completions", json=body(number)) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            assert not done, "something after [DONE]"
            if line.strip() == b"data: [DONE]":
                done = True
                continue
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
                entries += (choice.get("logprobs") or {}).get("content") or []
                reason = choice["finish_reason"] or reason
            chunks += 1
            if cut_after is not None and chunks >= cut_after:
                return None
    assert done, "the stream ended without [DONE]"
    tops = [[t["logprob"] for t in e["top_logprobs"]] for e in entries]
    return Answer(text, [e["logprob"] for e in entries], [a - b for a, b in tops], usage, reason)


async def ask_all(url: str, numbers: list[int], cuts: dict[int, int] | None = None) -> list[Answer | None]:
    """All at once, but for a bound on connections per host that lets the server's own queue fill."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        cuts = cuts or {}
        return await asyncio.gather(*(ask(session, url, n, cuts.get(i)) for i, n in enumerate(numbers)))


async def alone(url: str, num_prompts: int) -> dict[int, Answer]:
    """The lone answer of every prompt, one after the other; those that hang on a rounding error are left out."""
    answers = {}
    async with aiohttp.ClientSession() as session:
        for number in range(num_prompts):
            answer = await ask(session, url, number)
            assert answer is not None
            if min(answer.margins) > MARGIN:
                answers[number] = answer
    return answers


async def stats(url: str) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/server_info") as response:
        info: dict[str, Any] = await response.json()
        return info


def rss(server: ServerProcess) -> int:
    """Resident bytes of the server and its children."""
    root = psutil.Process(server.pid)
    return sum(p.memory_info().rss for p in (root, *root.children(recursive=True)))


async def settle(url: str) -> dict[str, Any]:
    """The engine's counters once it is idle and has said so."""
    for _ in range(100):
        info = await stats(url)
        engine: dict[str, Any] = info["engine"]
        if not engine["num_running"] and not engine["num_waiting"] and not info["requests_in_flight"]:
            return engine
        await asyncio.sleep(0.1)
    raise AssertionError(f"the engine is not idle: {engine}")


def check(got: Answer | None, lone: Answer) -> None:
    assert got is not None
    assert got.text == lone.text
    assert got.finish_reason == lone.finish_reason == "length"
    assert got.logprobs == pytest.approx(lone.logprobs, abs=2e-3)
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert got.usage[name] == lone.usage[name]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("model", "num_prompts", "num_requests"),
    [(tiny.qwen2_vl, 40, NUM_REQUESTS), (demo.model_path, 12, NUM_REQUESTS // 4)],
    ids=["random", "bundled"],
)
def test_many_clients_on_a_small_pool(model: Callable[[], Path], num_prompts: int, num_requests: int) -> None:
    with ServerProcess(["--model-path", str(model()), *ARGS]) as server:
        server.wait_ready()
        url = server.base_url
        lone = asyncio.run(alone(url, num_prompts))
        assert len(lone) > num_prompts // 2
        assert len({answer.text for answer in lone.values()}) > len(lone) // 2
        rng = random.Random(0)
        numbers = [rng.choice(sorted(lone)) for _ in range(num_requests)]

        for number, answer in zip(numbers, asyncio.run(ask_all(url, numbers)), strict=True):
            check(answer, lone[number])
        engine = asyncio.run(settle(url))
        assert engine["pages_in_use"] == 0
        assert engine["pages_free"] + engine["pages_cached"] == engine["pages_total"] == 40
        assert engine["retractions"] > 0, "the pool was not small enough"
        assert engine["cached_tokens"] > 0

        # Again, with a third of the clients hanging up somewhere; the others notice nothing. An allocator may keep more of one round
        # than of the one before; what leaks is lost in every round.
        for _ in range(4):
            before = rss(server)
            cuts = {i: rng.randint(1, MAX_TOKENS) for i in range(0, num_requests, 3)}
            answers = asyncio.run(ask_all(url, numbers, cuts))
            for i, (number, answer) in enumerate(zip(numbers, answers, strict=True)):
                if i not in cuts:
                    check(answer, lone[number])
            engine = asyncio.run(settle(url))
            assert engine["pages_in_use"] == 0
            assert engine["aborts"] > 0
            assert engine["num_running"] == engine["num_waiting"] == 0
            grown = (rss(server) - before) / 2**20
            if grown < 8:
                break
        assert grown < 8, f"the server grew in each of four equal rounds, by {grown:.0f} MiB in the last"
        assert server.terminate() == 0
        assert "Traceback" not in server.log(), server.log()[-5000:]
