"""`--dp 2`: one port, two engines; a known picture goes where it is cached, and one death is not the other's."""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psutil
import requests

from tests import tiny
from tests.server.conftest import ask, image_part
from tests.servers import ServerProcess

NUM_REQUESTS = 500


def replicas(*flags: str) -> ServerProcess:
    return ServerProcess([str(tiny.qwen2_vl()), "--dp", "2", "--num-threads", "1", *flags])


def chat(server: ServerProcess, messages: list[dict], **fields: object) -> requests.Response:
    body = {"messages": messages, "max_tokens": 2, **fields}
    return requests.post(f"{server.base_url}/v1/chat/completions", json=body, timeout=30)


def engines(server: ServerProcess) -> list[psutil.Process]:
    children = psutil.Process(server.pid).children()
    return [c for c in children if "sightline.engine.process" in c.cmdline()]


def numbered(i: int, *parts: dict | str) -> list[dict]:
    """Differs from others in its first words: where these are shared and known decides too, and how busy that engine is then."""
    return [{"role": "system", "content": f"{i} is your number."}, *ask(*parts)]


def encoded(server: ServerProcess, at_once: int) -> int:
    """Ask about six pictures four times each, a few at once; the pictures that had to be encoded."""
    server.wait_ready()
    questions = [numbered(i, image_part(i, width=224, height=224), "what?") for i in range(6)]
    with ThreadPoolExecutor(at_once) as pool:
        for turn in range(4):
            # Every turn begins at another picture, so that taking turns sends each to both.
            order = questions[turn:] + questions[:turn]
            answers = pool.map(lambda question: chat(server, question), order)
            assert [answer.status_code for answer in answers] == [200] * 6
    states = requests.get(f"{server.base_url}/server_info", timeout=5).json()["internal_states"]
    assert len(states) == 2
    assert all(state["finished"] for state in states)
    return sum(state["images_encoded"] for state in states)


def test_round_robin_encodes_pictures_twice() -> None:
    with replicas("--load-balance-method", "round_robin") as server:
        assert encoded(server, at_once=1) == 12
        assert server.terminate() == 0


def test_shortest_queue_sends_nothing_to_an_engine_with_more_to_do() -> None:
    """A known prompt too: what is cached does not count."""
    with replicas("--load-balance-method", "shortest_queue") as server:
        server.wait_ready()
        end = start_streams(server, 1, max_tokens=800)
        for _ in range(6):
            assert chat(server, ask("the same"), max_tokens=1).status_code == 200
        assert sorted(per_engine(server, "sightline_prompt_tokens_total"))[0] > 0
        busy = [running for running in per_engine(server, "sightline_requests_running") if running]
        steps = per_engine(server, "sightline_prefix_cached_tokens_total")
        assert busy == [1.0], "the stream has ended too soon"
        assert sorted(cached > 0 for cached in steps) == [False, True], "five of six were known where the stream is not"
        end()


def per_engine(server: ServerProcess, name: str) -> list[float]:
    """A metric of each engine, by its label."""
    text = requests.get(f"{server.base_url}/metrics", timeout=5).text
    return [float(re.search(rf'^{name}{{engine="{i}"}} (\S+)$', text, re.M)[1]) for i in range(2)]  # type: ignore[index]


def test_one_engine_dies_and_the_other_serves_on() -> None:
    with replicas() as server:
        # Each picture where it is known already.
        assert encoded(server, at_once=4) == 6
        assert requests.get(f"{server.base_url}/readyz", timeout=5).json()["engines"] == {"alive": 2, "total": 2}
        victim, survivor = engines(server)
        done = itertools.count(1)
        kill = threading.Event()

        def one(i: int) -> tuple[int, str]:
            answer = chat(server, ask(f"number {i}"), max_tokens=4, ignore_eos=True)
            # soon, while the streams still run
            if next(done) == NUM_REQUESTS // 50:
                kill.set()
            return answer.status_code, str((answer.json().get("error") or {}).get("code"))

        # One on each engine.
        streams = start_streams(server, 2)
        with ThreadPoolExecutor(16) as pool:
            results = [pool.submit(one, i) for i in range(NUM_REQUESTS)]
            assert kill.wait(60)
            victim.kill()
            killed = time.monotonic()
            outcomes = Counter(r.result() for r in results)
        failed = outcomes.pop((503, "engine_lost"), 0)
        assert outcomes == {(200, "None"): NUM_REQUESTS - failed}
        # Only what the dead one held at that moment is lost.
        assert failed <= 16
        (lost, ended), (whole, _) = sorted(streams(), key=lambda end: end[1])
        assert '"code":"engine_lost"' in lost
        assert ended - killed < 2.5
        assert whole == "data: [DONE]"
        ready = requests.get(f"{server.base_url}/readyz", timeout=5)
        assert (ready.status_code, ready.json()["engines"]) == (200, {"alive": 1, "total": 2})
        # Each engine's counters stand under its label, the dead one's as they were.
        computed = per_engine(server, "sightline_generation_tokens_total")
        assert chat(server, ask("still there?")).status_code == 200
        after = per_engine(server, "sightline_generation_tokens_total")
        assert sorted(b - a for a, b in zip(computed, after, strict=True)) == [0.0, 2.0]
        alive = requests.get(f"{server.base_url}/metrics", timeout=5).text
        assert "sightline_engines_alive 1.0\n" in alive
        survivor.kill()
        assert server.wait_exit(10) == 7


def start_streams(server: ServerProcess, count: int, max_tokens: int = 3500) -> Callable[[], list[tuple[str, float]]]:
    """Start long streams; the function returned waits for the last line of each, and when it came."""
    begun = threading.Barrier(count + 1)

    def read(i: int) -> tuple[str, float]:
        body = {"messages": numbered(10 + i, "stream"), "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
        last = ""
        with requests.post(f"{server.base_url}/v1/chat/completions", json=body, stream=True, timeout=90) as answer:
            for line in answer.iter_lines(decode_unicode=True):
                if not last:
                    begun.wait(30)
                last = line or last
        return last, time.monotonic()

    pool = ThreadPoolExecutor(count)
    running = [pool.submit(read, i) for i in range(count)]
    begun.wait(30)
    return lambda: [r.result() for r in running]
