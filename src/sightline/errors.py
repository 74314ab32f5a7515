"""Every error that sightline raises on purpose.

    SightlineError
    +-- RequestError                  the client's fault: an HTTP status, a code, a field and a remedy
    |   +-- NotFoundError             404
    |   +-- ContextLengthError        400 context_length_exceeded
    |   +-- ImageError                400/403/413/415 with an image code of OpenAI's vocabulary
    +-- OverloadedError               429/503: try again later
    +-- EngineError                   the server's fault while serving one request
    |   +-- GrammarCostError          its grammar passed a bound on memory or time; a 400 for its client
    |   +-- ReplicaDeadError          the engine that held it is gone; others serve, so send it again
    |   +-- EngineDeadError           the engine process is gone; nothing can be served any more
    |   +-- RankError                 the ranks of an engine are out of step: its process ends
    +-- StartupError                  the server cannot start; carries the exit code of the command
        +-- SettingError              exit 2: a setting that cannot be used
        +-- ModelNotFoundError        exit 3: missing, gated or unsupported model
        +-- CheckpointError           exit 3: config or weights that cannot be loaded; names the key
        +-- OutOfMemoryError          exit 4: does not fit; names the flag that makes it fit
        +-- AddressInUseError         exit 5
        +-- DeviceError               exit 6: no usable device

The HTTP layer maps `RequestError` and `OverloadedError` to OpenAI's error body in one place (`server/app.py`).
"""

from __future__ import annotations


class SightlineError(Exception):
    """Base of everything below."""


class RequestError(SightlineError):
    """A mistake in one request. `message` is shown to the client: one sentence that names the remedy."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        type: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.status = status
        self.type = type


class NotFoundError(RequestError):
    """Unknown model or route."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = "not_found") -> None:
        super().__init__(message, param=param, code=code, status=404)


class ContextLengthError(RequestError):
    """The prompt (text and pictures) does not fit the model's context."""

    def __init__(self, message: str, *, param: str | None = "messages") -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class ImageError(RequestError):
    """A picture that cannot be used. `code` is one of OpenAI's image error codes (Responses `error.code`)."""

    def __init__(self, message: str, *, code: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message, param=param, code=code, status=status)


class OverloadedError(SightlineError):
    """The server is starting, draining or full; `retry_after` is in seconds."""

    def __init__(self, message: str, *, code: str, status: int = 503, retry_after: int = 1) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.status = status
        self.retry_after = retry_after


class EngineError(SightlineError):
    """One request failed inside the engine; others go on."""


class GrammarCostError(EngineError):
    """A grammar of a client passed a bound while it was compiled or an answer was written."""


class EngineDeadError(EngineError):
    """The engine process ended."""


class ReplicaDeadError(EngineError):
    """The engine that held the request ended; others go on."""


class RankError(EngineError):
    """A step failed on one rank of a tensor-parallel engine, and the others wait for it: the process must end."""


class StartupError(SightlineError):
    """The command cannot start; `exit_code` is its process exit status."""

    exit_code = 1


class SettingError(StartupError):
    """A setting that was read and cannot be used; the message names the flag."""

    exit_code = 2


class ModelNotFoundError(StartupError):
    """The model is missing, gated or of an unsupported architecture."""

    exit_code = 3


class CheckpointError(StartupError):
    """The checkpoint's config or weights cannot be loaded."""

    exit_code = 3


class OutOfMemoryError(StartupError):
    """The model or its caches do not fit the device."""

    exit_code = 4


class AddressInUseError(StartupError):
    """Host and port are taken."""

    exit_code = 5


class DeviceError(StartupError):
    """No usable device."""

    exit_code = 6


def startup_error(exit_code: int, message: str) -> StartupError:
    """The error that another process ended with."""
    kinds: dict[int, type[StartupError]] = {
        2: SettingError,
        3: ModelNotFoundError,
        4: OutOfMemoryError,
        5: AddressInUseError,
        6: DeviceError,
    }
    return kinds.get(exit_code, StartupError)(message)


def leaves_device_unusable(error: BaseException) -> bool:
    """After a CUDA error nothing can be computed any more in its process."""
    return "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError"
