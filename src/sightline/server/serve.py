"""`sightline serve`: bind, answer probes, load, serve, drain; and what the terminal shows of it."""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from itertools import pairwise

import uvicorn

from sightline import demo
from sightline.config import ServerConfig
from sightline.engine.node import run_node
from sightline.engine.node_link import check_nodes
from sightline.errors import AddressInUseError, StartupError
from sightline.logging import setup_logging
from sightline.prompt.processor import Processor
from sightline.server.app import create_app
from sightline.server.connection import bounded_protocol
from sightline.server.lifecycle import Lifecycle
from sightline.server.notify import ServiceManager
from sightline.server.probes import DEMO_NOTICE
from sightline.types import LoadProgress, MemoryPlan

logger = logging.getLogger("sightline.server")

EXIT_ENGINE_DIED = 7


def serve(config: ServerConfig) -> int:
    """Run the server until a signal or the engine's death; returns the exit code."""
    setup_logging(config.log_level, config.log_format)
    is_demo = not config.model
    if is_demo:
        config = config.model_copy(update={"model": str(demo.model_path())})
    try:
        check_nodes(config)
        if config.node_rank:
            return _host_ranks(config)
        listener = _bind(config.host, config.port)
    except StartupError as error:
        logger.error("%s", error)
        return error.exit_code
    with listener:
        return _run_loop(_Server(config, listener, is_demo))


def _host_ranks(config: ServerConfig) -> int:
    """What a node other than the first does: nothing listens here. The first signal waits for node 0, a second one ends at once."""
    stop, signals = threading.Event(), itertools.count(1)

    def on_signal(number: int, frame: object) -> None:
        if next(signals) > 1:
            stop.set()
        else:
            logger.info("asked to end: this node ends with node 0; ask again to end now, and with it the engine")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    return run_node(config, stop)


def _run_loop(server: _Server) -> int:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(server.run())
    return uvloop.run(server.run())


class _Server:
    def __init__(self, config: ServerConfig, listener: socket.socket, is_demo: bool) -> None:
        self._config = config
        self._listener = listener
        self._is_demo = is_demo
        self._stop = asyncio.Event()
        self._signals = 0
        self._manager = ServiceManager()

    async def run(self) -> int:
        """Listen first, load after; returns the exit code."""
        view = _ProgressView()

        def on_progress(progress: LoadProgress) -> None:
            view(progress)
            share = "" if progress.fraction is None else f" {progress.fraction:.0%}"
            self._manager.loading(f"loading: {progress.phase}{share}")

        try:
            lifecycle = Lifecycle(self._config, demo=self._is_demo, on_progress=on_progress)
        except StartupError as error:
            logger.error("%s", error)
            return error.exit_code
        http = _Http(
            uvicorn.Config(
                create_app(lifecycle),
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=2,
                http=bounded_protocol(self._config.client_timeout, lifecycle.observed.stalls),
                ws="none",
            )
        )
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        host, port = self._listener.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        if self._is_demo:
            logger.info("no model was named: serving the bundled one. %s", DEMO_NOTICE)
        logger.info("listening on %s", url)
        serving = asyncio.ensure_future(http.serve(sockets=[self._listener]))
        try:
            return await self._supervise(lifecycle, view, url)
        finally:
            http.should_exit = True
            await serving
            await lifecycle.close()

    async def _supervise(self, lifecycle: Lifecycle, view: _ProgressView, url: str) -> int:
        stopping = asyncio.ensure_future(self._stop.wait())
        loading = asyncio.ensure_future(lifecycle.load())
        await asyncio.wait([stopping, loading], return_when=asyncio.FIRST_COMPLETED)
        view.close()
        if not loading.done():
            loading.cancel()
            return 0
        if (error := loading.exception()) is not None:
            if isinstance(error, StartupError):
                logger.error("%s", error)
                return error.exit_code
            raise error
        assert lifecycle.plan is not None
        _print_plan(lifecycle.plan, lifecycle.pipeline.processor, self._config.tp_size)
        logger.info("loading took: %s", view.seconds())
        hint = "; a browser shows the playground there" if self._config.enable_playground else ""
        logger.info("ready after %.1f s: %s serves %s%s", lifecycle.ready_after, url, lifecycle.model_name, hint)
        self._manager.ready(f"serves {lifecycle.model_name}")
        pinging = asyncio.ensure_future(self._manager.watchdog())
        watching = asyncio.ensure_future(lifecycle.watch())
        await asyncio.wait([stopping, watching], return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            logger.error("the engine died: %s", watching.result())
            # A moment for the clients in flight to read their errors.
            await asyncio.sleep(0.5)
            return EXIT_ENGINE_DIED
        watching.cancel()
        logger.info("draining %d requests", lifecycle.in_flight)
        self._manager.stopping(f"draining {lifecycle.in_flight} requests")
        drained = asyncio.ensure_future(lifecycle.drain())
        while not drained.done() and self._signals < 2:
            await asyncio.wait([drained], timeout=0.1)
        drained.cancel()
        pinging.cancel()
        return 0

    def _on_signal(self) -> None:
        """The first signal drains, a second one ends at once."""
        self._signals += 1
        self._stop.set()


class _Http(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Generator[None]:
        # Signals are ours: the server drains before uvicorn stops.
        yield


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise AddressInUseError(f"cannot listen on {host}:{port}: {error.strerror}. Choose another --port.") from error
    listener.setblocking(False)
    return listener


class _ProgressView:
    """Bars on a terminal, one line for each phase elsewhere."""

    def __init__(self) -> None:
        self._phase = ""
        self._began: dict[str, float] = {}
        self._live = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (
                TextColumn("{task.description:>10}"),
                BarColumn(),
                TextColumn("{task.fields[detail]}"),
                TimeElapsedColumn(),
            )
            self._live = Progress(*columns, console=Console(stderr=True))
            self._live.start()

    def seconds(self) -> str:
        """How long each phase took but the last, which is `ready`."""
        spans = pairwise(self._began.items())
        return ", ".join(f"{phase} {end - began:.1f} s" for (phase, began), (_, end) in spans)

    def __call__(self, progress: LoadProgress) -> None:
        self._began.setdefault(progress.phase, time.monotonic())
        if self._live is None:
            if progress.phase != self._phase and progress.phase != "ready":
                logger.info("loading: %s", progress.phase)
            self._phase = progress.phase
            return
        if progress.phase != self._phase:
            for task in self._live.tasks:
                self._live.update(task.id, total=1, completed=1)
            self._task = self._live.add_task(progress.phase, total=None, detail="")
            self._phase = progress.phase
        if progress.fraction is not None:
            self._live.update(self._task, total=1, completed=progress.fraction, detail=progress.detail)

    def close(self) -> None:
        """Leave the bars as they are."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def _print_plan(plan: MemoryPlan, processor: Processor | None, num_ranks: int) -> None:
    def size(num_bytes: int) -> str:
        return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"

    logger.info(
        "memory on %s%s: weights %s, pictures %s, K/V %s = %d pages of %d tokens (%d bytes a token)",
        plan.device,
        f", like each of {num_ranks} ranks" if num_ranks > 1 else "",
        size(plan.weights),
        size(plan.vision_cache),
        size(plan.kv_cache),
        plan.num_pages,
        plan.page_size,
        plan.kv_bytes_per_token,
    )
    logger.info(
        "fits %d tokens at once: %d requests of the full context of %d; at most %d requests run together",
        plan.num_tokens,
        plan.num_tokens // plan.context_length,
        plan.context_length,
        plan.max_running_requests,
    )
    if processor is not None and plan.image_token_bytes:
        width, height = 1024, 1024
        num_tokens = processor.plan(width, height).num_tokens
        logger.info(
            "a picture of %dx%d takes %d tokens: %d fit at once, %d stay encoded for the next request",
            width,
            height,
            num_tokens,
            plan.num_tokens // num_tokens,
            plan.vision_cache // (num_tokens * plan.image_token_bytes),
        )
