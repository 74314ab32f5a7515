"""Who may come in, how much of them, and how each of them ended."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from sightline.config import ServerConfig
from sightline.errors import NotFoundError, OverloadedError, RequestError, SettingError
from sightline.prompt.caller import Caller, caller, set_caller
from sightline.server.tracing import Trace


class ClientGone(Exception):
    """The client closed its connection before the answer was complete."""


class Outcome(StrEnum):
    """How a call ended; every one ends in exactly one of these."""

    FINISHED = "finished"
    REJECTED = "rejected"  # the client's mistake: 4xx
    REFUSED = "refused"  # busy, starting or draining: nothing was done
    TIMEOUT = "timeout"  # the queue's or the request's deadline
    ABORTED = "aborted"  # the client went away
    FAILED = "failed"  # our fault: 5xx, or an error in mid-stream


_TIMEOUTS = ("request_timeout", "queue_timeout")


def outcome_of(error: BaseException) -> Outcome:
    """What an error makes of a call."""
    match error:
        case RequestError():
            return Outcome.REJECTED
        case OverloadedError():
            return Outcome.TIMEOUT if error.code in _TIMEOUTS else Outcome.REFUSED
        case ClientGone() | ClientDisconnect():
            return Outcome.ABORTED
        case _:
            return Outcome.FAILED


def reason_of(error: BaseException) -> str:
    """The error's code, of which there are a few dozen."""
    match error:
        case RequestError() | OverloadedError():
            return error.code or "invalid_request"
        case ClientGone() | ClientDisconnect():
            return "client_gone"
        case _:
            return "internal_error"


class Call(Caller):
    """One HTTP call that may cost something, from its headers to the end of its answer."""

    def __init__(
        self, admission: Admission, salt: bytes = b"", *, is_admin: bool = False, timeout: float = float("inf")
    ) -> None:
        """timeout: seconds that the client gives us, if it says. fields, once set: what the access log says of the answer."""
        self.salt = salt
        self.timeout = timeout
        self.is_admin = is_admin
        self.error: BaseException | None = None
        self.num_bytes = 0
        self.num_tokens = 0
        self.fields: dict[str, Any] = {}
        self.trace: Trace | None = None
        self._admission = admission

    def follow(self, trace: Trace) -> None:
        """From now on its phases are spans of `trace`."""
        self.trace, self.traced, self.outgoing = trace, True, trace.outgoing

    def spent(self, phase: str, began: float, ended: float) -> None:
        """A span of the trace."""
        if self.trace is not None:
            self.trace.span(phase, began, ended)

    def hold(self, num_bytes: int) -> None:
        """Body and picture bytes that stay until the end. Raises `OverloadedError`, and keeps nothing more, when full."""
        self._admission.take_bytes(num_bytes)
        self.num_bytes += num_bytes

    def hold_tokens(self, num_tokens: int) -> None:
        """Prompt tokens in flight; they keep later calls out, not this one, whose work on them is done."""
        self._admission.num_tokens += num_tokens
        self.num_tokens += num_tokens


class Admission:
    """Bounds on everything in flight, and the count of how calls ended.

    num_calls: calls from their headers on. num_bytes: their bodies and pictures, encoded. num_tokens: their prompts.
    reasons: codes of the errors that calls ended with.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.max_bytes = int(config.max_queued_mb * 1e6)
        self.max_tokens = config.max_queued_tokens
        self.num_calls = 0
        self.num_bytes = 0
        self.num_tokens = 0
        self.num_received = 0
        self.outcomes: Counter[Outcome] = Counter(dict.fromkeys(Outcome, 0))
        self.reasons: Counter[str] = Counter()

    @contextmanager
    def call(self, who: Call) -> Iterator[Call]:
        """Count a call, and how it ends: as `who.error` says, or an exception that leaves the block."""
        self.num_received += 1
        self.num_calls += 1
        set_caller(who)
        try:
            yield who
        except BaseException as error:
            who.error = who.error or error
            raise
        finally:
            self.num_calls -= 1
            self.num_bytes -= who.num_bytes
            self.num_tokens -= who.num_tokens
            self.outcomes[Outcome.FINISHED if who.error is None else outcome_of(who.error)] += 1
            if who.error is not None:
                self.reasons[reason_of(who.error)] += 1

    def require_room(self) -> None:
        """Raise `OverloadedError` when a bound is reached; asked for each call, itself counted, before its body is read."""
        full = self.max_tokens is not None and self.num_tokens >= self.max_tokens
        if full or self.num_calls > self.config.max_queued_requests or self.num_bytes >= self.max_bytes:
            raise busy()

    def take_bytes(self, num_bytes: int) -> None:
        """Raises `OverloadedError` when the bytes in flight would pass the bound."""
        if self.num_bytes + num_bytes > self.max_bytes:
            raise busy()
        self.num_bytes += num_bytes


def busy() -> OverloadedError:
    """One too many."""
    return OverloadedError("The server is busy; try again soon.", code="overloaded", retry_after=1)


def note(error: BaseException) -> None:
    """The call at hand ends with this error, whatever its status line said before."""
    who = caller()
    if isinstance(who, Call):
        who.error = who.error or error


def is_operator() -> bool:
    """Whether the call at hand came with an operator's key."""
    who = caller()
    return isinstance(who, Call) and who.is_admin


# -- keys --------------------------------------------------------------------------------------------------------------


class Keys:
    """The keys that open the server, kept as digests. Who sends which decides whose caches are seen."""

    def __init__(self, keys: Sequence[str], admin_keys: Sequence[str]) -> None:
        self._secret = secrets.token_bytes(32)
        self._keys = [self._digest(k.encode()) for k in keys]
        self._admin_keys = [self._digest(k.encode()) for k in admin_keys]
        self.has_admin = bool(admin_keys)

    @classmethod
    def of(cls, config: ServerConfig) -> Keys:
        """Keys of the settings and of the key file. Raises `SettingError` when it cannot be read."""
        keys = [*config.api_key]
        if config.api_key_file is not None:
            try:
                lines = Path(config.api_key_file).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise SettingError(f"--api-key-file: it cannot be read: {error}") from error
            found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
            if not found:
                # An empty file must not mean an open server.
                raise SettingError("--api-key-file: it holds no key.")
            keys += found
        return cls(keys, config.admin_api_key)

    def tenant(self, salt: bytes) -> str:
        """A name for metrics that tells nothing of the key: its place among those of the settings and the file."""
        if salt in self._keys:
            return f"key-{self._keys.index(salt) + 1}"
        return f"admin-{self._admin_keys.index(salt) + 1}" if salt in self._admin_keys else "none"

    def open(self, headers: Mapping[bytes, bytes]) -> tuple[bytes, bool]:
        """(tenant's salt, whether it is an operator) for a request's headers. Raises `RequestError` (401)."""
        digest = self._digest(_token(headers))
        # Every key is compared, so that time tells nothing about which one matched.
        is_admin = sum(hmac.compare_digest(digest, key) for key in self._admin_keys) > 0
        is_known = sum(hmac.compare_digest(digest, key) for key in self._keys) > 0
        if not self._keys:
            return (digest if is_admin else b""), is_admin
        if not (is_admin or is_known):
            raise unauthorized()
        return digest, is_admin

    def _digest(self, key: bytes) -> bytes:
        return hashlib.blake2b(key, key=self._secret, digest_size=32).digest()


def _token(headers: Mapping[bytes, bytes]) -> bytes:
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"").strip()


def unauthorized() -> RequestError:
    """No key, or a wrong one."""
    return RequestError(
        "Incorrect API key provided. Send one of the server's keys as 'Authorization: Bearer KEY' or 'x-api-key: KEY'.",
        code="invalid_api_key",
        status=401,
    )


async def require_admin(request: Request) -> None:
    """A dependency of routes for operators: without `--admin-api-key` they do not exist, and without that key they are shut."""
    if not request.app.state.lifecycle.keys.has_admin:
        raise NotFoundError(f"Unknown URL: {request.method} {request.url.path[:200]}.", code="unknown_url")
    if not is_operator():
        raise unauthorized()
