"""`--enable-trace`: a server sends its spans to a collector on the loopback, which this file is."""

from __future__ import annotations

import asyncio
import gzip
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import requests
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from sightline.config import ServerConfig
from sightline.server.lifecycle import Lifecycle
from tests import tiny
from tests.server.conftest import data_url, picture
from tests.servers import ServerProcess

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ENGINE = ["engine.queue", "engine.vision", "engine.prefill", "engine.decode"]


class Loopback(BaseHTTPRequestHandler):
    """A collector of spans, and the host of one picture."""

    resources: list[Any]
    fetched: list[dict[str, str]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        assert self.path == "/v1/traces"
        self.resources += ExportTraceServiceRequest.FromString(body).resource_spans
        self._answer(b"", "application/x-protobuf")

    def do_GET(self) -> None:
        self.fetched.append({name.lower(): value for name, value in self.headers.items()})
        self._answer(picture(950), "image/png")

    def _answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def loopback() -> Iterator[tuple[str, type[Loopback]]]:
    handler = type("Handler", (Loopback,), {"resources": [], "fetched": []})
    host = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=host.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{host.server_port}", handler
    host.shutdown()


@pytest.fixture(scope="module")
def server(loopback: tuple[str, type[Loopback]]) -> Iterator[ServerProcess]:
    """Configured as every OpenTelemetry program is."""
    env = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": loopback[0],
        "OTEL_SERVICE_NAME": "pictures",
        "OTEL_BSP_SCHEDULE_DELAY": "50",
    }
    flags = ["--enable-trace", "--allow-private-media", "--served-model-name", "tiny", "--api-key", "secret-key"]
    with ServerProcess([str(tiny.qwen2_vl()), *flags], env) as process:
        process.wait_ready()
        yield process


def call(server: ServerProcess, url: str, traceparent: str | None, **fields: Any) -> requests.Response:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "prompt-canary"}]
    body = {"messages": [{"role": "user", "content": content}], "ignore_eos": True, "max_tokens": 6, **fields}
    headers = {"authorization": "Bearer secret-key", "tracestate": "vendor=private"}
    if traceparent is not None:
        headers["traceparent"] = traceparent
    return requests.post(f"{server.base_url}/v1/chat/completions", json=body, headers=headers, timeout=30)


def spans_of(handler: type[Loopback], trace: str, number: int) -> dict[str, Any]:
    """The spans of a trace by name, once so many have come."""
    deadline = time.monotonic() + 20
    while True:
        spans = [s for r in [*handler.resources] for scope in r.scope_spans for s in scope.spans]
        found = {s.name: s for s in spans if s.trace_id.hex() == trace}
        if len(found) >= number:
            return found
        assert time.monotonic() < deadline, sorted(found)
        time.sleep(0.05)


def attributes(span: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if value.WhichOneof("value") == "array_value":
            return [plain(each) for each in value.array_value.values]
        return getattr(value, value.WhichOneof("value"))

    return {each.key: plain(each.value) for each in span.attributes}


def test_a_request_and_its_phases(server: ServerProcess, loopback: tuple[str, type[Loopback]]) -> None:
    address, handler = loopback
    mark = server.log_size()
    answer = call(server, f"{address}/picture.png?secret-canary", f"00-{TRACE}-{PARENT}-01")
    assert answer.status_code == 200, answer.text
    spans = spans_of(handler, TRACE, 8)
    assert sorted(spans) == sorted(
        ["POST /v1/chat/completions", "picture.fetch", "picture.decode", "prompt.render", *ENGINE]
    )
    root = spans.pop("POST /v1/chat/completions")
    assert root.parent_span_id.hex() == PARENT
    assert {span.parent_span_id for span in spans.values()} == {root.span_id}
    usage = answer.json()["usage"]
    assert (
        attributes(root).items()
        >= {
            "http.request.method": "POST",
            "http.route": "/v1/chat/completions",
            "http.response.status_code": 200,
            "gen_ai.response.model": "tiny",
            "gen_ai.response.id": answer.json()["id"],
            "gen_ai.usage.input_tokens": usage["prompt_tokens"],
            "gen_ai.usage.output_tokens": 6,
            "gen_ai.response.finish_reasons": ["length"],
            "sightline.pictures": 1,
        }.items()
    )
    # In the order of the work, one after the other, inside the request.
    order = ["picture.fetch", "prompt.render", "picture.decode", "engine.queue", "engine.prefill", "engine.decode"]
    times = [root.start_time_unix_nano]
    for name in order:
        times += [spans[name].start_time_unix_nano, spans[name].end_time_unix_nano]
    times.append(root.end_time_unix_nano)
    slack = 1_000_000  # the two clocks are read a moment apart
    assert all(a <= b + slack for a, b in pairwise(times)), times
    vision, prefill = spans["engine.vision"], spans["engine.prefill"]
    assert prefill.start_time_unix_nano <= vision.start_time_unix_nano + slack
    assert vision.start_time_unix_nano < vision.end_time_unix_nano <= prefill.end_time_unix_nano
    assert abs(times[0] / 1e9 - time.time()) < 60
    # The picture's host may join the trace, and learns nothing else of it.
    assert handler.fetched[-1]["traceparent"] == f"00-{TRACE}-{root.span_id.hex()}-01"
    assert "tracestate" not in handler.fetched[-1]
    resource = {each.key: each.value.string_value for each in handler.resources[-1].resource.attributes}
    assert resource["service.name"] == "pictures"
    while "trace=" not in server.log(mark):
        time.sleep(0.02)
    assert f"trace={TRACE}" in server.log(mark)
    assert not [word for word in ("canary", "secret-key") if word in repr(handler.resources)]


def test_a_known_picture_has_no_spans_of_its_own(server: ServerProcess, loopback: tuple[str, type[Loopback]]) -> None:
    trace = "5" * 32
    known = data_url(picture(951))
    assert call(server, known, None).ok
    assert call(server, known, f"00-{trace}-{PARENT}-01", stream=True).ok
    spans = spans_of(loopback[1], trace, 5)
    expected = {"POST /v1/chat/completions", "prompt.render", *ENGINE} - {"engine.vision"}
    assert set(spans) == expected


def test_errors_and_clients_that_do_not_want_to_be_traced(
    server: ServerProcess, loopback: tuple[str, type[Loopback]]
) -> None:
    unwanted, wrong = "6" * 32, "7" * 32
    assert call(server, data_url(picture(952)), f"00-{unwanted}-{PARENT}-00").ok
    assert call(server, "data:image/png;base64,AAAA", f"00-{wrong}-{PARENT}-01").status_code == 400
    (root,) = spans_of(loopback[1], wrong, 1).values()
    assert attributes(root)["http.response.status_code"] == 400
    assert attributes(root)["error.type"] == "invalid_image_format"
    assert root.status.code == 0  # the client's fault
    assert call(server, data_url(picture(952)), "nonsense").ok
    assert not spans_of(loopback[1], unwanted, 0)


def test_what_is_left_is_sent_at_the_end(loopback: tuple[str, type[Loopback]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{loopback[0]}/v1/traces")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    lifecycle = Lifecycle(ServerConfig(model="tiny", enable_trace=True))
    assert lifecycle.tracing is not None
    trace = lifecycle.tracing.begin({})
    trace.end("POST /", {"never": None}, failed=True)
    assert not spans_of(loopback[1], trace.id, 0)
    asyncio.run(lifecycle.close())
    (root,) = spans_of(loopback[1], trace.id, 1).values()
    assert (root.status.code, attributes(root)) == (2, {})
    resource = {each.key: each.value.string_value for each in loopback[1].resources[-1].resource.attributes}
    assert resource["service.name"] == "sightline"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PYTHONPATH": "without"}, "--enable-trace needs OpenTelemetry: pip install 'sightline[otel]'"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL=grpc: only http/protobuf"),
    ],
)
def test_what_is_missing_is_said(environment: dict[str, str], message: str, tmp_path: Path) -> None:
    # A namespace package: this part of it hides the one that is installed, and nothing else.
    without = tmp_path / "without" / "opentelemetry" / "sdk"
    without.mkdir(parents=True)
    (without / "__init__.py").write_text("raise ImportError('not installed')\n")
    path = os.pathsep.join([str(tmp_path / "without"), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, **environment} | ({"PYTHONPATH": path} if "PYTHONPATH" in environment else {})
    command = [sys.executable, "-m", "sightline", "serve", str(tiny.qwen2_vl()), "--enable-trace", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_is_loaded_when_it_is_off() -> None:
    """But the API, which FastAPI brings and imports itself."""
    code = (
        "import sys; from sightline.config import ServerConfig; from sightline.server.lifecycle import Lifecycle; "
        "from sightline.server.app import create_app; create_app(Lifecycle(ServerConfig(model='x'))); "
        "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
