"""AsyncEngine: the asyncio side of an engine that runs in a child process or, for the offline `Engine`, in a thread.

Imports no torch. Pictures that the engine has not seen are decoded in worker threads before the request is sent, so a
broken file is the client's error and never the engine's; known pictures travel as digests, and the engine asks for
their pixels in the rare case that it has dropped them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from sightline.config import EngineConfig
from sightline.engine.loop import PixelFiles
from sightline.engine.output import OutputDelta, RequestDecoder, joined
from sightline.engine.setup import EngineSetup
from sightline.engine.transport import ProcessTransport, ThreadTransport, Transport
from sightline.errors import EngineDeadError, EngineError, StartupError, startup_error
from sightline.prompt.caller import caller
from sightline.prompt.pipeline import Picture, Prompt, PromptPipeline
from sightline.types import (
    Abort,
    EngineRequest,
    EngineStats,
    Fatal,
    FlushCache,
    FromEngine,
    LoadProgress,
    NeedPixels,
    PixelBuffer,
    Pixels,
    PutPixels,
    Ready,
    SamplingParams,
    Times,
    TokenEvent,
    ids_to_bytes,
)

logger = logging.getLogger("sightline.server")

_KNOWN_PICTURES = 100_000


class AsyncEngine:
    """One engine and the requests in flight on it. All methods belong to one event loop.

    stall_timeout: seconds of silence after which an engine that has work is taken for dead and ended; by default, what
    suits the device. queue_timeout: seconds that a request may wait for its turn. name: in the engine's log. env: variables
    of its process alone. loss: the error of its requests when it dies.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_dir: Path,
        *,
        in_process: bool = False,
        stall_timeout: float | None = None,
        queue_timeout: float = float("inf"),
        log_level: str = "info",
        log_format: str = "text",
        name: str = "engine",
        env: Mapping[str, str] | None = None,
        loss: Callable[[], EngineError] = lambda: EngineDeadError("the engine died; see the server's log"),
    ) -> None:
        self.stats = EngineStats()
        self._stall_timeout = stall_timeout
        self._queue_timeout = queue_timeout
        self._heard = time.monotonic()
        self._loss = loss
        self._ended: Exception | None = None
        self._run_dir = Path(
            tempfile.mkdtemp(prefix="sightline-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        )
        self._transport: Transport = (
            ThreadTransport(config, model_dir, self._run_dir)
            if in_process
            else ProcessTransport(EngineSetup(config, model_dir, log_level, log_format, name), self._run_dir, env or {})
        )
        self._device_renders = False
        self._pixel_files = PixelFiles(self._run_dir)
        self._supplying = 0
        self._flights: dict[str, Answer] = {}
        self._known: OrderedDict[bytes, None] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._on_progress: Callable[[LoadProgress], None] = lambda progress: None
        self._fatal: Fatal | None = None
        self._ready: asyncio.Future[Ready] | None = None
        self._dead: asyncio.Future[StartupError | EngineDeadError] | None = None
        self._closing = False

    async def start(self, on_progress: Callable[[LoadProgress], None] = lambda progress: None) -> Ready:
        """Start the engine and wait until it can serve. Raises the `StartupError` that the engine died of."""
        loop = asyncio.get_running_loop()
        self._on_progress = on_progress
        self._ready, self._dead = loop.create_future(), loop.create_future()
        self._transport.start(self._on_messages, self._on_end)
        futures: list[asyncio.Future[Any]] = [self._ready, self._dead]
        await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
        if self._dead.done():
            raise self._dead.result()
        ready = self._ready.result()
        self._device_renders = ready.plan.device != "cpu"
        if self._stall_timeout is None:
            self._stall_timeout = 600.0 if ready.plan.device == "cpu" else 60.0
        self._keep(self._watch(self._stall_timeout))
        return ready

    async def wait_dead(self) -> StartupError | EngineDeadError:
        """Wait until the engine ends without having been asked to."""
        assert self._dead is not None, "start() first"
        return await asyncio.shield(self._dead)

    @property
    def alive(self) -> bool:
        """It has not ended."""
        return not self._closing and not (self._dead is not None and self._dead.done())

    @property
    def num_alive(self) -> tuple[int, int]:
        """Engines that live, and all that were started."""
        return int(self.alive), 1

    @property
    def num_in_flight(self) -> int:
        """Requests that the engine has."""
        return len(self._flights)

    @property
    def num_begun(self) -> int:
        """Of these, those that have had their first token."""
        return sum(answer.begun for answer in self._flights.values())

    @property
    def replica_stats(self) -> list[EngineStats]:
        """The counters of each engine: one."""
        return [self.stats]

    @property
    def stalled(self) -> bool:
        """The engine has work and has been silent for so long that it will probably be ended."""
        return self._stall_timeout is not None and self._silence() > min(20.0, self._stall_timeout / 2)

    @property
    def silences(self) -> list[float]:
        """Seconds of each engine since its last sign of life while it has work: one."""
        return [self._silence()]

    def _silence(self) -> float:
        """Seconds without a sign of life from an engine that has work; it sends several a second while it steps."""
        waits_for_us = self._supplying > 0
        return time.monotonic() - self._heard if self._flights and not waits_for_us else 0.0

    async def _watch(self, limit: float) -> None:
        while (left := limit - self._silence()) > 0:  # noqa: ASYNC110 (silence grows by itself: there is no event)
            await asyncio.sleep(min(left, 1.0))
        logger.error("the engine has given no sign of life for %g s with requests in flight; it is ended", limit)
        self._fatal = Fatal(7, f"no sign of life for {limit:g} s (--stall-timeout)")
        self._transport.kill()

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def end_all(self, error: Exception) -> None:
        """Fail the requests in flight and every later one with `error`."""
        self._ended = error
        self._fail_flights(error)

    async def close(self) -> None:
        """End the engine; requests in flight fail. Safe to call twice."""
        if self._closing:
            return
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await self._transport.close()
        self._fail_flights(EngineDeadError("the engine was closed"))
        shutil.rmtree(self._run_dir, ignore_errors=True)

    # -- requests ------------------------------------------------------------------------------------------------------

    async def submit(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        *,
        pipeline: PromptPipeline,
        request_id: str,
    ) -> Answer:
        """Decode what the engine does not know, send the request, and return its answer-to-be, to be closed by the caller.

        Raises `ImageError` for a picture that does not decode, before anything is sent, and `EngineDeadError`.
        """
        self._check_alive()
        pixels = await self._decode(pipeline, [p for d, p in prompt.pictures.items() if d not in self._known])
        self._check_alive()
        assert request_id not in self._flights
        answer = Answer(self, prompt, sampling, pipeline, request_id)
        if not self._flights:
            self._heard = time.monotonic()
        self._flights[request_id] = answer
        self._transport.send(
            EngineRequest(
                request_id=request_id,
                input_ids=ids_to_bytes(prompt.input_ids),
                sampling=sampling,
                positions=b"" if prompt.positions is None else ids_to_bytes(prompt.positions),
                position_delta=prompt.position_delta,
                images=prompt.images,
                pixels=self._write(pixels),
                cache_salt=caller().salt,
                max_wait=self._queue_timeout,
                timed=caller().traced,
            )
        )
        for digest in prompt.pictures:
            self._remember(digest)
        return answer

    def flush_cache(self) -> None:
        """Requests submitted after this find no prefix and no picture of earlier ones, but for those still running."""
        self._check_alive()
        self._transport.send(FlushCache())

    def _abort(self, request_id: str, index: int | None = None) -> None:
        if not self._closing:
            self._transport.send(Abort(request_id, index))

    async def _decode(self, pipeline: PromptPipeline, pictures: list[Picture]) -> dict[bytes, Pixels]:
        pixels = await asyncio.gather(*(pipeline.decode(p, self._device_renders) for p in pictures))
        return {picture.digest: p for picture, p in zip(pictures, pixels, strict=True)}

    def _write(self, pixels: dict[bytes, Pixels]) -> tuple[PixelBuffer, ...]:
        """One copy into shared memory, right before the message that names it, so that no cancelled request leaks one."""
        return tuple(self._pixel_files.write(digest, p) for digest, p in pixels.items())

    def _remember(self, digest: bytes) -> None:
        self._known[digest] = None
        self._known.move_to_end(digest)
        if len(self._known) > _KNOWN_PICTURES:
            self._known.popitem(last=False)

    async def _supply(self, message: NeedPixels) -> None:
        flight = self._flights.get(message.request_id)
        if flight is None:
            return
        self._supplying += 1
        try:
            pixels = await self._decode(flight.pipeline, [flight.prompt.pictures[d] for d in message.digests])
        except Exception as error:
            flight.events.put_nowait(error)
            return
        finally:
            self._supplying -= 1
            self._heard = time.monotonic()
        self._transport.send(PutPixels(self._write(pixels)))

    # -- messages ------------------------------------------------------------------------------------------------------

    def _on_messages(self, messages: Sequence[FromEngine]) -> None:
        self._heard = time.monotonic()
        for message in messages:
            match message:
                case TokenEvent():
                    flight = self._flights.get(message.request_id)
                    if flight is not None:
                        flight.times = message.times or flight.times
                        flight.begun = True
                        flight.events.put_nowait(message)
                case EngineStats():
                    self.stats = message
                case NeedPixels():
                    self._keep(self._supply(message))
                case LoadProgress():
                    self._on_progress(message)
                case Ready():
                    assert self._ready is not None
                    self._ready.set_result(message)
                case Fatal():
                    self._fatal = message

    def _on_end(self, exit_code: int) -> None:
        if self._closing or self._dead is None or self._dead.done():
            return
        started = self._ready is not None and self._ready.done()
        fatal = self._fatal or Fatal(exit_code, f"the engine process ended with exit code {exit_code}")
        error = EngineDeadError(fatal.message) if started else startup_error(fatal.exit_code, fatal.message)
        self._dead.set_result(error)
        self._fail_flights(self._loss())

    def _fail_flights(self, error: Exception) -> None:
        for flight in self._flights.values():
            flight.events.put_nowait(error)

    def _check_alive(self) -> None:
        if self._ended is not None:
            raise self._ended
        if not self.alive:
            raise EngineDeadError("the engine is not running")


class Answer:
    """A request in flight: iterate it for its deltas, and close it in any case; closing an unfinished one aborts it.

    Iteration raises `EngineError` when the request fails in the engine and `EngineDeadError` when the engine is gone.
    """

    def __init__(
        self, engine: AsyncEngine, prompt: Prompt, sampling: SamplingParams, pipeline: PromptPipeline, request_id: str
    ) -> None:
        self.prompt = prompt
        self.pipeline = pipeline
        self.begun = False
        self.events: asyncio.Queue[TokenEvent | Exception] = asyncio.Queue()
        self.times: Times | None = None
        self._following: TokenEvent | Exception | None = None
        self._engine = engine
        self._request_id = request_id
        self._decoder = RequestDecoder(pipeline.tokenizer, sampling)
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> OutputDelta:
        while not self._decoder.done:
            event = await self._next_event()
            if isinstance(event, Exception):
                raise event
            delta = self._decoder.push(event)
            for index in self._decoder.take_aborts():
                self._engine._abort(self._request_id, index)
            if delta is not None:
                return delta
        raise StopAsyncIteration

    async def _next_event(self) -> TokenEvent | Exception:
        """All tokens of a choice that have come meanwhile, as one event: who falls behind writes fewer, longer chunks."""
        event = self._following or await self.events.get()
        self._following = None
        while isinstance(event, TokenEvent) and event.finish_reason is None and not self.events.empty():
            following = self.events.get_nowait()
            if isinstance(following, Exception) or following.index != event.index:
                self._following = following
                break
            event = joined(event, following)
        return event

    def close(self) -> None:
        """Forget the request, and abort it if it still runs. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        del self._engine._flights[self._request_id]
        if not self._decoder.done:
            self._engine._abort(self._request_id)
