"""Server-sent events, and answers that end when the client goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import ExitStack, aclosing
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sightline.server.admission import ClientGone as ClientGone
from sightline.server.admission import note

T = TypeVar("T")
_encode = msgspec.json.Encoder().encode


async def until_client_goes(receive: Callable[[], Awaitable[Any]], work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects. Raises `ClientGone` then."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(gone())
    try:
        await asyncio.wait([task, watcher], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


class EventStream(Response):
    """Streams `data:` lines from an async generator of JSON-able objects; None is sent as [DONE].

    resources are closed at the end, also when the generator never ran. named: an `event:` line says each object's type.
    keep_alive: seconds of silence before a comment line; 0 sends none.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[Any], resources: ExitStack, *, named: bool = False, keep_alive: float = 0.0
    ) -> None:
        self.status_code = 200
        self.background = None
        self.body = b""
        self._events = events
        self._resources = resources
        self._named = named
        self._keep_alive = keep_alive
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    def init_headers(self, headers: Any = None) -> None:
        """Without a content length: the end is not known."""
        super().init_headers(headers)
        self.raw_headers = [(k, v) for k, v in self.raw_headers if k != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        sent = loop.time()

        async def write(data: bytes) -> None:
            nonlocal sent
            await send({"type": "http.response.body", "body": data, "more_body": True})
            sent = loop.time()

        async def beat() -> None:
            # Proxies cut what is silent for long.
            while True:
                await asyncio.sleep(sent + self._keep_alive - loop.time())
                if loop.time() - sent >= self._keep_alive:
                    await write(b": keep-alive\n\n")

        async def pump() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            beating = asyncio.ensure_future(beat()) if self._keep_alive else None
            try:
                async with aclosing(self._events) as events:
                    async for event in events:
                        data = b"data: " + (b"[DONE]" if event is None else _encode(event)) + b"\n\n"
                        if self._named:
                            data = b"event: " + event["type"].encode() + b"\n" + data
                        await write(data)
            finally:
                if beating is not None:
                    beating.cancel()
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        with self._resources:
            try:
                await until_client_goes(receive, pump())
            except ClientGone as error:
                note(error)
