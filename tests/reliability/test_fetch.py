"""The picture fetcher before hostile URLs, hosts and resolvers, with the wall clock beside the limit."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from sightline.errors import ImageError
from sightline.prompt import media
from sightline.prompt.media import MediaLimits, MediaLoader
from tests.prompt.test_media import HOSTILE
from tests.reliability.conftest import Guarded
from tests.reliability.hostile import HABITS, SLOW, HostileHost, answer, redirect
from tests.scorecard import SEED, scaled
from tests.server.conftest import ask

Count = Callable[..., None]
OPEN = MediaLimits(allow_private=True, timeout=1.0, max_image_bytes=1_000_000)


def refusal(url: str, limits: MediaLimits) -> tuple[ImageError, float]:
    async def run() -> None:
        loader = MediaLoader(limits)
        try:
            await loader.load(url, bytes, "here")
        finally:
            await loader.close()

    began = time.monotonic()
    with pytest.raises(ImageError) as caught:
        asyncio.run(run())
    message = caught.value.message
    assert 400 <= caught.value.status < 500
    assert "127.0.0.1" not in message
    assert "/etc" not in message
    return caught.value, time.monotonic() - began


@pytest.fixture
def dialled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses that were dialled; nothing is."""
    found: list[str] = []

    async def connect(self: Any, host: str, *args: Any, **options: Any) -> Any:
        found.append(host)
        raise OSError("no network here")

    monkeypatch.setattr(media.httpcore2.AnyIOBackend, "connect_tcp", connect)
    return found


@pytest.mark.check(27)
def test_ssrf_matrix(dialled: list[str], count: Count) -> None:
    for url in HOSTILE:
        refusal(url.format(p=8080), MediaLimits())
    assert dialled == []
    count(len(HOSTILE))


@pytest.mark.check(27)
def test_the_host_checked_is_the_host_dialled(
    dialled: list[str], monkeypatch: pytest.MonkeyPatch, count: Count
) -> None:
    """Generated URLs: whatever is dialled is what one allowed name resolved to."""
    asked: list[str] = []

    def resolve(host: str, *args: Any, **options: Any) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 80))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    rng = random.Random(SEED)
    pieces = [
        "allowed.example",
        "evil.example",
        "127.0.0.1",
        "@",
        "\\",
        "#",
        "?",
        "/",
        ":",
        "%40",
        "%2f",
        "%5c",
        "①",
        ".",
        "[::1]",
        ";",
        "\t",
        " ",
    ]
    limits = MediaLimits(allowed_domains=frozenset({"allowed.example"}))
    total = scaled(10_000)
    for _ in range(total):
        refusal("http://" + "".join(rng.choices(pieces, k=rng.randint(1, 6))), limits)
    assert {name.removesuffix(".") for name in asked} <= {"allowed.example"}
    assert set(dialled) <= {"93.184.216.34"}
    assert asked, "no generated URL was allowed at all"
    count(total, f"{len(asked)} allowed")


@pytest.mark.check(28)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_off_the_allow_list(status: int, count: Count) -> None:
    targets = [
        "http://localhost:{p}/sink",
        "http://127.0.0.2:{p}/sink",
        "//localhost:{p}/sink",
        "http://user@127.0.0.1:{p}/sink",
    ]
    limits = MediaLimits(allow_private=True, timeout=1.0, allowed_domains=frozenset({"127.0.0.1"}))
    for target in targets:
        routes: dict[str, Any] = {"sink": answer(b"x")}
        with HostileHost(routes) as host:
            routes["go"] = redirect(target.format(p=host.port), status)
            host._routes["go"] = routes["go"]
            refusal(host.url("go"), limits)
            assert host.asked == ["go"]
    count(len(targets))


@pytest.mark.check(29)
def test_rebinding_resolvers(dialled: list[str], monkeypatch: pytest.MonkeyPatch, count: Count) -> None:
    private = [
        "127.0.0.1",
        "10.0.0.1",
        "169.254.169.254",
        "::1",
        "::ffff:10.0.0.1",
        "fe80::1",
        "fc00::1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "0.0.0.0",
    ]
    for address in private:
        answers = iter([["93.184.216.34"], [address]])
        monkeypatch.setattr(
            socket, "getaddrinfo", lambda *a, answers=answers, **o: [(2, 1, 6, "", (x, 80)) for x in next(answers)]
        )
        refusal("http://rebinding.example/x.png", MediaLimits())
        assert dialled == ["93.184.216.34"]
        dialled.clear()
        monkeypatch.setattr(
            socket,
            "getaddrinfo",
            lambda *a, address=address, **o: [(2, 1, 6, "", (x, 80)) for x in ("93.184.216.34", address)],
        )
        assert refusal("http://mixed.example/x.png", MediaLimits())[0].status == 403
        assert dialled == []
    many = [(2, 1, 6, "", (f"93.184.{i // 250}.{i % 250}", 80)) for i in range(1000)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **o: many)
    _, took = refusal("http://many.example/x.png", OPEN)
    assert took < 1.5
    count(2 * len(private) + 1)


@pytest.mark.check(30)
@pytest.mark.parametrize("habit", SLOW)
def test_the_limit_is_wall_clock(habit: str, count: Count) -> None:
    with HostileHost(HABITS) as host:
        error, took = refusal(host.url(habit), OPEN)
        assert error.code == "failed_to_download_image"
        assert took < 1.5
        assert len(host.asked) == 1, "it was tried again"
    count(1, f"{habit}: {took:.2f} s; limit 1 s")


@pytest.mark.check(30)
@pytest.mark.parametrize("what", ["TLS that never answers", "a resolver that never answers"])
def test_the_limit_covers_what_comes_before_http(what: str, monkeypatch: pytest.MonkeyPatch, count: Count) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x.png"
        if what.startswith("TLS"):
            # The kernel accepts the connection; nobody says a word on it.
            url = url.replace("http:", "https:")
        else:
            monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **o: time.sleep(2.5) or [])
        _, took = refusal(url, OPEN)
    assert 0.9 < took < 1.5
    count(1, f"{what}: {took:.2f} s; limit 1 s")


@pytest.mark.check(31)
@pytest.mark.parametrize(
    "habit", ["endless", "gzip bomb", "gzip thrice", "declared huge", "1 MB header", "longer than declared"]
)
def test_the_limit_is_bytes(habit: str, count: Count) -> None:
    memory = psutil.Process().memory_info().rss
    with HostileHost(HABITS) as host:

        async def load() -> bytes:
            loader = MediaLoader(OPEN)
            try:
                return await loader.load(host.url(habit), bytes)
            finally:
                await loader.close()

        if habit == "longer than declared":
            assert asyncio.run(load()) == b"x" * 10
        else:
            refusal(host.url(habit), OPEN)
    growth = (psutil.Process().memory_info().rss - memory) / 1e6
    assert growth < 10 + 2 * OPEN.max_image_bytes / 1e6
    count(1, f"{habit}: +{growth:.0f} MB; limit 1 MB a picture")


@pytest.mark.check(27)
def test_no_proxy_of_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch, count: Count) -> None:
    """A proxy would resolve the name itself, past every check here."""
    routes: dict[str, Any] = {"picture": answer(b"picture")}
    with HostileHost(routes) as proxy, HostileHost(routes) as host:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")

        async def load() -> bytes:
            loader = MediaLoader(OPEN)
            try:
                return await loader.load(host.url("picture"), bytes)
            finally:
                await loader.close()

        assert asyncio.run(load()) == b"picture"
        assert (host.asked, proxy.asked) == (["picture"], [])
    count(4)


NO_OPEN = """
import asyncio, os, sys
from sightline.errors import ImageError
from sightline.prompt.media import MediaLimits, MediaLoader
opened = []
sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" and watch else None)
watch = False
async def main(fifo):
    global watch
    loader, answers = MediaLoader(MediaLimits()), set()
    paths = ["/etc/passwd", "etc/passwd", "../../etc/passwd", "~/x", "/dev/zero", fifo, "file:///etc/passwd", "file:/etc/passwd",
             "FILE:///etc/passwd", "file://localhost/etc/passwd", "file:///dev/zero", "file://" + fifo, "\\\\\\\\host\\\\share", "C:\\\\x"]
    for path in paths:
        watch = True
        try:
            await loader.load(path, bytes)
        except ImageError as error:
            answers.add((error.status, error.code))
        watch = False
    print(len(paths), sorted(answers), [o for o in opened if isinstance(o, str) and not o.startswith(sys.prefix)])
asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.check(32)
def test_no_file_is_opened(tmp_path: Any, count: Count) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    result = subprocess.run(
        [sys.executable, "-c", NO_OPEN, str(fifo)], capture_output=True, text=True, timeout=30, check=True
    )
    cases, rest = result.stdout.split(" ", 1)
    assert rest.strip() == "[(400, 'invalid_image_url'), (403, 'invalid_image_url')] []", (
        "one answer each for paths and for file:"
    )
    count(int(cases))


@pytest.mark.check(31)
@pytest.mark.check(30)
def test_every_habit_is_a_4xx_of_the_server(guarded: Guarded, count: Count) -> None:
    habits = [name for name in HABITS if name != "longer than declared"]
    slowest = 0.0
    with HostileHost(HABITS) as host:
        for habit in habits:
            began = time.monotonic()
            response = guarded.post({"messages": ask({"type": "image_url", "image_url": {"url": host.url(habit)}})})
            slowest = max(slowest, time.monotonic() - began)
            assert 400 <= response.status_code < 500, (habit, response.text)
            assert len(response.content) < 4096
            assert not any(word in response.text for word in ("127.0.0.1", "0x", "/etc", "Traceback", ".py"))
        assert slowest < 1.5
    count(len(habits), f"slowest {slowest:.2f} s; limit 1 s")
