"""The load generator against a stand-in server whose behavior is known."""

from __future__ import annotations

import base64
import io
import json
import math
import random
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from sightline.bench import main, serving
from sightline.bench.plot import distributions
from sightline.bench.report import percentile, summarize, table

STEP = 0.02


class StandIn(ThreadingHTTPServer):
    """Answers every chat with three tokens, STEP seconds apart, and remembers what it saw."""

    daemon_threads = True
    # more than come at once: with five, as by default, connections are reset when the machine is slow to accept them
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.now = self.most = 0
        self.bodies: list[dict[str, Any]] = []
        self.fault = ""

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.answer(200, b'{"data": [{"id": "stand-in"}]}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        if self.server.fault == "status" and len(self.server.bodies) % 2:
            self.answer(400, b'{"error": {"message": "no such luck"}}')
        else:
            self.stream()
        with self.server.lock:
            self.server.now -= 1

    def stream(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()  # HTTP/1.0: the end of the connection ends the stream
        self.send({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for word in ("a", " red", " square"):
            time.sleep(STEP)
            self.send({"choices": [{"delta": {"content": word}}]})
        if self.server.fault == "stream":
            self.send({"error": {"message": "engine died"}})
            return
        usage = {"prompt_tokens": 50, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 16}}
        self.send({"choices": [], "usage": usage})
        if self.server.fault != "no end":
            self.wfile.write(b"data: [DONE]\n\n")

    def send(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def measure(server: StandIn, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, dict[str, Any]]:
    code = main(["serve", "--base-url", server.base_url, "--image-sizes", "64x48", "--json", "-", *flags])
    return code, json.loads(capsys.readouterr().out)


def test_counts_and_times_are_those_of_the_server(stand_in: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = measure(stand_in, capsys, "--concurrency", "3", "--num-requests", "7", "--warmup", "1")
    assert code == 0
    assert (result["completed"], result["failed"]) == (7, 0)
    assert (result["prompt_tokens"], result["cached_tokens"], result["output_tokens"]) == (350, 112, 21)
    assert len(stand_in.bodies) == 8, "seven and one to warm up"
    assert stand_in.most == 3, "a closed loop of three clients"
    first, between = result["time_to_first_token_ms"], result["inter_token_latency_ms"]
    assert 1e3 * STEP <= first["p50"] < 10e3 * STEP, "the empty first delta is no token"
    assert 1e3 * STEP * 0.9 <= between["p50"] < 10e3 * STEP
    assert result["request_latency_ms"]["p50"] >= 3e3 * STEP
    rate = result["output_tokens"] / result["duration_seconds"]
    assert math.isclose(result["output_token_throughput"], rate)


def test_the_requests_are_what_was_asked_for(stand_in: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--num-requests", "4", "--warmup", "0", "--images-per-request", "2", "--max-tokens", "5")
    measure(stand_in, capsys, *flags, "--ignore-eos", "--image-sizes", "64x48", "30x90", "--image-format", "png")
    pictures = set()
    for body in stand_in.bodies:
        assert body["model"] == "stand-in"
        assert (body["max_tokens"], body["ignore_eos"], body["stream"]) == (5, True, True)
        *parts, text = body["messages"][0]["content"]
        assert text["type"] == "text"
        sizes = []
        for part in parts:
            head, _, data = part["image_url"]["url"].partition(",")
            assert head == "data:image/png;base64"
            pictures.add(data)
            sizes.append(Image.open(io.BytesIO(base64.b64decode(data))).size)
        assert sorted(sizes) == [(30, 90), (64, 48)]
    assert len(pictures) == 8, "every picture is another one"


def test_requests_come_at_their_rate_whether_or_not_others_are_answered(
    stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--request-rate", "400", "--num-requests", "40", "--warmup", "0", "--concurrency", "1")
    code, result = measure(stand_in, capsys, *flags)
    assert (code, result["completed"]) == (0, 40)
    assert stand_in.most > 5, "no request waits for another's answer"
    slow = ("--request-rate", "20", "--num-requests", "6", "--warmup", "0")
    code, result = measure(stand_in, capsys, *slow)
    rng = random.Random("0-arrivals")
    last = sum(rng.expovariate(20) for _ in range(6))
    assert result["duration_seconds"] >= last
    assert main(["serve", "--base-url", stand_in.base_url, "--request-rate", "0"]) == 2


def test_times_between_tokens(stand_in: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    """Three tokens have two gaps; the mean per token is that of a request, the latency of a pair of chunks."""
    _, result = measure(stand_in, capsys, "--num-requests", "5", "--warmup", "0", "--concurrency", "1")
    assert result["inter_token_latency_ms"]["count"] == 10
    assert result["time_per_output_token_ms"]["count"] == 5
    outcome = serving.Outcome(started=0.0, times=[0.5, 0.6, 0.9], latency=1.0, output_tokens=3)
    assert outcome.ttft == 0.5
    assert outcome.tpot == pytest.approx(0.2)
    gaps = serving.measurements([outcome])["inter-token latency, ms"]
    assert gaps == pytest.approx([100, 300])
    assert serving.Outcome(started=0.0, times=[0.5], output_tokens=1).tpot is None


def test_goodput_counts_requests_within_all_bounds(stand_in: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--num-requests", "4", "--warmup", "0")
    _, result = measure(stand_in, capsys, *flags, "--goodput", "ttft=10000", "latency=10000")
    assert result["goodput"] == pytest.approx(result["request_throughput"])
    _, result = measure(stand_in, capsys, *flags, "--goodput", "ttft=10000", f"tpot={1e3 * STEP / 2}")
    assert result["goodput"] == 0
    _, result = measure(stand_in, capsys, *flags)
    assert result["goodput"] is None
    with pytest.raises(SystemExit):
        main(["serve", "--goodput", "speed=3"])
    assert "ttft=MS" in capsys.readouterr().err


def test_counts_of_pictures_take_turns() -> None:
    load = serving.Load(images_per_request=(0, 2, 1), image_sizes=((64, 48),))
    counts = [len(json.loads(serving.make_body(load, "m", i))["messages"][0]["content"]) - 1 for i in range(6)]
    assert counts == [0, 2, 1, 0, 2, 1]


def test_the_plot_is_a_drawing_of_the_times(
    stand_in: StandIn, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "times.svg"
    _, result = measure(stand_in, capsys, "--num-requests", "5", "--warmup", "0", "--plot", str(path))
    root = ElementTree.parse(path).getroot()
    texts = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert len(list(root.iter("{http://www.w3.org/2000/svg}polyline"))) == 4
    for name in ("time_to_first_token_ms", "inter_token_latency_ms", "request_latency_ms"):
        assert any(text.startswith(f"p50 {result[name]['p50']:.1f}") for text in texts), name
    assert "<script" not in distributions("<script>", {"a": [1.0]})
    assert distributions("empty", {"a": []}).count("polyline") == 0


def test_every_request_has_a_picture_of_its_own_or_an_earlier_one() -> None:
    def shown(load: serving.Load, purpose: str = "load") -> list[str]:
        return [serving.data_pictures(load, i, purpose)[0] for i in range(40)]

    alone = serving.Load(num_requests=40, image_sizes=((64, 48), (32, 32)))
    assert shown(alone) == shown(alone), "repeatable"
    assert len({*shown(alone), *shown(alone, "warmup")}) == 80
    half = serving.Load(num_requests=40, image_sizes=((64, 48), (32, 32)), image_reuse=0.5)
    assert 10 < len(set(shown(half))) < 30
    assert len(set(shown(half, "warmup"))) == 40, "what warms up is not repeated"
    assert len(set(shown(serving.Load(num_requests=40, image_sizes=((64, 48),), image_reuse=1.0)))) == 1


def test_random_words_make_every_question_another() -> None:
    load = serving.Load(images_per_request=(0,), question_words=20)
    questions = [json.loads(serving.make_body(load, "m", i))["messages"][0]["content"][0]["text"] for i in range(20)]
    assert len(set(questions)) == 20
    assert all(len(q.split()) == 20 + len(load.question.split()) for q in questions)
    assert serving.make_body(load, "m", 3) == serving.make_body(load, "m", 3), "repeatable"


@pytest.mark.parametrize(
    ("fault", "failed", "message"),
    [
        ("status", 2, "HTTP 400: no such luck"),
        ("stream", 4, "in the stream: engine died"),
        ("no end", 4, "the stream ended without [DONE]"),
    ],
)
def test_a_failure_is_counted_and_named(
    stand_in: StandIn, capsys: pytest.CaptureFixture[str], fault: str, failed: int, message: str
) -> None:
    stand_in.fault = fault
    code, result = measure(stand_in, capsys, "--num-requests", "4", "--concurrency", "1", "--warmup", "0")
    assert code == 1
    assert result["failed"] == failed
    assert result["errors"] == {message: failed}
    assert result["output_tokens"] == 3 * (4 - failed), "failed requests add no tokens"


def test_no_server_is_a_sentence_not_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--base-url", "http://127.0.0.1:9", "--num-requests", "1"]) == 1
    assert "http://127.0.0.1:9" in capsys.readouterr().err


def test_the_report_reads_well(stand_in: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--base-url", stand_in.base_url, "--num-requests", "10", "--image-sizes", "64x48"]) == 0
    out, err = capsys.readouterr()
    assert "10 requests of 1 picture(s) (64x48), 8 at a time" in out
    assert "time to first token, ms" in out
    assert err.count("requests\n") == 10, "plain progress lines off a terminal"


def test_unknown_commands_and_sizes_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["speed"]) == 2
    assert main(["--help"]) == 0
    with pytest.raises(SystemExit) as stop:
        main(["serve", "--image-sizes", "large"])
    assert stop.value.code == 2
    assert "WIDTHxHEIGHT" in capsys.readouterr().err


def test_percentiles() -> None:
    assert percentile([1.0, 2.0, 3.0], 0.5) == 2.0
    assert percentile([1.0, 2.0], 0.9) == pytest.approx(1.9)
    assert percentile([7.0], 0.99) == 7.0
    assert math.isnan(percentile([], 0.5))
    assert summarize([]) is None
    numbers = summarize([3.0, 1.0, 2.0])
    assert numbers is not None
    assert (numbers.count, numbers.mean, numbers.p50, numbers.max) == (3, 2.0, 2.0, 3.0)


def test_tables_are_aligned() -> None:
    assert table(("", "ms"), [("first", "1.0"), ("b", "12.5")]).splitlines() == [
        "|       |   ms |",
        "|-------|-----:|",
        "| first |  1.0 |",
        "| b     | 12.5 |",
    ]


def test_a_real_server_answers_every_request(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Token counts come from the server's usage: with ignore_eos all answers have the same length."""
    flags = ["--concurrency", "4", "--num-requests", "9", "--max-tokens", "6", "--ignore-eos", "--image-sizes", "96x64"]
    assert main(["serve", "--base-url", server, "--json", "-", *flags]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["completed"], result["failed"], result["output_tokens"]) == (9, 0, 54)
    assert result["prompt_tokens"] > 9 * 10, "pictures count"
    assert result["cached_tokens"] < result["prompt_tokens"] / 2, "every request has its own picture"
    assert 0 < result["time_to_first_token_ms"]["p50"] < result["request_latency_ms"]["p50"]
