"""sightline as a Ray Serve application: `serve run sightline.serve.ray:build_app model=... `.

An ingress without a model reads each request and passes it to one of the engine deployment's replicas, each of which is a whole
server (engine process, HTTP application, caches) without a port. Two deployments instead of one, because Ray's request router
sees the arguments of a call between deployments and not the body of an HTTP request: only so can it choose by picture and prefix.

Imports no torch: the model lives in the engine's process, a child of the replica's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, NamedTuple

import msgspec
from pydantic import Field, ValidationError

from sightline import demo
from sightline.config import ServerConfig
from sightline.engine.node import run_node
from sightline.engine.node_link import check_nodes
from sightline.engine.routing import Footprint, Router
from sightline.errors import EngineDeadError, OverloadedError, ReplicaDeadError, RequestError, SettingError
from sightline.logging import setup_logging
from sightline.serve.body import body_footprint
from sightline.server.app import create_app
from sightline.server.errors import error_body, error_response
from sightline.server.lifecycle import FAILED, Lifecycle

try:
    import ray
    from ray import serve
    from ray.exceptions import RayActorError
    from ray.serve.config import RequestRouterConfig
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
    from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
except ImportError as error:
    raise ImportError(f"sightline.serve.ray needs Ray Serve: pip install 'sightline[ray]' ({error})") from error

logger = logging.getLogger("sightline.server")

ENGINE, INGRESS = "engine", "ingress"
_EXIT_ENGINE_DIED = 7
# Probes tell at once that nobody is there; requests wait for a replica that is starting.
_PROBES = frozenset(("/readyz", "/ready", "/health", "/ping", "/v2/health/ready", "/startupz", "/health_generate"))
_PROBE_SECONDS = 2.0
_RAY_ERRORS = (BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError, RayActorError)

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class RayConfig(ServerConfig):
    """Everything that `sightline serve` takes, and Ray's own options of the engine deployment, under Ray's names."""

    autoscaling_config: dict[str, Any] = Field({"min_replicas": 1, "max_replicas": 1, "target_ongoing_requests": 16})
    ray_actor_options: dict[str, Any] = Field({"num_cpus": 1})
    max_ongoing_requests: int = Field(64, ge=1)
    health_check_period_s: float = Field(10.0, gt=0)

    def server_config(self) -> ServerConfig:
        """The part that is a server's."""
        return ServerConfig(**{name: getattr(self, name) for name in ServerConfig.model_fields})


def build_app(args: dict[str, Any]) -> serve.Application:
    """The application over its settings, as `serve run` and a config's `args` give them. Raises `SettingError`."""
    try:
        config = RayConfig(**args)
    except ValidationError as error:
        first = error.errors()[0]
        raise SettingError(f"args: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if config.dp_size != 1:
        raise SettingError("args: dp_size: Ray starts the replicas; use autoscaling_config.")
    if config.node_rank or config.dist_init_addr or config.dist_secret:
        raise SettingError("args: Ray numbers the nodes and lets them meet; of these settings, nnodes is enough.")
    if config.nnodes > 1:
        check_nodes(_meeting_point(config))
    engine = serve.deployment(
        Server,
        name=ENGINE,
        **_resources(config),
        autoscaling_config=config.autoscaling_config,
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        graceful_shutdown_timeout_s=config.drain_timeout + 5,
        health_check_period_s=config.health_check_period_s,
        request_router_config=RequestRouterConfig(
            request_router_class=CacheRouter, request_router_kwargs={"method": config.load_balance_method}
        ),
    )
    settings = config.server_config().model_dump(mode="json")
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name=INGRESS,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=10 * config.max_queued_requests,
        graceful_shutdown_timeout_s=config.drain_timeout + 5,
    )
    return ingress.bind(engine.bind(settings), settings)


def _resources(config: RayConfig) -> dict[str, Any]:
    """What each replica holds, as options of the deployment: a placement group of its own, with a bundle for the ranks of each of its
    nodes, and these on as few machines as can be.

    Raises `SettingError` for another number of GPUs than ranks.
    """
    options = {"num_cpus": 1, **config.ray_actor_options}
    ranks = config.ranks_per_node
    if config.tp_size > 1 and config.device != "cpu" and options.setdefault("num_gpus", ranks) != ranks:
        each = " on each node" if config.nnodes > 1 else ""
        given = options["num_gpus"]
        raise SettingError(
            f"args: ray_actor_options: num_gpus is {given}; tp_size {config.tp_size} needs {ranks}{each}."
        )
    amounts = {"CPU": options["num_cpus"], "GPU": options.get("num_gpus"), "memory": options.get("memory")}
    amounts |= options.get("resources", {})
    if kind := options.get("accelerator_type"):
        amounts[f"accelerator_type:{kind}"] = 0.001
    bundle = {name: amount for name, amount in amounts.items() if amount}
    if not bundle:
        return {"ray_actor_options": options}
    return {
        "ray_actor_options": options,
        "placement_group_bundles": [bundle] * config.nnodes,
        "placement_group_strategy": "STRICT_PACK" if config.nnodes == 1 else "PACK",
    }


def _meeting_point(config: ServerConfig) -> ServerConfig:
    """With an address of this machine where the nodes of a replica meet, and a new secret that they know each other by."""
    host = ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as taken:
        taken.bind((host, 0))
        port = taken.getsockname()[1]
    return config.model_copy(update={"dist_init_addr": f"{host}:{port}", "dist_secret": secrets.token_hex(32)})


def _start_nodes(config: ServerConfig) -> list[asyncio.Future[None]]:
    """The replica's other nodes, each in a bundle of its placement group. They end with node 0, and raise what they die of."""
    group = ray.util.get_current_placement_group()
    tasks = []
    for i, bundle in enumerate(group.bundle_specs[1:], start=1):
        amounts = dict(bundle)
        task = ray.remote(_node).options(
            num_cpus=amounts.pop("CPU", 0),
            num_gpus=amounts.pop("GPU", 0),
            memory=amounts.pop("memory", None),
            resources=amounts,
            max_retries=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, i),
        )
        settings = config.model_copy(update={"node_rank": i}).model_dump(mode="json")
        tasks.append(asyncio.ensure_future(task.remote(settings)))
    return tasks


def _node(settings: dict[str, Any]) -> None:
    """Raises `StartupError`, or `EngineDeadError` when the engine ends of anything but its being done."""
    if run_node(_with_model(ServerConfig(**settings)), threading.Event()):
        raise EngineDeadError("a rank or a node of this replica is gone; see its log")


def _with_model(config: ServerConfig) -> ServerConfig:
    """The bundled one where none is named."""
    return config if config.model else config.model_copy(update={"model": str(demo.model_path())})


class Call(NamedTuple):
    """An HTTP request on its way to a replica. headers: lower-case names; mark: what the router goes by."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    mark: Footprint


# -- the engine deployment ---------------------------------------------------------------------------------------------


class Server:
    """One replica: the server's application over its own engine process. Ready when the model is."""

    # Ray awaits it: until then no request comes.
    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]
        config = ServerConfig(**settings)
        setup_logging(config.log_level, config.log_format)
        if config.nnodes > 1:
            config = _meeting_point(config)
        self._lifecycle = Lifecycle(_with_model(config), demo=not config.model)
        self._nodes = _start_nodes(config) if config.nnodes > 1 else []
        loading = asyncio.ensure_future(self._lifecycle.load())
        try:
            for ended in (await asyncio.wait([loading, *self._nodes], return_when=asyncio.FIRST_COMPLETED))[0]:
                ended.result()
            await loading
        except Exception:
            loading.cancel()
            await self._lifecycle.close()
            raise
        self._app = create_app(self._lifecycle)
        self._watching = asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        logger.error("the engine died: %s", await self._lifecycle.watch())
        # A moment for the clients in flight to read their errors; then Ray sees at once that the replica is gone.
        await asyncio.sleep(0.5)
        os._exit(_EXIT_ENGINE_DIED)

    async def answer(self, call: Call) -> AsyncGenerator[dict[str, Any]]:
        """The application's ASGI messages. Closing the generator is the client's going away."""
        messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        body: list[dict[str, Any]] = [{"type": "http.request", "body": call.body, "more_body": False}]
        gone = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if body:
                return body.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app(_scope(call), receive, messages.put)  # type: ignore[arg-type]
            finally:
                messages.put_nowait(None)

        running = asyncio.ensure_future(run())
        try:
            while (message := await messages.get()) is not None:
                yield message
        finally:
            gone.set()
            await running

    async def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        if self._lifecycle.state == FAILED or self._lifecycle.engine.stalled:
            raise RuntimeError("the engine does not answer")

    async def __del__(self) -> None:
        # Ray calls it when the requests in flight are answered, or their time is over.
        self._watching.cancel()
        await self._lifecycle.close()


def _scope(call: Call) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": call.path,
        "raw_path": call.path.encode(),
        "query_string": call.query,
        "root_path": "",
        "headers": call.headers,
        "client": None,
        "server": None,
    }


class CacheRouter(RequestRouter):
    """Ray's request router over ours: the replica whose caches hold most of the prompt, unless it has too much to do."""

    def initialize_state(self, method: Any = "cache_aware", prefix_tokens: int = 1 << 20) -> None:
        """prefix_tokens: what is remembered of each replica; the router cannot ask for the size of its caches."""
        self._router: Router[ReplicaID] = Router(method, prefix_tokens=prefix_tokens, picture_tokens=prefix_tokens)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One rank for each replica, best first: a full one passes the request on to the next."""
        if pending_request is None:
            return [candidate_replicas]
        replicas = {replica.replica_id: replica for replica in candidate_replicas}
        loads = {i: self.replica_queue_len_cache.get(i) or 0 for i in replicas}
        return [[replicas[i]] for i in self._router.ranked(_mark(pending_request), loads)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Remember what went where."""
        self._router.record(_mark(pending_request), replica_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Its caches are gone."""
        super().on_replica_actor_died(replica_id)
        self._router.forget(replica_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Forget those that were scaled away."""
        for replica_id in self.curr_replicas.keys() - {replica.replica_id for replica in replicas}:
            self._router.forget(replica_id)
        super().update_replicas(replicas)


def _mark(request: PendingRequest) -> Footprint:
    (call,) = request.args
    mark: Footprint = call.mark
    return mark


# -- the ingress -------------------------------------------------------------------------------------------------------


class Ingress:
    """The deployment that Ray's HTTP proxies call."""

    def __init__(self, engines: Any, settings: dict[str, Any]) -> None:
        self._application = PassOn(engines, max_body=int(ServerConfig(**settings).max_body_mb * 1e6))

    def __serve_build_asgi_app__(self) -> Any:
        return self._application


class PassOn:
    """An ASGI application that reads requests, passes them to a replica, and says in OpenAI's shape what Ray has to say."""

    def __init__(self, engines: Any, *, max_body: int) -> None:
        """engines: Ray's handle of the engine deployment. max_body: in bytes."""
        self._engines = engines.options(stream=True, method_name="answer")
        self._max_body = max_body

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        # Of an application that has a prefix among others, the replicas know nothing of it.
        scope = {**scope, "path": scope["path"].removeprefix(scope.get("root_path", ""))}
        if scope["path"] in ("/livez", "/v2/health/live"):
            await _send(send, 200, [(b"content-type", b"application/json")], b'{"status":"alive"}')
            return
        held: list[dict[str, Any]] = []
        started: list[dict[str, Any]] = []

        async def send_noting(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                # Ray's proxy puts it there itself.
                message = {**message, "headers": [h for h in message["headers"] if h[0] != b"x-request-id"]}
                if not _is_stream(message):
                    # it goes with the body: until then, a replica's death can be said
                    held.append(message)
                    return
                started.append(message)
            elif held:
                started.append(held.pop())
                await send(started[0])
            await send(message)

        try:
            await self._pass_on(await self._call(scope, receive), send_noting)
        except (RequestError, OverloadedError, ReplicaDeadError) as error:
            await _tell(error, started, send)

    async def _call(self, scope: dict[str, Any], receive: Receive) -> Call:
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self._max_body:
                limit = f"{self._max_body / 1e6:g} MB"
                raise RequestError(f"The body is larger than {limit}.", code="request_too_large", status=413)
            if not message.get("more_body"):
                break
        headers = [(bytes(name).lower(), bytes(value)) for name, value in scope["headers"]]
        keys = dict(headers)
        tenant = keys.get(b"authorization", b"") or keys.get(b"x-api-key", b"")
        mark = body_footprint(bytes(body), tenant)
        return Call(scope["method"], scope["path"], scope["query_string"], headers, bytes(body), mark)

    async def _pass_on(self, call: Call, send: Send) -> None:
        """Raises `OverloadedError` or `ReplicaDeadError` for what Ray reports."""
        answer = self._engines.remote(call)
        patience = _PROBE_SECONDS if call.path in _PROBES else None
        done = False
        try:
            async with asyncio.timeout(patience) as limit:
                async for message in answer:
                    limit.reschedule(None)
                    await send(message)
            done = True
        except TimeoutError as error:
            raise OverloadedError("No replica is ready.", code="server_starting", retry_after=2) from error
        except BackPressureError as error:
            raise OverloadedError("The server is busy; try again soon.", code="overloaded") from error
        except (DeploymentUnavailableError, ReplicaUnavailableError) as error:
            raise OverloadedError("No replica is ready.", code="server_starting", retry_after=2) from error
        except RayActorError as error:
            raise ReplicaDeadError(f"a replica died: {type(error).__name__}") from error
        finally:
            if not done:
                # What failed by itself says so again here.
                with contextlib.suppress(*_RAY_ERRORS):
                    answer.cancel()


async def _send(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _tell(error: Exception, started: list[dict[str, Any]], send: Send) -> None:
    """As an answer, or as the last event of a stream that has begun; any other answer that has begun is cut off."""
    if not started:
        response = error_response(error)
        await _send(send, response.status_code, response.raw_headers, bytes(response.body))
        return
    if not _is_stream(started[0]):
        raise error
    event = b"data: " + msgspec.json.encode(error_body(error)) + b"\n\n"
    await send({"type": "http.response.body", "body": event})


def _is_stream(start: dict[str, Any]) -> bool:
    return dict(start["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
