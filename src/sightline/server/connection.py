"""HTTP connections with bounds: on headers before a request exists, and on clients that send or read too slowly."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from starlette.responses import JSONResponse
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from sightline.errors import RequestError
from sightline.server.errors import error_body
from sightline.server.limits import MAX_HEADER_BYTES, MAX_HEADERS
from sightline.types import Histogram

# Beyond a client's own time: for the answer 408, and for what was sent while it was refused.
_GRACE = 2.0
_REASONS = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which has no bound of its own on headers and waits for clients as long as they like.

    A client gets `timeout` seconds for its headers, as much for its body, and as much again whenever the answer's
    unsent part has grown to what the transport buffers (64 KiB). It is cut off after that.

    One request at a time: what follows a request before its answer is complete is not read, and that answer is the connection's
    last (RFC 9112, 9.3.2: who sends ahead must be ready to send again). uvicorn would keep such requests and stop reading, and then
    not notice when the client goes.
    """

    timeout = 60.0
    stalls: ClassVar[Histogram] = Histogram()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._header_bytes = 0
        self._in_message = self._in_headers = self._deaf = False
        self._stall: asyncio.TimerHandle | None = None
        self._stalled_since = 0.0
        self._sending = self.loop.call_later(self.timeout, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._sending.cancel()
        self._read_on()
        super().connection_lost(exc)

    def _too_slow(self) -> None:
        if self._in_headers:
            self._refuse(408, "The request came too slowly.", "request_too_slow")
        else:
            self.transport.abort()

    def _await_client(self, seconds: float) -> None:
        self._sending.cancel()
        self._sending = self.loop.call_later(seconds, self._too_slow)

    # -- requests ------------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        if self._is_answering():
            # Some clients end a body with an empty line of their own.
            if data.strip(b"\r\n"):
                self._ignore_the_rest()
            return
        if not self._in_message or self._in_headers:
            self._header_bytes += len(data)
        super().data_received(data)
        # What the parser has not handed on yet, such as half a header, counts too.
        if self._in_headers and self._header_bytes > MAX_HEADER_BYTES:
            self._refuse_headers()

    def _is_answering(self) -> bool:
        return not self._in_message and self.cycle is not None and not self.cycle.response_complete

    def _ignore_the_rest(self) -> None:
        self._deaf = True
        self.cycle.keep_alive = False

    def on_message_begin(self) -> None:
        if self._is_answering():
            self._ignore_the_rest()
        if self._deaf:
            return
        super().on_message_begin()
        self._in_message = self._in_headers = True
        self._size = 0
        self._await_client(self.timeout)

    def on_url(self, url: bytes) -> None:
        if self._deaf:
            return
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._deaf:
            return
        self._count(len(name) + len(value))
        if len(self.headers) >= MAX_HEADERS:
            self._refuse_headers()
        super().on_header(name, value)

    def _count(self, num_bytes: int) -> None:
        self._size += num_bytes
        if self._size > MAX_HEADER_BYTES:
            self._refuse_headers()

    def on_headers_complete(self) -> None:
        if self._deaf:
            return
        self._in_headers = False
        self._header_bytes = 0
        # The application answers a slow body itself.
        self._await_client(self.timeout + _GRACE)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._deaf:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._deaf:
            return
        self._in_message = False
        self._sending.cancel()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "The request is not valid HTTP.", "invalid_http")

    def _refuse_headers(self) -> None:
        self._refuse(431, "The request's headers are too large.", "headers_too_large")

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer without a request, and close when the client has had a moment to read why."""
        if self._is_answering():
            self._ignore_the_rest()
        if self._deaf or self.transport.is_closing():
            return
        self._deaf = True
        body = JSONResponse(error_body(RequestError(message, code=code, status=status))).body
        head = b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        self.transport.write(head % (status, _REASONS[status], len(body)) + bytes(body))
        # Closing at once would reset the connection under what the client still sends, and the answer would be lost.
        self.transport.write_eof()
        self._sending.cancel()
        self._sending = self.loop.call_later(_GRACE, self.transport.abort)

    # -- answers -------------------------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall is None:
            self._stall = self.loop.call_later(self.timeout, self.transport.abort)
            self._stalled_since = self.loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._read_on()

    def _read_on(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
            self.stalls.observe(self.loop.time() - self._stalled_since)


def bounded_protocol(timeout: float, stalls: Histogram) -> type[Any]:
    """The protocol class with a client timeout. stalls: where times are noted that answers waited for slow readers."""
    return type("BoundedProtocol", (BoundedProtocol,), {"timeout": timeout, "stalls": stalls})
