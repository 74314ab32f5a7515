"""From "listening" to "ready" to "drained": loads the model behind an open port and says how far it is."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sightline import hub
from sightline.config import ServerConfig
from sightline.engine.client import AsyncEngine
from sightline.engine.replicas import EngineClient, ReplicaSet
from sightline.errors import EngineDeadError, OverloadedError, SightlineError, StartupError
from sightline.prompt.media import MediaLimits, MediaLoader
from sightline.prompt.pipeline import PromptPipeline
from sightline.prompt.processor import read_json
from sightline.server.admission import Admission, Keys, busy
from sightline.server.observed import Observed
from sightline.server.tracing import Tracing
from sightline.types import EngineStats, LoadProgress, MemoryPlan

logger = logging.getLogger("sightline.server")

LOADING, READY, DRAINING, FAILED = "loading", "ready", "draining", "failed"


class Lifecycle:
    """State of the server and its parts. Routes may use `engine` and `pipeline` once `state` is ready.

    on_progress is called with every step of loading, for the terminal. Raises `SettingError` for unusable settings.
    """

    def __init__(
        self, config: ServerConfig, *, demo: bool = False, on_progress: Callable[[LoadProgress], None] | None = None
    ) -> None:
        self.config = config
        self.demo = demo
        self.state = LOADING
        self.progress = LoadProgress("starting")
        self.started = time.monotonic()
        self.created = int(time.time())
        self.ready_after: float | None = None
        self.error: SightlineError | None = None
        self.plan: MemoryPlan | None = None
        self.sampling_defaults: dict[str, Any] = {}
        self.in_flight = 0
        self.admission = Admission(config)
        self.keys = Keys.of(config)
        self.observed = Observed()
        self.tracing = Tracing() if config.enable_trace else None
        self._loop_watch: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._on_progress = on_progress
        self._engine: EngineClient | None = None
        self._pipeline: PromptPipeline | None = None

    @property
    def engine(self) -> EngineClient:
        assert self._engine is not None
        return self._engine

    @property
    def pipeline(self) -> PromptPipeline:
        assert self._pipeline is not None
        return self._pipeline

    @property
    def replica_stats(self) -> list[EngineStats]:
        """The counters of each engine, in order; none before they are started."""
        return [] if self._engine is None else self._engine.replica_stats

    @property
    def silences(self) -> list[float]:
        """Seconds since the last sign of life of each engine that has work, 0 for the others; none before they are started."""
        return [] if self._engine is None else self._engine.silences

    @property
    def num_alive(self) -> tuple[int, int]:
        """Engines that live, and all that were started; none before."""
        return (0, 0) if self._engine is None else self._engine.num_alive

    @property
    def media(self) -> MediaLoader | None:
        """What gets pictures, once there is one."""
        return None if self._pipeline is None else self._pipeline.media

    @property
    def model_name(self) -> str:
        """The model's id in the API: a hub name as it is, a folder by its last part (paths are not shown)."""
        if self.config.served_model_name:
            return self.config.served_model_name
        path = Path(self.config.model)
        return path.resolve().name if path.is_dir() else self.config.model

    def accepts_model(self, name: str) -> bool:
        """The served name, the path or hub name that was given, the last part of either, and SGLang's "default"."""
        known = {self.model_name, self.config.model, "default"}
        return name in known or name in {Path(n).name for n in known}

    async def load(self) -> None:
        """Bring everything up. Raises `StartupError`."""
        config = self.config
        loop = asyncio.get_running_loop()
        self._loop_watch = loop.create_task(self.observed.measure_loop())

        def download(fraction: float | None, detail: str) -> None:
            loop.call_soon_threadsafe(self._report, LoadProgress("download", fraction, detail))

        try:
            model_dir = await asyncio.to_thread(
                hub.resolve,
                config.model,
                revision=config.revision,
                download_dir=config.download_dir,
                on_progress=download,
            )
            self._engine = self._make_engine(model_dir)
            # The tokenizer loads while the engine does.
            pipeline, ready = await asyncio.gather(
                asyncio.to_thread(self._make_pipeline, model_dir), self._engine.start(self._report)
            )
            self._pipeline = pipeline
            pipeline.context_length = ready.plan.context_length
            self.plan = ready.plan
            self.sampling_defaults = sampling_defaults(model_dir)
        except StartupError as error:
            self.state, self.error = FAILED, error
            raise
        if self.state == LOADING:
            self.state = READY
        self.ready_after = time.monotonic() - self.started
        self._report(LoadProgress("ready", 1.0))

    def _make_engine(self, model_dir: Path) -> EngineClient:
        config = self.config
        common: dict[str, Any] = {
            "stall_timeout": config.stall_timeout,
            "queue_timeout": config.queue_timeout,
            "log_level": config.log_level,
            "log_format": config.log_format,
        }
        if config.dp_size == 1:
            return AsyncEngine(config.engine_config(), model_dir, **common)
        return ReplicaSet(config.engine_config(), model_dir, method=config.load_balance_method, **common)

    def _make_pipeline(self, model_dir: Path) -> PromptPipeline:
        return PromptPipeline(model_dir, chat_template=self.config.chat_template, limits=media_limits(self.config))

    def _report(self, progress: LoadProgress) -> None:
        self.progress = progress
        if self._on_progress is not None:
            self._on_progress(progress)

    async def watch(self) -> EngineDeadError | StartupError:
        """Wait for the engine's death; new requests are refused after it."""
        error = await self.engine.wait_dead()
        self.state, self.error = FAILED, error
        return error

    @contextmanager
    def admit(self) -> Any:
        """Count a request in flight. Raises `OverloadedError` before any work is spent on one too many."""
        self.require_ready()
        if self.in_flight >= self.config.max_queued_requests:
            raise busy()
        self.in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._idle.set()

    def require_ready(self) -> None:
        """Raise the `OverloadedError` that says why requests are not served now."""
        if self.state == LOADING:
            raise OverloadedError("The model is loading.", code="server_starting", retry_after=2)
        if self.state == DRAINING:
            raise OverloadedError("The server is shutting down.", code="server_draining", retry_after=5)
        if self.state == FAILED:
            raise OverloadedError("The server cannot serve any more.", code="server_failed", retry_after=30)
        if self._engine is not None and self._engine.stalled:
            raise OverloadedError("The engine does not answer.", code="server_stalled", retry_after=10)

    async def drain(self) -> None:
        """Refuse new requests and give running ones `drain_timeout` seconds."""
        self.state = DRAINING if self.state != FAILED else FAILED
        try:
            await asyncio.wait_for(self._idle.wait(), self.config.drain_timeout)
        except TimeoutError:
            logger.warning("%d requests were still running after %g s", self.in_flight, self.config.drain_timeout)
            error = OverloadedError("The server is shutting down.", code="server_draining", retry_after=5)
            self.engine.end_all(error)
            # A moment for the clients to read it.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), 2)

    async def close(self) -> None:
        """End the engine and the media client."""
        if self._loop_watch is not None:
            self._loop_watch.cancel()
        if self._engine is not None:
            await self._engine.close()
        if self._pipeline is not None:
            await self._pipeline.close()
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)


def media_limits(config: ServerConfig) -> MediaLimits:
    """The limits on pictures that the settings ask for."""
    path = config.allowed_local_media_path
    return MediaLimits(
        max_images=config.max_images_per_request,
        max_image_bytes=int(config.max_image_mb * 1e6),
        max_pixels=int(config.max_image_megapixels * 1e6),
        timeout=config.media_timeout,
        max_redirects=config.media_redirects,
        allow_private=config.allow_private_media,
        allowed_domains=frozenset(d.lower() for d in config.allowed_media_domains),
        allowed_local_path=Path(path) if path else None,
    )


def sampling_defaults(model_dir: Path) -> dict[str, Any]:
    """What generation_config.json recommends, for fields that a request leaves out."""
    file = read_json(model_dir / "generation_config.json")
    if file.get("do_sample") is False:
        return {"temperature": 0.0}
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return {name: file[name] for name in names if file.get(name) is not None}
