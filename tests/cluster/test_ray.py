"""The Ray Serve application on a local cluster: streams, a replica's death under load, scaling, back-pressure, routing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import requests
import yaml

from sightline.bench.serving import repeats
from tests.cluster.conftest import Deploy, engines, fixed, replicas, workers
from tests.server.conftest import ask, image_part
from tests.servers import ServerProcess

pytestmark = pytest.mark.timeout(240)


def chat(url: str, messages: list[dict], **fields: Any) -> requests.Response:
    body = {"messages": messages, "max_tokens": 4, **fields}
    return requests.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def test_streams_errors_and_a_client_that_goes(deploy: Deploy) -> None:
    url = deploy(autoscaling_config=fixed(1))
    body = {"messages": ask("tell me"), "max_tokens": 40, "ignore_eos": True, "stream": True}
    times = []
    with requests.post(f"{url}/v1/chat/completions", json=body, stream=True, timeout=30) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert "," not in answer.headers["x-request-id"]
        for line in answer.iter_lines():
            if line:
                times.append(time.monotonic())
    assert line == b"" or line == b"data: [DONE]"
    # As they come: an answer that is collected first and sent at once comes within a millisecond or two.
    assert len(times) > 10
    assert times[-1] - times[0] > 0.05

    wrong = chat(url, ask("x"), temperature=9)
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "temperature")
    large = requests.post(f"{url}/v1/chat/completions", data=b" " * 33_000_000, timeout=30)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "request_too_large")
    assert requests.get(f"{url}/livez", timeout=5).json() == {"status": "alive"}

    def state() -> dict[str, int]:
        return requests.get(f"{url}/server_info", timeout=5).json()["engine"]

    aborts = state()["aborts"]
    with requests.post(f"{url}/v1/chat/completions", json={**body, "max_tokens": 200}, stream=True, timeout=30) as gone:
        next(gone.iter_lines())
    deadline = time.monotonic() + 5
    while state()["aborts"] == aborts or state()["num_running"]:
        assert time.monotonic() < deadline, "the request went on without its client"
        time.sleep(0.1)


def test_applications_side_by_side_each_with_its_own_ranks_and_placement_group(deploy: Deploy) -> None:
    from ray.util import placement_group_table

    one = deploy("/one", autoscaling_config=fixed(1))
    two = deploy("/two", autoscaling_config=fixed(1), device="cpu", tp_size=2, ray_actor_options={"num_cpus": 2})
    assert (len(engines()), len(workers())) == (2, 1)
    answers = [chat(url, ask("hello"), max_tokens=8, temperature=0).json() for url in (one, two)]
    assert answers[0]["choices"][0]["message"] == answers[1]["choices"][0]["message"]
    assert [requests.get(f"{url}/server_info", timeout=5).json()["config"]["tp_size"] for url in (one, two)] == [1, 2]
    groups = [g for g in placement_group_table().values() if g["state"] == "CREATED"]
    assert sorted(group["bundles"][0]["CPU"] for group in groups) == [1.0, 2.0]
    assert {group["strategy"] for group in groups} == {"STRICT_PACK"}


def test_a_replica_has_a_gpu_for_each_rank() -> None:
    from sightline.errors import SettingError
    from sightline.serve.ray import RayConfig, _resources

    def resources(**args: Any) -> dict[str, Any]:
        return _resources(RayConfig(**args))

    assert resources(tp_size=4)["placement_group_bundles"] == [{"CPU": 1, "GPU": 4}]
    given = resources(ray_actor_options={"num_cpus": 4, "num_gpus": 1, "accelerator_type": "H200"})
    assert given["placement_group_bundles"] == [{"CPU": 4, "GPU": 1, "accelerator_type:H200": 0.001}]
    with pytest.raises(SettingError, match="num_gpus is 1; tp_size 2 needs 2"):
        resources(tp_size=2, ray_actor_options={"num_gpus": 1})


def test_a_replica_on_several_nodes_has_a_bundle_for_each() -> None:
    from sightline.errors import SettingError
    from sightline.serve.ray import RayConfig, _resources, build_app

    resources = _resources(RayConfig(tp_size=16, nnodes=2, ray_actor_options={"num_cpus": 4}))
    assert resources["placement_group_bundles"] == [{"CPU": 4, "GPU": 8}] * 2
    assert resources["placement_group_strategy"] == "PACK"
    with pytest.raises(SettingError, match="num_gpus is 16; tp_size 16 needs 8 on each node"):
        _resources(RayConfig(tp_size=16, nnodes=2, ray_actor_options={"num_gpus": 16}))
    with pytest.raises(SettingError, match="valid numbers of nodes: 1, 2, 4"):
        build_app({"tp_size": 4, "nnodes": 3})
    with pytest.raises(SettingError, match="of these settings, nnodes is enough"):
        build_app({"tp_size": 4, "nnodes": 2, "dist_init_addr": "a:1"})


def test_a_replica_on_two_nodes(second_node: None, deploy: Deploy) -> None:
    """It says what one of a single rank says; when its other node's rank dies, its clients are told, and Ray makes another one."""
    from ray.util import placement_group_table

    one = deploy("/one", autoscaling_config=fixed(1))
    two = deploy(
        "/two",
        autoscaling_config=fixed(1),
        device="cpu",
        tp_size=2,
        nnodes=2,
        ray_actor_options={"resources": {"slot": 1}},
    )
    groups = [g for g in placement_group_table().values() if g["state"] == "CREATED" and len(g["bundles"]) == 2]
    assert len(set(groups[0]["bundles_to_node_id"].values())) == 2

    def said(url: str, *parts: Any) -> tuple[str, list[float]]:
        choice = chat(url, ask(*parts), max_tokens=8, temperature=0, logprobs=True).json()["choices"][0]
        return choice["message"]["content"], [token["logprob"] for token in choice["logprobs"]["content"]]

    for parts in (["hello"], [image_part(1, width=96, height=96), "what is it?"]):
        text, logprobs = said(one, *parts)
        assert said(two, *parts) == (text, pytest.approx(logprobs, abs=1e-4, rel=0))

    (rank,) = workers()
    body = {"messages": ask("go on"), "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with requests.post(f"{two}/v1/chat/completions", json=body, stream=True, timeout=60) as answer:
        lines = answer.iter_lines(decode_unicode=True)
        next(lines)
        rank.kill()
        killed = time.monotonic()
        last = [line for line in lines if line][-1]
        assert time.monotonic() - killed < 2
        assert '"code":"engine_dead"' in last
    deadline = time.monotonic() + 60
    while (again := chat(two, ask("hello"), max_tokens=8, temperature=0)).status_code != 200:
        assert again.json()["error"]["code"] in ("engine_dead", "engine_lost", "server_starting", "server_failed"), (
            again.text
        )
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert said(two, "hello") == said(one, "hello")
    (another,) = workers()
    assert another.pid != rank.pid
    (engine,) = [process for process in engines() if Path(process.cmdline()[-1], "meeting.json").exists()]
    engine.parent().kill()
    assert psutil.wait_procs([engine, another], timeout=10)[1] == []


def test_a_node_that_fails_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """... with its error, and nothing is left of the replica."""
    from sightline.errors import ModelNotFoundError
    from sightline.serve import ray as ours

    engines: list[psutil.Process] = []

    async def fail() -> None:
        while not engines:
            await asyncio.sleep(0.05)
            engines[:] = [p for p in psutil.Process().children() if "sightline.engine.process" in p.cmdline()]
        raise ModelNotFoundError("there is no such model on this node")

    class Replica(ours.Server):
        def __del__(self) -> None:  # type: ignore[override]
            """Ray awaits the other one."""

    async def start() -> None:
        settings = ours.RayConfig(device="cpu", tp_size=2, nnodes=2).server_config().model_dump(mode="json")
        with pytest.raises(ModelNotFoundError, match="no such model on this node"):
            await object.__new__(Replica).__init__(settings)
        assert psutil.wait_procs(engines, timeout=5)[1] == []
        await asyncio.sleep(0.3)

    monkeypatch.setattr(ours.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(ours, "_start_nodes", lambda config: [asyncio.ensure_future(fail())])
    asyncio.run(start())


EXAMPLES = {"serve.yaml": 1, "rayservice.yaml": 1, "rayservice-two-nodes.yaml": 2}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_are_applications_that_can_be_built(name: str) -> None:
    from sightline.serve.ray import RayConfig, _resources, build_app

    document = yaml.safe_load((Path(__file__).resolve().parents[2] / "deploy" / "ray" / name).read_text())
    is_plain = "spec" not in document
    (application,) = (document if is_plain else yaml.safe_load(document["spec"]["serveConfigV2"]))["applications"]
    assert application["import_path"] == "sightline.serve.ray:build_app"
    assert set(application["args"]) <= set(RayConfig.model_fields)
    build_app(application["args"])
    bundles = _resources(RayConfig(**application["args"]))["placement_group_bundles"]
    assert bundles == [{"CPU": 4, "GPU": EXAMPLES[name]}] * EXAMPLES[name]
    if is_plain:
        return
    (group,) = document["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert limits["nvidia.com/gpu"] >= bundles[0]["GPU"]
    assert limits["cpu"] >= bundles[0]["CPU"]
    assert group.get("numOfHosts", 1) == len(bundles)
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] > RayConfig().drain_timeout + 5


def refusals(url: str) -> set[tuple[Any, ...]]:
    """Everything that a client can see of how this server, whose one place is taken, refuses others: too many, too late, too large."""
    stream = {"messages": ask("go on"), "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with requests.post(f"{url}/v1/chat/completions", json=stream, stream=True, timeout=60) as running:
        # dropped, it would close the connection
        lines = running.iter_lines()
        next(lines)
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda i: chat(url, ask(f"{i}")), range(12)))
    answers.append(chat(url, ask("x" * 30_000)))
    headers = ("retry-after", "x-should-retry", "content-type")
    return {(a.status_code, str(a.json()["error"]), *(a.headers.get(name) for name in headers)) for a in answers}


def test_a_full_server_says_what_one_without_ray_says(deploy: Deploy) -> None:
    limits = {"max_queued_requests": 2, "max_running_requests": 1, "queue_timeout": 0.5, "max_queued_mb": 0.02}
    flags = [word for name, value in limits.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    with ServerProcess(["--num-threads", "1", *flags]) as server:
        server.wait_ready()
        expected = refusals(server.base_url)
    assert refusals(deploy(autoscaling_config=fixed(1), max_ongoing_requests=2, **limits)) == expected
    codes = {"overloaded", "queue_timeout"}
    assert {code for code in codes for _, error, *_ in expected if f"'code': '{code}'" in error} == codes
    assert {(status, int(retry) >= 1) for status, _, retry, *_ in expected} == {(503, True)}


def test_a_replica_dies_under_load_and_nothing_is_lost(deploy: Deploy) -> None:
    url = deploy(autoscaling_config=fixed(2))
    victim, _ = replicas()
    child = next(engine for engine in engines() if engine.ppid() == victim.pid)
    idle = sum(child.cpu_times()[:2])
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=8)
    plain = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    lost: list[tuple[int, str | None]] = []

    def one(i: int) -> int:
        kind = {"model": "sightline-tiny", "max_tokens": 16, "extra_body": {"ignore_eos": True}}
        try:
            answer = plain.chat.completions.create(messages=ask(f"number {i}"), **kind)
        except openai.APIStatusError as error:
            lost.append((error.status_code, error.code))
            # What the SDK then does by itself.
            answer = client.chat.completions.create(messages=ask(f"number {i}"), **kind)
        return answer.usage.completion_tokens

    with ThreadPoolExecutor(8) as pool:
        results = [pool.submit(one, i) for i in range(300)]
        results[60].result()
        # in the middle of its work: the router may have known of the other one first
        while sum(child.cpu_times()[:2]) < idle + 0.2:
            assert not all(r.done() for r in results), "the victim served nothing"
            time.sleep(0.01)
        victim.kill()
        assert [r.result() for r in results] == [16] * 300
    assert 0 < len(lost) <= 16
    assert set(lost) == {(503, "engine_lost")}
    # Ray starts another one; the dead one's engine ends by itself.
    deadline = time.monotonic() + 60
    while len(replicas()) < 2 or child.is_running() or requests.get(f"{url}/readyz", timeout=10).status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
def test_a_replica_dies_between_the_head_and_the_body_of_an_answer(kind: str) -> None:
    from ray.exceptions import RayActorError

    from sightline.serve.ray import PassOn

    class Dying:
        def options(self, **options: Any) -> Any:
            return self

        def remote(self, call: Any) -> Any:
            return self

        async def __aiter__(self) -> Any:
            yield {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind.encode())]}
            raise RayActorError

        def cancel(self) -> None:
            pass

    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": []}
    asyncio.run(PassOn(Dying(), max_body=100)(scope, receive, send))
    start, body = sent
    assert start["status"] == (503 if kind == "application/json" else 200)
    assert b'"code":"engine_lost"' in body["body"]


def test_scales_up_and_down_under_load_without_an_error(deploy: Deploy) -> None:
    url = deploy(
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": 2,
            "target_ongoing_requests": 2,
            "upscale_delay_s": 0.5,
            "downscale_delay_s": 1.0,
            "look_back_period_s": 1.0,
            "metrics_interval_s": 0.5,
        },
        drain_timeout=150,
    )
    busy = threading.Event()

    def load() -> Counter[int]:
        counts: Counter[int] = Counter()
        while not busy.is_set():
            counts[chat(url, ask("hello"), max_tokens=60, ignore_eos=True).status_code] += 1
        return counts

    with ThreadPoolExecutor(10) as pool:
        running = [pool.submit(load) for _ in range(8)]
        try:
            _wait_for_replicas(2)
            # A stream on each: two are what one replica should have, so one of them goes, and not before its stream has ended.
            begun, streams = start_streams(url, pool, 2)
            begun.wait(30)
        finally:
            busy.set()
        states = _wait_for_state(STOPPING=1, RUNNING=1)
        assert not any(stream.done() for stream in streams), f"nobody was left to be waited for: {states}"
        assert [stream.result() for stream in streams] == ["data: [DONE]"] * 2
        total = sum((r.result() for r in running), Counter())
    assert set(total) == {200}, total
    assert total[200] > 20
    _wait_for_replicas(1)


def start_streams(url: str, pool: ThreadPoolExecutor, count: int) -> tuple[threading.Barrier, list[Future[str]]]:
    """Long answers; the barrier falls when all have begun, and each future is the last line of one."""
    begun = threading.Barrier(count + 1)

    def read(i: int) -> str:
        body = {"messages": ask(f"{i} is yours"), "max_tokens": 1500, "ignore_eos": True, "stream": True}
        last = ""
        with requests.post(f"{url}/v1/chat/completions", json=body, stream=True, timeout=120) as answer:
            for line in answer.iter_lines(decode_unicode=True):
                if line and not last:
                    begun.wait(30)
                last = line or last
        return last

    return begun, [pool.submit(read, i) for i in range(count)]


def _wait_for_state(**wanted: int) -> dict[str, int]:
    """Until Ray counts so many of the engine's replicas in these states; returns all counts."""
    from ray import serve

    deadline = time.monotonic() + 60
    while True:
        states = dict(serve.status().applications["default"].deployments["engine"].replica_states)
        if all(states.get(state) == count for state, count in wanted.items()):
            return states
        assert time.monotonic() < deadline, states
        time.sleep(0.1)


def _wait_for_replicas(count: int) -> None:
    """Until so many engines run."""
    deadline = time.monotonic() + 60
    while len(engines()) != count or len(replicas()) != count:
        assert time.monotonic() < deadline, f"{len(replicas())} replicas, not {count}"
        time.sleep(0.2)


def hit_rate(url: str, num_requests: int = 200) -> float:
    """Of the requests whose picture was asked about before, 30 % of all, the part that found it cached."""
    trace = repeats(num_requests, 0.3, 1)

    def cached(number: int) -> bool:
        answer = chat(url, ask(image_part(number, width=96, height=96), "what is it?"), max_tokens=1)
        assert answer.status_code == 200
        details = answer.json()["usage"]["prompt_tokens_details"]
        return details["cached_tokens"] >= details["image_tokens"]

    with ThreadPoolExecutor(4) as pool:
        hits = list(pool.map(cached, trace))
    # Of those at once, any may be first; but each picture was new once.
    assert {number for number, hit in zip(trace, hits, strict=True) if not hit} == set(trace)
    return sum(hits) / (num_requests - len(set(trace)))


def test_known_pictures_go_where_they_are_cached(deploy: Deploy) -> None:
    aware = hit_rate(deploy(autoscaling_config=fixed(2)))
    turns = hit_rate(deploy(autoscaling_config=fixed(2), load_balance_method="round_robin"))
    print(f"hit rate of repeated pictures: cache_aware {aware:.3f}, round_robin {turns:.3f}")
    assert aware > 0.9
    assert turns < 0.8
