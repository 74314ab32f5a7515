"""The ASGI application: routes, error mapping, and the edge that every request passes."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
import uuid
from urllib.parse import quote

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sightline import __version__
from sightline.errors import EngineError, NotFoundError, OverloadedError, RequestError
from sightline.logging import Fields
from sightline.prompt.caller import set_caller
from sightline.server import (
    chat,
    completions,
    metrics,
    native,
    openapi,
    playground,
    preview,
    probes,
    responses,
    tokenize,
)
from sightline.server.admission import Call, Outcome, note, outcome_of, reason_of
from sightline.server.errors import error_response
from sightline.server.lifecycle import Lifecycle
from sightline.server.tracing import Trace

logger = logging.getLogger("sightline.server")
access = logging.getLogger("sightline.access")

MODULES = (probes, metrics, chat, completions, responses, tokenize, preview, native, openapi, playground)
# Asked every few seconds by machines: no line for each.
_QUIET_PATHS = probes.OPEN_PATHS | playground.OPEN_PATHS | {metrics.PATH}
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:\-]{1,128}\Z")


def create_app(lifecycle: Lifecycle) -> ASGIApp:
    """The application over a lifecycle, whose loading somebody else drives."""
    app = FastAPI(
        title="sightline",
        version=__version__,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        # Its own would record bodies that do not parse; `tracing.py` knows more and tells less.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.lifecycle = lifecycle
    app.state.exchanges = {}
    for module in MODULES:
        app.include_router(module.router)
    openapi.install(app)
    for kind in (RequestError, OverloadedError, EngineError):
        app.add_exception_handler(kind, _on_known_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_unknown_error)
    edge = Edge(app, lifecycle)
    origins = lifecycle.config.allowed_origins
    if not origins:
        return edge
    # In front of the keys: a browser asks without one whether it may ask.
    return CORSMiddleware(
        edge,
        allow_origins=origins,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "openai-processing-ms", "retry-after", "x-should-retry"],
    )


async def _on_known_error(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, EngineError):
        logger.error("a request failed in the engine: %s", error)
    note(error)
    return error_response(error)


async def _on_unknown_error(request: Request, error: Exception) -> JSONResponse:
    # The edge logs it: starlette raises it again after this answer.
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    message = f"{request.method} is not allowed for {path}." if error.status_code == 405 else str(error.detail)
    known = RequestError(message, code="method_not_allowed", status=error.status_code)
    if error.status_code == 404:
        meant = _meant(request.app, path)
        hint = f"; did you mean {meant}?" if meant else "."
        known = NotFoundError(f"Unknown URL: {request.method} {path}{hint}", code="unknown_url")
    note(known)
    response = error_response(known)
    response.headers.update(error.headers or {})
    return response


def _meant(app: FastAPI, path: str) -> str | None:
    """The path of a route that a base URL without its /v1, or with it twice, misses."""
    known = (each for each in app.openapi()["paths"] if each.startswith("/v1/"))
    return next((each for each in known if each.endswith(path) or path.endswith(each)), None)


class Edge:
    """Request ids, timing, keys, the readiness gate, admission and the body limits, in one pass and before any route."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle) -> None:
        self._app = app
        self._lifecycle = lifecycle
        self._max_body = int(lifecycle.config.max_body_mb * 1e6)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            # There are no WebSockets here.
            return
        started = time.monotonic()
        # "/v1//models" comes from base URLs that end in a slash.
        path = re.sub("/{2,}", "/", scope["path"]).rstrip("/") or "/"
        # The connection leaves the body of an answer to HEAD out.
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        scope = {**scope, "method": method, "path": path, "raw_path": path.encode()}
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")
        if not _SANE_REQUEST_ID.match(request_id):
            request_id = f"req-{uuid.uuid4().hex}"
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                milliseconds = str(int((time.monotonic() - started) * 1e3))
                extra = [
                    (b"x-request-id", request_id.encode()),
                    (b"openai-processing-ms", milliseconds.encode()),
                    (b"openai-version", b"2020-10-01"),
                ]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        call = Call(self._lifecycle.admission)
        try:
            if path in probes.OPEN_PATHS or path in playground.OPEN_PATHS:
                await self._app(scope, receive, send_with_headers)
            else:
                await self._admitted(call, scope, headers, receive, send_with_headers)
        except ClientDisconnect:
            logger.info("%s: the client went away before its request was complete", request_id)
        except Exception as error:
            if not isinstance(error, RequestError | OverloadedError):
                logger.exception("request %s failed", request_id)
            if status:
                return
            await error_response(error)(scope, receive, send_with_headers)
        finally:
            traced = {}
            if call.trace is not None:
                traced = {"trace": call.trace.id}
                self._end_trace(call.trace, call, scope, status)
            level = logging.DEBUG if path in _QUIET_PATHS else logging.INFO
            if access.isEnabledFor(level):
                fields = {"request_id": request_id, "method": scope["method"], "path": quote(path[:200])}
                total = round((time.monotonic() - started) * 1e3)
                access.log(
                    level, "%s", Fields({**fields, "status": status, **call.fields, "total_ms": total, **traced})
                )

    def _end_trace(self, trace: Trace, call: Call, scope: Scope, status: int) -> None:
        # The route's own path: what a client makes up is no name.
        route = getattr(scope.get("route"), "path", None)
        failed = call.error is not None and outcome_of(call.error) is Outcome.FAILED
        trace.end(
            f"{scope['method']} {route}" if route else scope["method"],
            {
                "http.request.method": scope["method"],
                "http.route": route,
                "http.response.status_code": status or 499,
                "error.type": None if call.error is None else reason_of(call.error),
                "gen_ai.response.model": self._lifecycle.model_name,
                "gen_ai.response.id": call.fields.get("id"),
                "gen_ai.usage.input_tokens": call.fields.get("in"),
                "gen_ai.usage.output_tokens": call.fields.get("out"),
                "gen_ai.response.finish_reasons": [str(call.fields["finish"])] if call.fields.get("finish") else None,
                "sightline.cached_tokens": call.fields.get("cached"),
                "sightline.pictures": call.fields.get("images"),
            },
            failed=failed,
        )

    async def _admitted(
        self, call: Call, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send
    ) -> None:
        admission = self._lifecycle.admission
        try:
            call.salt, call.is_admin = self._lifecycle.keys.open(headers)
        except RequestError as error:
            admission.reasons[reason_of(error)] += 1
            raise
        call.timeout = _timeout(headers)
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            if scope["path"] != metrics.PATH:
                self._lifecycle.require_ready()
            set_caller(call)
            await self._app(scope, receive, send)
            return
        if self._lifecycle.tracing is not None:
            call.follow(self._lifecycle.tracing.begin(headers))
        with admission.call(call):
            self._lifecycle.require_ready()
            if not call.is_admin:
                admission.require_room()
            await self._app(scope, self._limited(receive, headers, call), send)

    def _limited(self, receive: Receive, headers: dict[bytes, bytes], call: Call) -> Receive:
        """`receive` with the limits on a body: its size, its time, and the bytes of all calls together."""
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise RequestError(
                "Packed bodies are not read; send the request without content-encoding.",
                param="content-encoding",
                status=415,
            )
        declared = headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > self._max_body:
            raise self._body_too_large()
        loop = asyncio.get_running_loop()
        seconds = self._lifecycle.config.client_timeout
        deadline: float | None = loop.time() + seconds

        async def limited() -> Message:
            nonlocal deadline
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                raise RequestError(
                    f"The body did not arrive within {seconds:g} seconds.", code="request_too_slow", status=408
                ) from error
            if message["type"] == "http.request":
                call.hold(len(message.get("body", b"")))
                if deadline is not None and call.num_bytes > self._max_body:
                    raise self._body_too_large()
                if not message.get("more_body"):
                    deadline = None
            return message

        return limited

    def _body_too_large(self) -> RequestError:
        limit = self._max_body / 1e6
        return RequestError(
            f"The body is larger than {limit:g} MB; send fewer or smaller images, or URLs.",
            code="request_too_large",
            status=413,
        )


def _timeout(headers: dict[bytes, bytes]) -> float:
    """`x-request-timeout`: the client's own deadline, which can only shorten the server's."""
    given = headers.get(b"x-request-timeout")
    if given is None:
        return math.inf
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise RequestError("x-request-timeout must be a number of seconds above 0.", param="x-request-timeout")
    return seconds
