"""Several engines behind one HTTP process: each prompt goes to one of them, and the death of one is not the others'.

A replica that died is not started again: on one machine the cause (a broken device, memory that others took) mostly outlives
it, and a new engine's loading would slow those that serve. `/readyz` says how many are left; the supervisor restarts the server.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from sightline.config import EngineConfig
from sightline.engine.client import Answer, AsyncEngine
from sightline.engine.routing import Footprint, Method, Router, footprint, load
from sightline.errors import DeviceError, EngineDeadError, EngineError, ReplicaDeadError, StartupError
from sightline.prompt.caller import caller
from sightline.prompt.pipeline import Prompt, PromptPipeline
from sightline.types import EngineStats, LoadProgress, Ready, SamplingParams, summed

logger = logging.getLogger("sightline.server")

_VISIBLE = "CUDA_VISIBLE_DEVICES"


class ReplicaSet:
    """`config.dp_size` engines that look like one `AsyncEngine`. All methods belong to one event loop."""

    def __init__(
        self,
        config: EngineConfig,
        model_dir: Path,
        *,
        method: Method,
        stall_timeout: float | None,
        queue_timeout: float,
        log_level: str,
        log_format: str,
    ) -> None:
        """Raises `DeviceError` when CUDA_VISIBLE_DEVICES names too few devices."""
        self._method = method
        self._router: Router[int] = Router(method, prefix_tokens=0, picture_tokens=0)
        # Requests whose pictures are being decoded for a replica count as its load, too.
        self._coming: Counter[int] = Counter()
        self._dead: asyncio.Future[StartupError | EngineDeadError] | None = None
        self._watchers: list[asyncio.Task[None]] = []
        self._engines = [
            AsyncEngine(
                config,
                model_dir,
                stall_timeout=stall_timeout,
                queue_timeout=queue_timeout,
                log_level=log_level,
                log_format=log_format,
                name=f"engine {i}",
                env=device_env(config, i, os.environ),
                loss=self._loss,
            )
            for i in range(config.dp_size)
        ]

    async def start(self, on_progress: Callable[[LoadProgress], None] = lambda progress: None) -> Ready:
        """Start all and wait until every one can serve; progress is the first one's. Raises the first `StartupError`."""
        self._dead = asyncio.get_running_loop().create_future()
        readies = await asyncio.gather(
            *(e.start(on_progress if i == 0 else lambda progress: None) for i, e in enumerate(self._engines))
        )
        plans = [ready.plan for ready in readies]
        if len(kinds := {plan.device.partition(":")[0] for plan in plans}) > 1:
            raise DeviceError(
                f"--dp-size {len(plans)}: replicas found {' and '.join(sorted(kinds))}; use fewer of them."
            )
        # What every one of them can do.
        plan = min(plans, key=lambda p: (p.context_length, p.num_pages))
        per_token = plan.image_token_bytes
        self._router = Router(
            self._method,
            prefix_tokens=plan.num_tokens,
            picture_tokens=plan.vision_cache // per_token if per_token else plan.num_tokens,
        )
        self._watchers = [asyncio.ensure_future(self._watch(i)) for i in range(len(self._engines))]
        return Ready(plan, max(ready.load_seconds for ready in readies))

    async def wait_dead(self) -> StartupError | EngineDeadError:
        """Wait until the last engine has ended without having been asked to."""
        assert self._dead is not None, "start() first"
        return await asyncio.shield(self._dead)

    async def _watch(self, replica: int) -> None:
        error = await self._engines[replica].wait_dead()
        self._router.forget(replica)
        alive, total = self.num_alive
        logger.error("engine %d died: %s; %d of %d serve on", replica, error, alive, total)
        if not alive and self._dead is not None and not self._dead.done():
            self._dead.set_result(error)

    def _loss(self) -> EngineError:
        """What the requests of an engine that died are told."""
        if any(engine.alive for engine in self._engines):
            return ReplicaDeadError("the engine that held the request died; see the server's log")
        return EngineDeadError("the last engine died; see the server's log")

    @property
    def num_alive(self) -> tuple[int, int]:
        """Engines that live, and all that were started."""
        return sum(engine.alive for engine in self._engines), len(self._engines)

    @property
    def stalled(self) -> bool:
        """No engine that lives answers."""
        return all(engine.stalled for engine in self._engines if engine.alive)

    @property
    def stats(self) -> EngineStats:
        """The counters of all, those of the dead as they were."""
        return summed(self.replica_stats)

    @property
    def replica_stats(self) -> list[EngineStats]:
        """The counters of each engine, in order."""
        return [engine.stats for engine in self._engines]

    @property
    def silences(self) -> list[float]:
        """Seconds of each engine since its last sign of life while it has work, in order."""
        return [seconds for engine in self._engines for seconds in engine.silences]

    def end_all(self, error: Exception) -> None:
        """Fail the requests in flight and every later one with `error`."""
        for engine in self._engines:
            engine.end_all(error)

    async def close(self) -> None:
        """End all engines; requests in flight fail. Safe to call twice."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*(engine.close() for engine in self._engines))

    async def submit(
        self, prompt: Prompt, sampling: SamplingParams, *, pipeline: PromptPipeline, request_id: str
    ) -> Answer:
        """As `AsyncEngine.submit`, on the replica that suits best. Raises `EngineDeadError` only when none is left."""
        mark = footprint(prompt.input_ids, prompt.images, caller().salt)
        while True:
            replica = self._choose(mark)
            self._router.record(mark, replica)
            self._coming[replica] += 1
            try:
                return await self._engines[replica].submit(prompt, sampling, pipeline=pipeline, request_id=request_id)
            except EngineDeadError:
                # It died while the pictures were decoded: nothing was sent, another one takes the request.
                if self._engines[replica].alive:
                    raise
            finally:
                self._coming[replica] -= 1

    def _choose(self, mark: Footprint) -> int:
        living = [i for i, engine in enumerate(self._engines) if engine.alive]
        if not living:
            raise EngineDeadError("no engine is running")
        able = [i for i in living if not self._engines[i].stalled] or living
        return self._router.choose(mark, {i: self._load(i) for i in able})

    def _load(self, replica: int) -> int:
        engine = self._engines[replica]
        return load(engine.num_in_flight + self._coming[replica], engine.num_begun)

    def flush_cache(self) -> None:
        """As `AsyncEngine.flush_cache`, on all that live."""
        self._router.forget_all()
        for engine in self._engines:
            if engine.alive:
                engine.flush_cache()


EngineClient = AsyncEngine | ReplicaSet


def device_env(config: EngineConfig, replica: int, env: Mapping[str, str]) -> dict[str, str]:
    """The variables that show a replica its own GPUs and no others. Nothing where the model runs on the CPU.

    Devices are taken in the order of `env`'s CUDA_VISIBLE_DEVICES, or of the machine. Raises `DeviceError` for too few.
    """
    if config.device == "cpu":
        return {}
    given, size = env.get(_VISIBLE), config.tp_size
    own = slice(replica * size, (replica + 1) * size)
    if given is None:
        return {_VISIBLE: ",".join(map(str, range(own.start, own.stop)))}
    devices = [d.strip() for d in given.split(",") if d.strip()]
    if not devices and config.device == "auto":
        return {}
    if len(devices) < config.num_ranks:
        of_size = f" of --tp-size {size}" if size > 1 else ""
        raise DeviceError(
            f"--dp-size {config.dp_size}{of_size} needs {config.num_ranks} GPUs, and {_VISIBLE} shows {len(devices)}; "
            "use fewer replicas or --device cpu."
        )
    return {_VISIBLE: ",".join(devices[own])}
