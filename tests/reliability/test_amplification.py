"""Small requests that ask for much: refused at once, and the others do not notice."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import requests

from sightline.errors import CheckpointError, RequestError
from sightline.prompt.chat_template import ChatTemplate, Shield
from tests.reliability.conftest import Guarded
from tests.scorecard import SEED, scaled
from tests.server.conftest import ask, image_part

Count = Callable[..., None]
HI = {"role": "user", "content": "hi"}


def nested(depth: int) -> bytes:
    return b'{"messages": ' + b"[" * depth + b"]" * depth + b"}"


def bodies() -> list[tuple[str, bytes]]:
    """(name, body); all must be a 4xx."""
    fields: list[tuple[str, Any]] = []
    fields += [("seed", value) for value in (2**63, 2**64, -(10**30), "1", 1.5, [1])]
    for name in ("n", "max_tokens", "min_tokens", "top_k"):
        fields += [(name, value) for value in (-(2**63), -(2**31) - 1, 2**63, 2**64, 10**30, "1", 1.5, [1], {"a": 1})]
    fields += [
        (name, v) for name in ("temperature", "top_p", "min_p", "presence_penalty") for v in (-5, 1e308, "x", [])
    ]
    fields += [
        ("n", 0),
        ("n", 129),
        ("top_logprobs", 10**9),
        ("top_logprobs", -1),
        ("stop", ["x"] * 500_000),
        ("stop", [""]),
    ]
    fields += [("logit_bias", {str(-1): 1}), ("logit_bias", {"999999999": 1}), ("logit_bias", {"1": 1e9})]
    fields += [
        ("chat_template", "{% for i in range(10**9) %}x{% endfor %}"),
        ("chat_template_kwargs", {"tokenize": True}),
    ]
    fields += [("best_of", 10**9), ("prompt_logprobs", 10**6), ("messages", []), ("messages", [HI] * 100_000)]
    fields += [("messages", [{"role": "user", "content": "x" * 5_000_000}])]
    fields += [("messages", ask(*[image_part(1)] * 17)), ("messages", ask(*["x"] * 200_000))]
    made = [
        (f"{name}: {str(value)[:40]}", json.dumps({"messages": [HI], name: value}).encode()) for name, value in fields
    ]
    made += [(f"{depth} deep", nested(depth)) for depth in (100, 10_000, 1_000_000)]
    made += [
        ("NaN", b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}'),
        ("cut", b'{"messages": ["'),
    ]
    made += [
        ("a digit too many", b'{"messages": [], "seed": ' + b"9" * 1_000_000 + b"}"),
        ("nothing", b""),
        ("NUL", b"\0" * 1000),
    ]
    return made


@pytest.mark.check(37)
def test_amplification(guarded: Guarded, count: Count) -> None:
    headers, times = {"Authorization": "Bearer alpha"}, []
    cases = bodies()
    assert len(cases) >= 60
    for name, data in cases:
        began = time.monotonic()
        response = requests.post(f"{guarded.url}/v1/chat/completions", data=data, headers=headers, timeout=30)
        times.append(time.monotonic() - began)
        assert 400 <= response.status_code < 500, (name, response.status_code, response.text[:300])
        assert len(response.content) < 4096
    assert statistics.median(times) < 0.1
    count(
        len(cases),
        f"median {statistics.median(times) * 1e3:.0f} ms, slowest {max(times) * 1e3:.0f} ms (megabytes of body)",
    )


def raw(url: str, data: bytes, seconds: float = 5) -> bytes:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), seconds) as connection, contextlib.suppress(OSError):
        connection.sendall(data)
        return connection.recv(4096)
    return b""


@pytest.mark.check(37)
@pytest.mark.parametrize(
    ("name", "head", "status"),
    [
        ("a long name", b"a" * 70_000 + b": b\r\n", b"431"),
        ("a long value", b"a: " + b"b" * 70_000 + b"\r\n", b"431"),
        ("many", b"".join(b"a%d: b\r\n" % i for i in range(10_000)), b"431"),
        ("101", b"".join(b"a%d: b\r\n" % i for i in range(101)), b"431"),
        ("no end", b"a: " + b"b" * 200_000, b"431"),
        ("no HTTP", b"\xff\xff: \0\r\n", b"400"),
    ],
)
def test_headers(guarded: Guarded, name: str, head: bytes, status: bytes, count: Count) -> None:
    began = time.monotonic()
    found = raw(guarded.url, b"GET /livez HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n")
    assert found.split(b" ")[1] == status, found
    assert b'"error"' in found
    count(1, f"{name}: {(time.monotonic() - began) * 1e3:.0f} ms")


@pytest.mark.check(37)
@pytest.mark.parametrize(
    "start",
    [
        b"POST /v1/chat/completions HTTP/1.1\r\nHost:",
        b"POST /v1/chat/completions HTTP/1.1\r\nx-api-key: alpha\r\nContent-Length: 99\r\n\r\n{",
    ],
    ids=["headers", "body"],
)
def test_slow_requests_end(guarded: Guarded, start: bytes, count: Count) -> None:
    host, port = guarded.url.removeprefix("http://").split(":")
    began = time.monotonic()
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(start)
        answer = connection.recv(4096)
        if b"}" not in answer:
            answer += connection.recv(4096)
    took = time.monotonic() - began
    assert answer.split(b" ")[1] == b"408"
    assert b"request_too_slow" in answer
    assert 2.5 < took < 4
    count(1, f"{took:.1f} s; limit 3 s")


@pytest.mark.check(39)
def test_noise_on_the_wire(guarded: Guarded, count: Count) -> None:
    """Requests with bytes changed, doubled and cut: never a 5xx, and the server answers on."""
    total, rng = scaled(20_000, 300), random.Random(SEED)
    body = json.dumps({"messages": [HI], "max_tokens": 1}).encode()
    good = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nx-api-key: alpha\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        % len(body)
    )
    statuses: dict[bytes, int] = {}
    for _ in range(total):
        data = bytearray(good + body)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(data))
            match rng.randrange(4):
                case 0:
                    data[at] = rng.randrange(256)
                case 1:
                    del data[at : at + rng.randrange(8)]
                case 2:
                    data[at:at] = rng.choice(
                        [
                            b"\r\n",
                            b"\0",
                            b"Transfer-Encoding: chunked\r\n",
                            b"\xff",
                            b"Content-Length: 3\r\n",
                            b"ffffffffffff\r\n",
                        ]
                    )
                case _:
                    data += data[:at]
        try:
            answer = raw(guarded.url, bytes(data), 0.2)
        except OSError:
            answer = b""
        status = answer.split(b" ")[1] if answer.startswith(b"HTTP/1.1 ") else b""
        assert not status.startswith(b"5"), (bytes(data), answer)
        statuses[status] = statuses.get(status, 0) + 1
    assert statuses.get(b"400", 0) > 0
    assert guarded.post({"messages": [HI]}).status_code == 200
    count(total, ", ".join(f"{k.decode() or 'closed'}: {v}" for k, v in sorted(statuses.items())))


SMUGGLED = [
    b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /livez HTTP/1.1\r\nHost: x\r\n\r\n",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcde",
    b"Content-Length: +4\r\n\r\nabcd",
    b"Content-Length: -1\r\n\r\n",
    b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\nx\r\n",
]


@pytest.mark.check(39)
def test_smuggling(guarded: Guarded, count: Count) -> None:
    for tail in SMUGGLED:
        answer = raw(guarded.url, b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nx-api-key: alpha\r\n" + tail)
        assert answer.split(b" ")[1:2] in ([b"400"], []), (tail, answer)
        assert answer.count(b"HTTP/1.1") <= 1
    count(len(SMUGGLED))


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.check(39)
@pytest.mark.parametrize("extra", ["request", "noise", "late request", "late noise"])
def test_what_is_sent_ahead_gets_no_answer(guarded: Guarded, extra: str, count: Count) -> None:
    """The answer at hand is complete and the connection's last; nothing is written into it."""
    body = json.dumps({"messages": [HI], "max_tokens": 60, "ignore_eos": True, "stream": True}).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nx-api-key: alpha\r\nContent-Length: %d\r\n\r\n" % len(
        body
    )
    more = request + body if extra.endswith("request") else b"\0\xff\r\n\r\n"
    host, port = guarded.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        if extra.startswith("late"):
            connection.sendall(request + body)
            assert connection.recv(8) == b"HTTP/1.1"
        connection.sendall(more if extra.startswith("late") else request + body + more)
        answer = read_all(connection)
    assert answer.count(b"HTTP/1.1") == (not extra.startswith("late"))
    assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    count(1)


def test_an_empty_line_after_a_body_is_nothing(guarded: Guarded) -> None:
    body = json.dumps({"messages": [HI], "max_tokens": 8, "ignore_eos": True}).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nx-api-key: alpha\r\nContent-Length: %d\r\n\r\n" % len(
        body
    )
    host, port = guarded.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 10) as connection, connection.makefile("rb") as answers:
        for _ in range(3):
            connection.sendall(request + body)
            connection.sendall(b"\r\n")
            assert answers.readline() == b"HTTP/1.1 200 OK\r\n"
            headers = dict(line.lower().split(b": ", 1) for line in iter(answers.readline, b"\r\n"))
            assert json.loads(answers.read(int(headers[b"content-length"])))["usage"]["completion_tokens"] == 8


def test_a_refused_connection_is_closed(guarded: Guarded) -> None:
    """Also when all of the request had come with what it was refused for, and the client keeps its end open."""
    process = psutil.Process(guarded.process.pid)
    with socket.create_connection(("127.0.0.1", guarded.process.port), 10) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 101 + b"\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 431")
        mine = connection.getsockname()[1]
        deadline = time.monotonic() + 5
        while any(c.raddr and c.raddr.port == mine for c in process.net_connections("tcp")):
            assert time.monotonic() < deadline, "the server keeps its end open"
            time.sleep(0.05)


SSTI = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'].system('id') }}",
    "{{ self._TemplateReference__context }}",
    "{{ messages.__class__.__base__ }}",
    "{{ ''|attr('__class__') }}",
    "{% for i in range(10000000) %}{{ 'x' * 1000 }}{% endfor %}",
    "{{ 'x' * 100000000000 }}",
    "{{ messages.append(1) }}",
    "{% import 'os' as os %}",
    "{% include '/etc/passwd' %}",
]


@pytest.mark.parametrize("source", SSTI)
def test_a_hostile_template_gets_nowhere(source: str) -> None:
    """From a checkpoint; a client's own is refused outright."""
    began = time.monotonic()
    text = ""
    with contextlib.suppress(RequestError, CheckpointError):
        text = ChatTemplate(source, Shield([])).render([HI]).text
    assert "uid=" not in text
    assert "subclass" not in text
    assert "root:" not in text
    assert time.monotonic() - began < 15
