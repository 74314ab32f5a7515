"""The ASGI application: routes, error mapping, and the edge that every request passes."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import uuid

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sightline import __version__
from sightline.errors import EngineError, NotFoundError, OverloadedError, RequestError
from sightline.server import chat, completions, native, openapi, probes, responses, tokenize
from sightline.server.errors import error_response
from sightline.server.lifecycle import Lifecycle

logger = logging.getLogger("sightline.server")

MODULES = (probes, chat, completions, responses, tokenize, native, openapi)
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:\-]{1,128}\Z")


def create_app(lifecycle: Lifecycle) -> ASGIApp:
    """The application over a lifecycle, whose loading somebody else drives."""
    app = FastAPI(title="sightline", version=__version__, redirect_slashes=False, docs_url=None, redoc_url=None)
    app.state.lifecycle = lifecycle
    app.state.exchanges = {}
    for module in MODULES:
        app.include_router(module.router)
    openapi.install(app)
    for kind in (RequestError, OverloadedError, EngineError):
        app.add_exception_handler(kind, _on_known_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_unknown_error)
    return Edge(app, lifecycle)


async def _on_known_error(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, EngineError):
        logger.error("a request failed in the engine: %s", error)
    return error_response(error)


async def _on_unknown_error(request: Request, error: Exception) -> JSONResponse:
    # The edge logs it: starlette raises it again after this answer.
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    if error.status_code == 404:
        return error_response(NotFoundError(f"Unknown URL: {request.method} {path}.", code="unknown_url"))
    message = f"{request.method} is not allowed for {path}." if error.status_code == 405 else str(error.detail)
    response = error_response(RequestError(message, code="method_not_allowed", status=error.status_code))
    response.headers.update(error.headers or {})
    return response


class Edge:
    """Request ids, timing, keys, the readiness gate and the body limit, in one pass and before any route."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle) -> None:
        self._app = app
        self._lifecycle = lifecycle
        self._keys = [_digest(key.encode()) for key in lifecycle.config.api_key]
        self._max_body = int(lifecycle.config.max_body_mb * 1e6)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        # "/v1//models" comes from base URLs that end in a slash.
        path = re.sub("/{2,}", "/", scope["path"])
        scope = {**scope, "path": path, "raw_path": path.encode()}
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")
        if not _SANE_REQUEST_ID.match(request_id):
            request_id = f"req-{uuid.uuid4().hex}"
        response_started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal response_started
            if message["type"] == "http.response.start":
                response_started = True
                milliseconds = str(int((time.monotonic() - started) * 1e3))
                extra = [
                    (b"x-request-id", request_id.encode()),
                    (b"openai-processing-ms", milliseconds.encode()),
                    (b"openai-version", b"2020-10-01"),
                ]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        try:
            if path not in probes.OPEN_PATHS:
                self._authorize(headers.get(b"authorization", b""))
                self._lifecycle.require_ready()
            await self._app(scope, self._limited(receive, headers), send_with_headers)
        except Exception as error:
            if not isinstance(error, RequestError | OverloadedError):
                logger.exception("request %s failed", request_id)
            if response_started:
                return
            await error_response(error)(scope, receive, send_with_headers)

    def _authorize(self, header: bytes) -> None:
        if not self._keys:
            return
        scheme, _, token = header.partition(b" ")
        digest = _digest(token.strip())
        # Every key is compared, so that time tells nothing about which one matched.
        matches = [hmac.compare_digest(digest, key) for key in self._keys]
        if scheme.lower() != b"bearer" or not any(matches):
            raise RequestError(
                "Incorrect API key provided. Send one of the server's keys as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                status=401,
            )

    def _limited(self, receive: Receive, headers: dict[bytes, bytes]) -> Receive:
        declared = headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > self._max_body:
            raise self._body_too_large()
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                if size > self._max_body:
                    raise self._body_too_large()
            return message

        return limited

    def _body_too_large(self) -> RequestError:
        limit = self._max_body / 1e6
        return RequestError(
            f"The body is larger than {limit:g} MB; send fewer or smaller images, or URLs.",
            code="request_too_large",
            status=413,
        )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
