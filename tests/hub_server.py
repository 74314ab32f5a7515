"""A stand-in for the model hub on the loopback: the few answers that huggingface_hub's snapshot_download asks for."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves `files` as the model `owner/tiny`; `owner/gated` is gated, `owner/broken` has no weights.

    stall: (file, bytes): send so much of that file and then nothing, until `release` is set. cut: the same, but close the
    connection, once.
    ranges: first byte of every partial request.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.repos = {"owner/tiny": files, "owner/broken": {k: v for k, v in files.items() if "safetensors" not in k}}
        self.stall: tuple[str, int] | None = None
        self.cut: tuple[str, int] | None = None
        self.stalled = threading.Event()
        self.release = threading.Event()
        self.requests: list[str] = []
        self.ranges: list[int] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.release.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        """One request."""
        path = request.path.partition("?")[0]
        self.requests.append(f"{request.command} {path}")
        if match := re.fullmatch(r"/api/models/(owner/[\w-]+)(?:/(revision|tree)/(\w+))?", path):
            repo, kind, revision = match.groups()
            if repo == "owner/gated":
                self._error(request, 403, "GatedRepo")
            elif repo not in self.repos:
                self._error(request, 404, "RepoNotFound")
            elif revision not in (None, "main", COMMIT):
                self._error(request, 404, "RevisionNotFound")
            else:
                self._json(request, self._tree(repo) if kind == "tree" else self._info(repo))
        elif match := re.fullmatch(r"/(owner/[\w-]+)/resolve/\w+/(.+)", path):
            self._file(request, match[2], self.repos[match[1]][match[2]], body)
        else:
            self._error(request, 404, "RepoNotFound")

    def _info(self, repo: str) -> dict[str, Any]:
        siblings = [
            {"rfilename": name, "size": len(data), "blobId": _oid(data)} for name, data in self.repos[repo].items()
        ]
        return {"id": repo, "modelId": repo, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}

    def _tree(self, repo: str) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
            for name, data in self.repos[repo].items()
        ]

    def _file(self, request: BaseHTTPRequestHandler, name: str, data: bytes, body: bool) -> None:
        first = 0
        if span := request.headers.get("Range"):
            first = int(span.removeprefix("bytes=").partition("-")[0])
            self.ranges.append(first)
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        else:
            request.send_response(200)
        request.send_header("ETag", f'"{_oid(data)}"')
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("Accept-Ranges", "bytes")
        request.send_header("Content-Length", str(len(data) - first))
        request.end_headers()
        if not body:
            return
        limit = self.stall or self.cut
        if limit is not None and limit[0] == name:
            request.wfile.write(data[first : limit[1]])
            request.wfile.flush()
            self.stalled.set()
            if self.stall is not None:
                self.release.wait(60)
            self.cut = None
            request.close_connection = True
            return
        request.wfile.write(data[first:])

    def _json(self, request: BaseHTTPRequestHandler, value: Any) -> None:
        data = json.dumps(value).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def _error(self, request: BaseHTTPRequestHandler, status: int, code: str) -> None:
        request.send_response(status)
        request.send_header("X-Error-Code", code)
        request.send_header("X-Error-Message", code)
        request.send_header("Content-Length", "0")
        request.end_headers()


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
