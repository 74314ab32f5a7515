"""A picture host with every bad habit, on loopback, in threads."""

from __future__ import annotations

import contextlib
import gzip
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Self

Script = Callable[[socket.socket, "HostileHost"], None]


def answer(body: bytes, head: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {head}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def drip(connection: socket.socket, host: HostileHost) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    host.drip(connection, b"x")


def drip_headers(connection: socket.socket, host: HostileHost) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    host.drip(connection, b"X-A: b\r\n")


def silence(connection: socket.socket, host: HostileHost) -> None:
    host.closed.wait(60)


def endless(connection: socket.socket, host: HostileHost) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while not host.closed.is_set():
        connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")


def reset(connection: socket.socket, host: HostileHost) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nxxx")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def redirect(target: str, status: int = 302) -> bytes:
    return answer(b"", f"{status} Go", f"Location: {target}", "Connection: close")


BOMB = gzip.compress(bytes(20_000_000))
SLOW: dict[str, Script] = {"drip": drip, "drip of headers": drip_headers, "silence": silence}
# Path -> what it does; every one must be a 4xx.
HABITS: dict[str, bytes | Script] = {
    **SLOW,
    "endless": endless,
    "reset": reset,
    "longer than declared": answer(b"x" * 10) + b"y" * 100,
    "declared huge": b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\nx",
    "shorter than declared": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\nConnection: close\r\n\r\nx",
    "gzip bomb": answer(BOMB, "200 OK", "Content-Encoding: gzip"),
    "gzip thrice": answer(BOMB, "200 OK", "Content-Encoding: gzip, gzip, gzip"),
    "1 MB header": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n",
    "no status line": b"hello\r\n\r\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.0\r\n",
    "HTML": answer(b"<html>not found</html>"),
    "204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "206": answer(b"xx", "206 Partial Content"),
    "304": b"HTTP/1.1 304 Not Modified\r\n\r\n",
    "401 with a body": answer(b"x" * 3_000_000, "401 No"),
    "circle": redirect("/circle"),
    "to metadata": redirect("http://169.254.169.254/latest/meta-data/"),
    "to a file": redirect("file:///etc/passwd"),
    "to gopher": redirect("gopher://127.0.0.1/"),
    "to credentials": redirect("http://user:word@127.0.0.1/"),
    "to nowhere": redirect("http://a b/"),
}


class HostileHost:
    """Serves `routes` by path (a name of HABITS, spaces as dashes); remembers what it was asked and which peers left."""

    def __init__(self, routes: dict[str, bytes | Script]) -> None:
        self._routes = {name.replace(" ", "-"): what for name, what in routes.items()}
        self.closed = threading.Event()
        self.asked: list[str] = []
        self.open = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.port = self._listener.getsockname()[1]

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closed.set()
        self._listener.close()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{name.replace(' ', '-')}"

    def drip(self, connection: socket.socket, data: bytes) -> None:
        while not self.closed.wait(0.1):
            connection.sendall(data)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        self.open += 1
        try:
            with connection:
                path = connection.recv(65536).split(b" ")[1].decode("latin-1").lstrip("/").partition("?")[0]
                self.asked.append(path)
                what = self._routes.get(path, answer(b"", "404 No"))
                if not callable(what):
                    connection.sendall(what)
                elif what is silence:
                    # Until the peer leaves: that it leaves is what some tests wait for.
                    connection.settimeout(0.05)
                    while not self.closed.is_set():
                        with contextlib.suppress(TimeoutError):
                            if not connection.recv(1):
                                break
                else:
                    what(connection, self)
        except (OSError, IndexError):
            time.sleep(0)
        finally:
            self.open -= 1
