"""GET /: a page to try the model with, and what it is made of. It calls public endpoints only, and nothing elsewhere."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, JSONResponse, Response

import sightline
from sightline import demo
from sightline.errors import NotFoundError
from sightline.server.lifecycle import Lifecycle

router = APIRouter(include_in_schema=False)

_HERE = Path(__file__).parent
_SAMPLES = sorted(demo.sample_path("").glob("*.*"))
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".jpg": "image/jpeg",
}
_FILES = {f"/playground/{path.name}": path for path in _HERE.iterdir() if path.suffix in _TYPES} | {
    f"/playground/samples/{path.name}": path for path in _SAMPLES
}
# Nothing secret: what needs a key is what the page calls.
OPEN_PATHS = frozenset({"/", *_FILES})

_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


@router.get("/")
async def root(request: Request) -> Response:
    """The page for browsers; for others, where to find what."""
    headers = {"vary": "accept"}
    if _enabled(request) and "text/html" in request.headers.get("accept", ""):
        return _file(_HERE / "index.html", headers)
    links = {"docs": "/docs", "openapi": "/openapi.json", "models": "/v1/models", "ready": "/readyz"}
    return JSONResponse({"name": "sightline", "version": sightline.__version__, **links}, headers=headers)


@router.get("/playground/{name:path}")
async def file(request: Request, name: str) -> Response:
    """What the page is made of, and the sample pictures."""
    path = _FILES.get(f"/playground/{name}")
    if path is None or not _enabled(request):
        raise NotFoundError(f"Unknown URL: GET {request.url.path[:200]}.", code="unknown_url")
    return _file(path)


def _enabled(request: Request) -> bool:
    lifecycle: Lifecycle = request.app.state.lifecycle
    return lifecycle.config.enable_playground


def _file(path: Path, headers: dict[str, str] | None = None) -> Response:
    return FileResponse(path, media_type=_TYPES[path.suffix], headers={**_HEADERS, **(headers or {})})
