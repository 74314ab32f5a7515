"""Errors as OpenAI's clients expect them; the one place that maps our exceptions to HTTP."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from sightline.errors import EngineDeadError, OverloadedError, ReplicaDeadError, RequestError


def error_body(error: Exception) -> dict[str, Any]:
    """{"error": {message, type, param, code}}; what is not meant for clients reads the same for all."""
    match error:
        case RequestError():
            fields = (error.message, error.type, error.param, error.code)
        case OverloadedError():
            kind = "rate_limit_exceeded" if error.status == 429 else "server_error"
            fields = (error.message, kind, None, error.code)
        case EngineDeadError():
            fields = ("The engine stopped; the server is going down.", "server_error", None, "engine_dead")
        case ReplicaDeadError():
            fields = ("The engine that held this request stopped; send it again.", "server_error", None, "engine_lost")
        case _:
            fields = ("The server had an error while processing your request.", "server_error", None, "internal_error")
    return {"error": dict(zip(("message", "type", "param", "code"), fields, strict=True))}


def error_response(error: Exception) -> JSONResponse:
    """Status and headers: permanent errors say that retrying is useless, passing ones when to retry."""
    headers = {}
    status = 500
    match error:
        case RequestError():
            status = error.status
            headers["x-should-retry"] = "false"
            if status == 401:
                headers["www-authenticate"] = "Bearer"
        case OverloadedError():
            status = error.status
            headers["retry-after"] = str(error.retry_after)
        case EngineDeadError():
            status = 503
            headers["retry-after"] = "30"
        case ReplicaDeadError():
            status = 503
            headers["retry-after"] = "1"
    return JSONResponse(error_body(error), status, headers)
