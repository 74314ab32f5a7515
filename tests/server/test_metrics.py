"""`/metrics` beside what the clients saw."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

import sightline
from sightline.config import ServerConfig
from sightline.server.lifecycle import Lifecycle
from sightline.server.metrics import DEFINITIONS, render
from sightline.types import EngineStats
from tests import tiny
from tests.server.conftest import ask, data_url, image_part, picture
from tests.servers import ServerProcess

KEY = {"Authorization": "Bearer secret-key-of-a-tenant"}
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    flags = ["--served-model-name", "tiny", "--api-key", "secret-key-of-a-tenant", "--metrics-compat", "vllm"]
    with ServerProcess([str(tiny.qwen2_vl()), *flags, "--log-format", "json"]) as process:
        process.wait_ready()
        yield process


def chat(server: ServerProcess, *parts: dict | str, **fields: object) -> requests.Response:
    body = {"messages": ask(*parts), "temperature": 0, "ignore_eos": True, **fields}
    return requests.post(f"{server.base_url}/v1/chat/completions", json=body, headers=KEY, timeout=30)


def scrape(server: ServerProcess) -> Samples:
    answer = requests.get(f"{server.base_url}/metrics", headers=KEY, timeout=10)
    assert answer.status_code == 200, answer.text
    return parsed(answer.text)


def parsed(page: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def value(samples: Samples, name: str, /, **labels: str) -> float:
    return samples.get((name, tuple(sorted(labels.items()))), 0.0)


def test_every_declared_metric_is_there_and_no_other(server: ServerProcess) -> None:
    text = requests.get(f"{server.base_url}/metrics", headers=KEY, timeout=10).text
    kinds = dict(line.split()[2:4] for line in text.splitlines() if line.startswith("# TYPE "))
    assert {n: k for n, k in kinds.items() if n.startswith("sightline")} == {
        f"sightline_{d.name}": d.kind for d in DEFINITIONS
    }
    assert {"process_cpu_seconds_total", "process_resident_memory_bytes"} <= kinds.keys()


def test_counters_move_by_what_the_client_was_told(server: ServerProcess) -> None:
    before = scrape(server)
    answers = [chat(server, image_part(901), "what?", max_tokens=5).json() for _ in range(2)]
    after = scrape(server)

    def moved(name: str, **labels: str) -> float:
        return value(after, f"sightline_{name}", **labels) - value(before, f"sightline_{name}", **labels)

    usage = [answer["usage"] for answer in answers]
    details = [each["prompt_tokens_details"] for each in usage]
    assert details[1]["cached_tokens"] > 0
    assert moved("prompt_tokens_total", engine="0") == sum(u["prompt_tokens"] for u in usage)
    assert moved("image_tokens_total", engine="0") == sum(d["image_tokens"] for d in details)
    assert moved("prefix_queried_tokens_total", engine="0") == sum(u["prompt_tokens"] for u in usage)
    assert moved("prefix_cached_tokens_total", engine="0") == sum(d["cached_tokens"] for d in details)
    assert moved("generation_tokens_total", engine="0") == 10
    assert moved("pictures_encoded_total", engine="0") == 1
    assert moved("tenant_prompt_tokens_total", tenant="key-1") == sum(u["prompt_tokens"] for u in usage)
    assert moved("tenant_cached_tokens_total", tenant="key-1") == sum(d["cached_tokens"] for d in details)
    assert moved("calls_total", outcome="finished") == 2
    assert moved("choices_total", finish_reason="length") == 2
    assert moved("pictures_total", source="data", result="ok") == 2
    for name in ("time_to_first_token_seconds", "request_seconds"):
        assert moved(f"{name}_count") == 2
        assert moved(f"{name}_sum") > 0
        assert moved(f"{name}_bucket", le="+Inf") == 2
    # four gaps in each answer, but tokens that the event loop finds together arrive together
    assert 2 <= moved("inter_token_seconds_count") <= 8
    assert moved("queue_seconds_count", engine="0") == moved("prefill_seconds_count", engine="0") == 2
    assert moved("picture_decode_seconds_count") == moved("picture_encode_seconds_count", engine="0") == 1
    assert moved("step_seconds_count", engine="0") >= 8


def test_a_client_that_goes_is_counted_by_what_its_answer_was_at(server: ServerProcess) -> None:
    before = scrape(server)
    body = {"messages": ask("hello"), "stream": True, "ignore_eos": True, "max_tokens": 4000}
    url = f"{server.base_url}/v1/chat/completions"
    with requests.post(url, json=body, headers=KEY, stream=True, timeout=30) as answer:
        next(line for line in answer.iter_lines() if b'"content":"' in line)

    def aborts(samples: Samples) -> dict[str, float]:
        states = ("waiting", "prefill", "decode")
        return {each: value(samples, "sightline_aborts_total", engine="0", state=each) for each in states}

    expected = {**aborts(before), "decode": aborts(before)["decode"] + 1}
    # The engine hears of it, and says so, a moment after the call has ended.
    deadline = time.monotonic() + 10
    while aborts(after := scrape(server)) == aborts(before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert aborts(after) == expected
    aborted = {"outcome": "aborted"}
    assert value(after, "sightline_calls_total", **aborted) == value(before, "sightline_calls_total", **aborted) + 1


def test_gauges_of_an_idle_server(server: ServerProcess) -> None:
    """What must be nothing is nothing, and what is always measured is measured."""
    chat(server, "hello", max_tokens=3)
    samples = scrape(server)
    for name in ("requests_running", "requests_waiting", "kv_pages_lost", "kv_pages_locked", "engine_silence_seconds"):
        assert samples["sightline_" + name, (("engine", "0"),)] == 0, name
    for name in ("calls_in_flight", "held_bytes", "held_tokens", "picture_decoding_bytes"):
        assert samples["sightline_" + name, ()] == 0, name
    pages = [value(samples, f"sightline_kv_pages{part}", engine="0") for part in ("", "_free", "_cached")]
    assert pages[0] == pages[1] + pages[2] > 0
    uptime = value(samples, "sightline_uptime_seconds")
    assert 1 <= value(samples, "sightline_event_loop_lag_seconds_count") <= 4 * uptime
    assert value(samples, "sightline_state", state="ready") == 1
    assert samples["sightline_limit", (("name", "requests"), ("unit", "requests"))] == 512
    info = requests.get(f"{server.base_url}/server_info", headers=KEY, timeout=10).json()
    bounds = {name: bound for name, bound in info["limits"].items() if type(bound) in (int, float)}
    assert {dict(labels)["name"]: v for (n, labels), v in samples.items() if n == "sightline_limit"} == bounds
    assert value(samples, "sightline_engines_alive") == value(samples, "sightline_engines") == 1
    assert samples["sightline_build_info", (("model", "tiny"), ("version", sightline.__version__))] == 1


class TwoEngines(Lifecycle):
    """As with --dp-size 2, with counters that say whose they are."""

    replica_stats = [  # type: ignore[assignment]
        EngineStats(
            num_running=10 * i + 1, num_waiting=10 * i + 2, pages_total=100, pages_in_use=20 * i, prompt_tokens=10 * i + 3,
            queried_tokens=8, cached_tokens=i + 1, generated_tokens=10 * i + 4, aborts=i + 5, aborts_waiting=2, aborts_prefill=1,
        )
        for i in range(2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("peer", "label", "expected"),
    [
        ("vllm", "engine", {"num_requests_running": (1, 11), "num_requests_waiting": (2, 12), "kv_cache_usage_perc": (0, 0.2), "prefix_cache_hits_total": (1, 2)}),
        ("sglang", "dp_rank", {"num_running_reqs": (1, 11), "num_queue_reqs": (2, 12), "token_usage": (0, 0.2), "cache_hit_rate": (0.125, 0.25), "prompt_tokens_total": (3, 13)}),
    ],
)  # fmt: skip
def test_each_engine_has_its_own_values_under_every_name(peer: str, label: str, expected: dict) -> None:
    lifecycle = TwoEngines(ServerConfig(model="tiny", metrics_compat=peer))  # type: ignore[arg-type]
    samples = parsed(render(lifecycle).decode())
    for name, numbers in expected.items():
        found = [value(samples, f"{peer}:{name}", model_name="tiny", **{label: str(i)}) for i in range(2)]
        assert found == list(numbers), name
    assert [value(samples, "sightline_requests_running", engine=str(i)) for i in range(2)] == [1, 11]
    by_state = {
        s: value(samples, "sightline_aborts_total", engine="1", state=s) for s in ("waiting", "prefill", "decode")
    }
    assert by_state == {"waiting": 2, "prefill": 1, "decode": 3}
    assert (f"{peer}:e2e_request_latency_seconds_count", (("model_name", "tiny"),)) in samples


def test_aliases_have_the_peer_s_names_and_our_values(server: ServerProcess) -> None:
    samples = scrape(server)
    labels = {"model_name": "tiny", "engine": "0"}
    for theirs, ours in {
        "num_requests_running": "requests_running",
        "num_requests_waiting": "requests_waiting",
        "kv_cache_usage_perc": "kv_usage_ratio",
        "prompt_tokens_total": "prompt_tokens_total",
        "prefix_cache_queries_total": "prefix_queried_tokens_total",
    }.items():
        assert (f"vllm:{theirs}", tuple(sorted(labels.items()))) in samples
        assert value(samples, f"vllm:{theirs}", **labels) == value(samples, f"sightline_{ours}", engine="0")
    assert value(samples, "vllm:e2e_request_latency_seconds_count", model_name="tiny") == value(
        samples, "sightline_request_seconds_count"
    )


def test_what_the_page_on_scaling_tells_gateways_to_read_is_there(server: ServerProcess) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "scaling.md").read_text()
    promised = set(re.findall(r"`((?:vllm|sglang):\w+)`", page))
    assert len(promised) == 7
    sglang = parsed(render(TwoEngines(ServerConfig(model="tiny", metrics_compat="sglang"))).decode())
    assert promised <= {name for name, _ in (*scrape(server), *sglang)}


def test_errors_are_counted_by_code_and_labels_never_come_from_clients(server: ServerProcess) -> None:
    before = scrape(server)
    assert chat(server, "hello", model="canary-of-a-client").status_code == 404
    assert chat(server, {"type": "image_url", "image_url": {"url": "canary-scheme:x"}}).status_code == 400
    assert requests.post(f"{server.base_url}/v1/chat/completions", json={}, timeout=10).status_code == 401
    after = scrape(server)
    for name in ("model_not_found", "invalid_api_key"):
        labels = {"reason": name}
        assert value(after, "sightline_calls_errors_total", **labels) == 1 + value(
            before, "sightline_calls_errors_total", **labels
        )
    assert any(n == "sightline_pictures_total" and ("source", "other") in labels for n, labels in after)
    assert "canary" not in repr(after)


def test_the_page_needs_a_key(server: ServerProcess) -> None:
    assert requests.get(f"{server.base_url}/metrics", timeout=10).status_code == 401


def test_the_log_has_one_line_for_each_request_and_no_secret(server: ServerProcess) -> None:
    mark = server.log_size()
    secret = data_url(picture(902))
    url = "http://user:password-canary@127.0.0.1:9/picture.png?token=query-canary"
    ok = chat(server, {"type": "image_url", "image_url": {"url": secret}}, "prompt-canary", max_tokens=3)
    bad = chat(server, {"type": "image_url", "image_url": {"url": url}}, "prompt-canary")
    gone = requests.get(f"{server.base_url}/nowhere%0Aforged?key=query-canary", headers=KEY, timeout=10)
    assert [ok.status_code, gone.status_code] == [200, 404]
    assert bad.status_code >= 400
    # The line is written after the answer's last byte.
    deadline = time.monotonic() + 10
    while server.log(mark).count('"sightline.access"') < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    text = server.log(mark)
    for word in ("canary", "secret-key-of-a-tenant", secret[30:60]):
        assert word not in text
    lines = [json.loads(line) for line in text.splitlines()]
    first, second, third = [line for line in lines if line.get("logger") == "sightline.access"]
    usage = ok.json()["usage"]
    assert first["request_id"] == ok.headers["x-request-id"]
    assert first["id"] == ok.json()["id"]
    assert (first["method"], first["path"], first["status"]) == ("POST", "/v1/chat/completions", 200)
    assert (first["images"], first["in"], first["out"]) == (1, usage["prompt_tokens"], 3)
    assert first["finish"] == "length"
    assert 0 <= first["ttft_ms"] <= first["total_ms"]
    assert (second["status"], second["finish"]) == (bad.status_code, "error")
    assert (third["status"], third["path"]) == (404, "/nowhere%0Aforged")
