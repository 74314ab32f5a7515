"""The bytes of pictures from outside. The only module that opens a URL.

They come from `data:` URLs, from http(s) through a client that dials only checked addresses, and from local files below one
allowed folder. What they show is `decoder`'s affair.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, unquote_to_bytes

import httpcore2
import httpx2
import msgspec

from sightline.errors import ImageError
from sightline.prompt.addresses import embedded, is_dotted_quad
from sightline.prompt.addresses import is_public as is_public
from sightline.prompt.caller import caller, phase
from sightline.prompt.counters import MediaCounters, PictureStats

T = TypeVar("T")

# Data URLs above this many characters are decoded off the event loop.
_LONG_URL = 1 << 16
_FETCH_ERRORS = (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException, httpx2.InvalidURL,
                 OSError, ValueError)  # fmt: skip
_HEADERS = ((b"Accept", b"image/*"), (b"Accept-Encoding", b"identity"), (b"User-Agent", b"sightline"))
# Spellings of hosts that parsers read differently: refuse instead of guessing.
_ODD_HOST = re.compile(r"[^A-Za-z0-9.\-:_\[\]]")
_NUMERIC_HOST = re.compile(r"^(0x[0-9a-f]*|[0-9]+)(\.(0x[0-9a-f]*|[0-9]+))*\.?$", re.IGNORECASE)


@dataclass(frozen=True)
class MediaLimits:
    """What a client may ask for. Sizes in bytes and pixels, time in seconds of wall clock.

    timeout covers names, connections, headers, bodies and redirects of one picture together. decode_bytes bounds the
    memory of the pictures being decoded at once in this process.
    """

    max_images: int = 16
    max_image_bytes: int = 20 * 1000 * 1000
    max_request_bytes: int = 64 * 1000 * 1000
    max_pixels: int = 36_000_000
    timeout: float = 5.0
    max_redirects: int = 3
    allow_private: bool = False
    allowed_domains: frozenset[str] = frozenset()
    allowed_local_path: Path | None = None
    decode_bytes: int = 512 << 20


class MediaLoader:
    """Gets the encoded bytes of a picture. One for each event loop; `close` when done."""

    def __init__(self, limits: MediaLimits) -> None:
        self.limits = limits
        self.counters = MediaCounters()
        self.stats = PictureStats()
        self._guard = _GuardedBackend(limits.allow_private)
        self._pool: httpcore2.AsyncConnectionPool | None = None

    async def load(self, url: str, read: Callable[[bytes], T], param: str | None = None) -> T:
        """What `read` makes of the encoded bytes of `url`, off the event loop where they are many. Raises `ImageError` naming
        `param` and what to do."""
        scheme = url[:16].partition(":")[0].lower()
        source = scheme if scheme in ("data", "http", "https", "file") else "other"
        result = "cancelled"
        try:
            value = await self._load(url, scheme, read)
            result = "ok"
            return value
        except ImageError as error:
            error.param = error.param or param
            result = error.code or "error"
            raise
        finally:
            self.stats.loads[source, result] += 1

    async def _load(self, url: str, scheme: str, read: Callable[[bytes], T]) -> T:
        if scheme == "data":
            if len(url) > _LONG_URL:
                return await asyncio.to_thread(lambda: read(self._decode_data_url(url)))
            return read(self._decode_data_url(url))
        if scheme in ("http", "https"):
            began = time.monotonic()
            try:
                with phase("picture.fetch"):
                    data = await self._fetch(url)
            finally:
                self.stats.fetch_seconds.observe(time.monotonic() - began)
            self.counters.fetched_bytes += len(data)
            return await asyncio.to_thread(read, data)
        if scheme == "file":
            return await asyncio.to_thread(lambda: read(self._read_file(unquote(url[5:].removeprefix("//")))))
        raise _bad_url("An image URL must begin with https:, http: or data:.")

    async def close(self) -> None:
        """Close pooled connections."""
        if self._pool is not None:
            await self._pool.aclose()
        self._guard.close()

    def _decode_data_url(self, url: str) -> bytes:
        head, comma, payload = url.partition(",")
        mime, *options = (part.strip().lower() for part in head[5:].split(";"))
        if not comma:
            raise _bad_url("A data URL has the form data:image/png;base64,... ; the comma is missing.")
        if mime and not mime.startswith("image/") and mime != "application/octet-stream":
            raise ImageError(
                f"A data URL of type {mime[:40]!r} is not an image; use image/jpeg, image/png, image/webp or image/gif.",
                code="unsupported_image_media_type",
            )
        # Base64 holds 3 bytes in 4 characters: refuse before decoding.
        if len(payload) * 3 // 4 > self.limits.max_image_bytes + 3:
            raise self._too_large()
        if "base64" not in options:
            return self._checked(unquote_to_bytes(payload))
        if "%" in payload:
            payload = unquote(payload)
        try:
            return self._checked(b"".join(_base64_pieces(payload)))
        except ValueError as error:
            raise ImageError("The image's base64 data is not valid.", code="invalid_base64_image") from error

    def _read_file(self, name: str) -> bytes:
        root = self.limits.allowed_local_path
        # One answer whatever is there: a client must not learn which files exist.
        refused = _bad_url("Local files are not served from this address; send the image as a data: URL.", status=403)
        if root is None:
            raise refused
        try:
            path = Path(name).resolve(strict=True)
            if not path.is_relative_to(root.resolve()) or not path.is_file():
                raise refused
            with path.open("rb") as file:
                return self._checked(file.read(self.limits.max_image_bytes + 1))
        except (OSError, ValueError) as error:
            raise refused from error

    async def _fetch(self, url: str) -> bytes:
        self.counters.fetches += 1
        try:
            async with asyncio.timeout(self.limits.timeout):
                return self._checked(await self._follow(url))
        except TimeoutError as error:
            raise _failed(f"The image could not be fetched within {self.limits.timeout:g} seconds.") from error
        except _FETCH_ERRORS as error:
            raise _failed("The image's host could not be reached or gave no valid answer.") from error

    async def _follow(self, url: str) -> bytes:
        for _ in range(self.limits.max_redirects + 1):
            target = self._check_url(url)
            async with contextlib.AsyncExitStack() as until_read:
                response = await self._ask(target, until_read)
                headers = {name.lower(): value.decode("latin-1") for name, value in response.headers}
                if response.status in (301, 302, 303, 307, 308) and b"location" in headers:
                    url = str(target.join(headers[b"location"]))
                    continue
                if response.status != 200:
                    raise _failed(f"The image's host answered with status {response.status}.")
                if headers.get(b"content-encoding", "identity").lower() not in ("identity", ""):
                    raise _failed("The image's host sent compressed content, which is not accepted.")
                return await self._read_body(response, headers)
        raise _failed(f"The image's URL was redirected more than {self.limits.max_redirects} times.")

    async def _ask(self, target: httpx2.URL, until_read: contextlib.AsyncExitStack) -> httpcore2.Response:
        """The head of the answer to one GET. A host may close a kept connection just as it is used again: that is no answer, and
        another one is asked (RFC 9112, section 9.3.1), until one that was dialled for this request fails too."""
        raw = httpcore2.URL(scheme=target.raw_scheme, host=target.raw_host, port=target.port, target=target.raw_path)
        headers = [(b"Host", target.netloc), *_HEADERS, *caller().outgoing]
        dialled = False

        async def trace(event: str, info: Mapping[str, Any]) -> None:
            nonlocal dialled
            dialled = dialled or event == "connection.connect_tcp.started"

        while True:
            try:
                return await until_read.enter_async_context(
                    self._connections().stream("GET", raw, headers=headers, extensions={"trace": trace})
                )
            except (httpcore2.NetworkError, httpcore2.RemoteProtocolError):
                if dialled:
                    raise

    async def _read_body(self, response: httpcore2.Response, headers: Mapping[bytes, str]) -> bytes:
        limit = self.limits.max_image_bytes
        declared = headers.get(b"content-length", "")
        if declared.isdigit() and int(declared) > limit:
            raise self._too_large()
        body = bytearray()
        who = caller()
        async for chunk in response.aiter_stream():
            body += chunk
            who.hold(len(chunk))
            if len(body) > limit:
                raise self._too_large()
        return bytes(body)

    def _check_url(self, url: str) -> httpx2.URL:
        """Refuse what parsers disagree on, and hosts that are not allowed. Addresses are checked when dialled."""
        authority = re.match(r"[a-z]+://([^/?#]*)", url, re.IGNORECASE)
        if (
            authority is None
            or "@" in authority[1]
            or _ODD_HOST.search(authority[1])
            or re.search(r"[\s\\\x00-\x20]", url)
        ):
            raise _bad_url("The image's URL is not valid: it has an unusual host, user name, space or backslash.")
        parsed = httpx2.URL(url)
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise _bad_url("An image URL must begin with https:, http: or data:.")
        host = parsed.host.removesuffix(".").lower()
        if (_NUMERIC_HOST.match(host) and not is_dotted_quad(host)) or embedded(host) is not None:
            raise _bad_url("The image's URL spells an address in an unusual way.")
        allowed = self.limits.allowed_domains
        if allowed and host not in allowed:
            raise _blocked()
        return parsed

    def _connections(self) -> httpcore2.AsyncConnectionPool:
        """HTTP/1.1 without redirects, cookies, proxies or content decoding of its own; every connection is guarded."""
        if self._pool is None:
            context = httpx2.create_ssl_context(trust_env=False)
            self._pool = httpcore2.AsyncConnectionPool(
                context, max_connections=100, keepalive_expiry=5.0, network_backend=self._guard
            )
        return self._pool

    def _checked(self, data: bytes) -> bytes:
        if len(data) > self.limits.max_image_bytes:
            raise self._too_large()
        if not data:
            raise ImageError("The image is empty.", code="empty_image_file")
        return data

    def _too_large(self) -> ImageError:
        limit = self.limits.max_image_bytes / 1e6
        return ImageError(
            f"The image is larger than {limit:g} MB; send a smaller one.", code="image_too_large", status=413
        )


class _GuardedBackend(httpcore2.AsyncNetworkBackend):
    """Resolves a name once, requires every address of it to be public, and dials one of those very addresses."""

    def __init__(self, allow_private: bool) -> None:
        self._allow_private = allow_private
        self._backend = httpcore2.AnyIOBackend()
        # Its own threads: names that take long to resolve must not use up those that decode and tokenise.
        self._resolvers = ThreadPoolExecutor(16, "sightline-resolver")

    def close(self) -> None:
        """Let the resolver's threads end."""
        self._resolvers.shutdown(wait=False, cancel_futures=True)

    def _resolve(self, host: str, port: int) -> list[str]:
        return list(dict.fromkeys(str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        loop = asyncio.get_running_loop()
        try:
            addresses = await loop.run_in_executor(self._resolvers, self._resolve, host, port)
        except (OSError, UnicodeError) as error:
            raise _failed("The image's host has no address.") from error
        if not addresses or not (self._allow_private or all(is_public(address) for address in addresses)):
            raise _blocked()
        for address in addresses[:-1]:
            with contextlib.suppress(httpcore2.ConnectError):
                return await self._backend.connect_tcp(address, port, timeout, local_address, socket_options)
        return await self._backend.connect_tcp(addresses[-1], port, timeout, local_address, socket_options)

    async def connect_unix_socket(self, *args: Any, **kwargs: Any) -> httpcore2.AsyncNetworkStream:
        raise _blocked()

    async def sleep(self, seconds: float) -> None:
        await self._backend.sleep(seconds)


def _base64_pieces(text: str) -> Iterator[bytes]:
    # One call for it all would keep the interpreter from other threads for tens of milliseconds.
    step = 1 << 20
    for at in range(0, len(text), step):
        # as strict as base64.b64decode with validate=True, and five times faster
        piece = msgspec.convert(text[at : at + step], bytes)
        if at + step < len(text) and len(piece) != step // 4 * 3:
            raise ValueError("padding before the end")
        yield piece


def _bad_url(message: str, status: int = 400) -> ImageError:
    return ImageError(message, code="invalid_image_url", status=status)


def _blocked() -> ImageError:
    return ImageError(
        "The image's host is not allowed; send the image as a data: URL, or ask the operator to allow the host.",
        code="invalid_image_url",
        status=403,
    )


def _failed(message: str) -> ImageError:
    return ImageError(f"{message} Check the URL, or send the image as a data: URL.", code="failed_to_download_image")
