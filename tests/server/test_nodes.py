"""`--nnodes 2`: two commands that share nothing but an address and a secret are one server."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import requests
import zmq

from sightline.config import EngineConfig
from sightline.engine.node_link import Address, Join, Keys, check_nodes
from sightline.errors import AddressInUseError, SettingError
from tests import tiny
from tests.server.conftest import ask, image_part
from tests.server.test_replicas import start_streams
from tests.servers import ServerProcess, free_port

SECRET = "a secret of these tests"
TOLERANCE = 1e-4


class Nodes(NamedTuple):
    server: ServerProcess
    other: ServerProcess
    address: str


def node(rank: int, address: str, *flags: str, secret: str = SECRET) -> ServerProcess:
    command = [str(tiny.qwen2_vl()), "--num-threads", "1", "--nnodes", "2", "--node-rank", str(rank)]
    return ServerProcess([*command, "--dist-init-addr", address, *flags], {"SIGHTLINE_DIST_SECRET": secret})


@contextmanager
def nodes(*flags: str) -> Iterator[Nodes]:
    """Both, ready; the second is started first."""
    address = f"127.0.0.1:{free_port()}"
    with node(1, address, *flags) as other, node(0, address, *flags) as server:
        server.wait_ready()
        yield Nodes(server, other, address)


@pytest.fixture(scope="module")
def serving() -> Iterator[Nodes]:
    """Four ranks on two nodes, with steps so small that every prompt is computed in chunks."""
    with nodes("--tp", "4", "--chunked-prefill-size", "48") as both:
        yield both
        processes = [*tree(both.server), *tree(both.other)]
        assert len(processes) == 6, processes
        assert both.server.terminate() == 0
        assert both.other.wait_exit(5) == 0
        assert psutil.wait_procs(processes, timeout=2)[1] == []
        for log in (both.server.log(), both.other.log()):
            assert "Traceback" not in log
            assert "arning" not in log


def tree(server: ServerProcess) -> list[psutil.Process]:
    process = psutil.Process(server.pid)
    return [process, *process.children(recursive=True)]


def answer(url: str, question: Sequence[dict | str]) -> dict[str, Any]:
    body = {"messages": ask(*question), "max_tokens": 12, "ignore_eos": True, "temperature": 0}
    asked = requests.post(f"{url}/v1/chat/completions", json={**body, "logprobs": True, "top_logprobs": 4}, timeout=60)
    assert asked.status_code == 200, asked.text
    return asked.json()


def logprobs(said: dict[str, Any]) -> list[tuple[bytes, float]]:
    content = said["choices"][0]["logprobs"]["content"]
    return [(bytes(top["bytes"]), top["logprob"]) for token in content for top in (token, *token["top_logprobs"])]


def test_four_ranks_on_two_nodes_say_what_one_says(serving: Nodes, tiny_server: str) -> None:
    """With a picture, with one for each rank to encode, in chunks, and again from the caches."""
    pictures = [image_part(0, width=200, height=150), *(image_part(seed, width=60, height=60) for seed in range(1, 5))]
    for question in (["How many shapes are there?"], [pictures[0], "what is it?"], [*pictures[1:], "which is red?"]):
        expected = logprobs(answer(tiny_server, question))
        cold, again = (answer(serving.server.base_url, question) for _ in range(2))
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        for said in (logprobs(cold), logprobs(again)):
            assert [token for token, _ in said] == [token for token, _ in expected]
            assert [value for _, value in said] == pytest.approx([value for _, value in expected], abs=TOLERANCE, rel=0)
    engine = requests.get(f"{serving.server.base_url}/server_info", timeout=5).json()["engine"]
    assert engine["images_encoded"] == 5
    assert engine["steps"] > 6 * 12, "prompts were not computed in chunks"


def test_an_intruder_is_refused_and_changes_nothing(serving: Nodes) -> None:
    """With another secret, without one, and as a node that is there already or is not like node 0."""
    with ExitStack() as stack:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stack.callback(context.destroy, linger=0)
        strange, plain, half, friend = (context.socket(zmq.DEALER) for _ in range(4))
        Keys("the secret of somebody else").connect(strange)
        # of node 0's keys it knows what node 0 shows to others
        Keys(SECRET).connect(half)
        half.curve_publickey, half.curve_secretkey = zmq.curve_keypair()
        # it knows the secret, and nothing else
        Keys(SECRET).connect(friend)
        for socket in (strange, plain, half, friend):
            socket.connect(f"tcp://{serving.address}")
            socket.send(b"anything")
        for why, intruder in (
            ("no node 0 with this secret", node(1, serving.address, "--tp", "4", secret=SECRET + "!")),
            ("there is one already", node(1, serving.address, "--tp", "4", "--chunked-prefill-size", "48")),
            ("its --chunked-prefill-size is None, and node 0's is 48", node(1, serving.address, "--tp", "4")),
        ):
            stack.enter_context(intruder)
            assert intruder.wait_exit(30) == 2
            assert why in intruder.log()
            assert "Traceback" not in intruder.log()
        assert b"a node speaks otherwise than sightline" in friend.recv()
        assert not any(socket.poll(0) for socket in (strange, plain, half))
    assert answer(serving.server.base_url, ["still there?"])["usage"]["completion_tokens"] == 12


def test_nothing_is_told_of_the_others(serving: Nodes) -> None:
    info = requests.get(f"{serving.server.base_url}/server_info", timeout=5)
    assert info.json()["config"]["nnodes"] == 2
    assert SECRET not in info.text
    assert serving.address not in info.text


def listening(process: psutil.Process) -> int:
    return sum(c.status == psutil.CONN_LISTEN for c in process.net_connections("inet"))


def test_one_node_listens_for_none(tiny_process: ServerProcess, serving: Nodes) -> None:
    assert [listening(process) for process in tree(tiny_process)] == [1, 0]
    assert listening(tree(serving.server)[1]) > 0
    assert listening(tree(serving.other)[0]) == 0


@pytest.mark.parametrize("victim", ["rank 1", "node 1", "silent node 1", "rank 0", "server"])
def test_one_that_dies_ends_all(victim: str) -> None:
    with nodes("--tp", "2") as (server, other, _):
        streams = start_streams(server, 2)
        folder = Path(psutil.Process(server.pid).children()[0].cmdline()[-1])
        (http, engine), (agent, rank) = tree(server), tree(other)
        victims = {"rank 1": rank, "node 1": agent, "silent node 1": agent, "rank 0": engine, "server": http}
        victims[victim].send_signal(signal.SIGSTOP if victim.startswith("silent") else signal.SIGKILL)
        killed = time.monotonic()
        if victim != "server":
            for last, ended in streams():
                assert '"code":"engine_dead"' in last
                assert ended - killed < 2
            assert server.wait_exit(10) == 7
        agent.send_signal(signal.SIGCONT)
        if victim != "node 1":
            assert other.wait_exit(5) == 7
        assert psutil.wait_procs([http, engine, agent, rank], timeout=5)[1] == []
        assert not folder.exists()
        told = {"rank 1": "rank 1 died (exit code -9)", "node 1": "node 1 is gone", "silent node 1": "node 1 is gone"}
        assert told.get(victim, "") in server.log()
        if not victim.startswith("silent"):
            assert ("node 0 is gone" in other.log()) == (victim in ("rank 0", "server"))


def test_a_node_that_does_not_come() -> None:
    address, silent = (f"127.0.0.1:{free_port()}" for _ in range(2))
    flags = ["--tp", "2", "--dist-timeout", "1.5"]
    with node(0, address, *flags) as server, node(1, silent, *flags) as other:
        assert server.wait_exit(30) == 1
        assert f"node 1 did not come to {address} in 1.5 s (--dist-timeout)" in server.log()
        assert other.wait_exit(30) == 1
        assert f"node 0 did not answer at {silent} in 1.5 s (--dist-timeout)" in other.log()


def test_a_server_that_is_killed_while_it_waits() -> None:
    with node(0, f"127.0.0.1:{free_port()}", "--tp", "2") as server:
        deadline = time.monotonic() + 30
        while "for node 1" not in server.log():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        http, engine = tree(server)
        http.kill()
        assert psutil.wait_procs([http, engine], timeout=5)[1] == []


def test_a_start_that_fails_on_one_node_fails_on_both() -> None:
    address = f"127.0.0.1:{free_port()}"
    flags = ["--tp", "2", "--max-total-tokens", "32"]
    with node(1, address, *flags) as other, node(0, address, *flags, "--context-length", "4096") as server:
        assert other.wait_exit(30) == 2
        assert "its --context-length is None, and node 0's is 4096" in other.log()
        with node(1, address, *flags, "--context-length", "4096") as fitting:
            assert server.wait_exit(30) == 4
            assert fitting.wait_exit(5) == 4
            assert "node 0: 32 tokens of K/V" in fitting.log()


def config(**settings: Any) -> EngineConfig:
    return EngineConfig(**{"tp_size": 4, "nnodes": 2, "dist_init_addr": "a:1", "dist_secret": SECRET, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nnodes": 3}, "--nnodes 3: --tp-size 4 cannot be divided by that; valid numbers of nodes: 1, 2, 4"),
        ({"node_rank": 2}, "--node-rank 2: with --nnodes 2 it is 0 to 1"),
        ({"nnodes": 1, "node_rank": 1}, "--node-rank 1: with --nnodes 1 it is 0 to 0"),
        ({"dist_init_addr": None}, "--dist-init-addr: with --nnodes 2 it must be HOST:PORT"),
        ({"dist_init_addr": "host"}, "--dist-init-addr: .* not 'host'"),
        ({"dist_secret": "short"}, "a secret of 16 characters .* SIGHTLINE_DIST_SECRET"),
        ({"dp_size": 2}, "--nnodes: an engine of several nodes has no replicas"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        check_nodes(config(**settings))
    check_nodes(config())
    check_nodes(config(dist_init_addr="[::1]:5000"))


def test_a_name_that_is_not_known_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [OSError(-2, "Name or service not known"), [(2, 1, 6, "", ("10.0.0.1", 5))]]
    waits: list[float] = []

    def resolve(*args: object, **kwargs: object) -> Any:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr("sightline.engine.node_link.socket.getaddrinfo", resolve)
    monkeypatch.setattr("sightline.engine.node_link.time.sleep", waits.append)
    assert Address("pod-0", 5).resolved() == Address("10.0.0.1", 5)
    assert waits == [1]
    answers[:] = [OSError(-2, "Name or service not known")]
    with pytest.raises(SettingError, match="--dist-init-addr: pod-0 cannot be resolved: Name or service not known"):
        Address("pod-0", 5).resolved()
    with pytest.raises(AddressInUseError, match=r"192\.0\.2\.123:5: .* must be an address of node 0's and a free port"):
        Address("192.0.2.123", 5).listen()


def test_what_nodes_must_have_in_common() -> None:
    node_0 = Join.of(config(), tiny.qwen2_vl())
    assert Join.of(config(node_rank=1, num_threads=3, dist_init_addr="b:1"), tiny.qwen2_vl()).difference(node_0) is None
    other = Join.of(config(dtype="bfloat16"), tiny.qwen2_vl())
    assert other.difference(node_0) == "its --dtype is bfloat16, and node 0's is auto"
    other = Join.of(config(), tiny.qwen2_vl())
    other.versions["torch"] = "1.0"
    assert other.difference(node_0) == f"it has torch 1.0, and node 0 has {node_0.versions['torch']}"
    model = "its model's config.json or weight files are not those of node 0"
    assert Join.of(config(), tiny.qwen2_vl(shards=3)).difference(node_0) == model
    assert Join.of(config(), tiny.qwen2_vl(overrides={"rms_norm_eps": 1e-5})).difference(node_0) == model
