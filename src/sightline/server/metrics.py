"""`/metrics`: what the engines and this process count, for Prometheus, from the snapshots that `/server_info` shows too.

Names begin with `sightline_`: colons, which the peers use, are kept by Prometheus for recording rules. Labels take values from
small sets of our own (states, reasons, codes, engines), never from a client.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from fastapi import APIRouter, Request
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from starlette.responses import PlainTextResponse, Response

import sightline
from sightline.errors import NotFoundError
from sightline.server import limits
from sightline.server.admission import Outcome
from sightline.server.lifecycle import DRAINING, FAILED, LOADING, READY, Lifecycle
from sightline.server.metrics_compat import aliases
from sightline.types import EngineStats, Histogram

PATH = "/metrics"

router = APIRouter()


class Definition(NamedTuple):
    """One metric. source: for an engine's metrics, the field or property of its snapshot; "" where code below fills it."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    source: str = ""


def _engine(name: str, kind: Literal["counter", "gauge", "histogram"], source: str, help: str) -> Definition:
    return Definition(name, kind, help, ("engine",), source)


DEFINITIONS = (
    Definition("build_info", "gauge", "1, with the version and the model in labels.", ("version", "model")),
    Definition("state", "gauge", "1 for the state that the server is in.", ("state",)),
    Definition("ready_seconds", "gauge", "Seconds from the start until requests ran; 0 while loading."),
    Definition("uptime_seconds", "gauge", "Seconds since the start."),
    Definition("engines", "gauge", "Engines that were started."),
    Definition("engines_alive", "gauge", "Engines that live; a dead one is not started again."),
    Definition("limit", "gauge", "A bound in force, as /server_info and the page on security name it.", ("name", "unit")),
    # calls
    Definition("calls_received_total", "counter", "Calls that may cost something, from their headers on."),
    Definition("calls_total", "counter", "Calls that ended, by how.", ("outcome",)),
    Definition("calls_errors_total", "counter", "Calls that ended with an error, by its code.", ("reason",)),
    Definition("calls_in_flight", "gauge", "Calls now, waiting ones included."),
    Definition("held_bytes", "gauge", "Bodies and encoded pictures of the calls in flight."),
    Definition("held_tokens", "gauge", "Prompt tokens of the calls in flight."),
    Definition("choices_total", "counter", "Answers that ended, by finish reason.", ("finish_reason",)),
    Definition("time_to_first_token_seconds", "histogram", "From a request's body to its first token."),
    Definition("inter_token_seconds", "histogram", "Between two tokens of an answer."),
    Definition("request_seconds", "histogram", "From a request's body to the end of its answer."),
    Definition("write_stall_seconds", "histogram", "Waits of answers for clients that do not read; --client-timeout ends them."),
    Definition("event_loop_lag_seconds", "histogram", "How late the HTTP process' event loop is, measured four times a second."),
    Definition("tenant_prompt_tokens_total", "counter", "Prompt tokens by key: key-1 is the first of --api-key.", ("tenant",)),
    Definition("tenant_cached_tokens_total", "counter", "Of these, tokens found in the prefix cache.", ("tenant",)),
    # pictures
    Definition("pictures_total", "counter", "Pictures asked for, by kind of URL and result.", ("source", "result")),
    Definition("picture_fetched_bytes_total", "counter", "Bytes of pictures that were fetched."),
    Definition("picture_fetch_seconds", "histogram", "Fetching a picture, failures included."),
    Definition("picture_decode_seconds", "histogram", "Decoding a picture in its worker thread."),
    Definition("picture_decoding_bytes", "gauge", "Memory for pixels of the pictures that are decoded now."),
    Definition("picture_resize_seconds", "histogram", "Resizing a picture in its worker thread."),
    # engines
    _engine("requests_running", "gauge", "num_running", "Answers that are computed now."),
    _engine("requests_waiting", "gauge", "num_waiting", "Answers that wait for their turn."),
    _engine("waiting_tokens", "gauge", "waiting_tokens", "Tokens of the answers that wait."),
    _engine("prompt_tokens_total", "counter", "prompt_tokens", "Prompt tokens, pictures included."),
    _engine("image_tokens_total", "counter", "image_tokens", "Prompt tokens that stand for pictures."),
    _engine("generation_tokens_total", "counter", "generated_tokens", "Tokens generated."),
    _engine("prefix_queried_tokens_total", "counter", "queried_tokens", "Tokens looked up in the prefix cache."),
    _engine("prefix_cached_tokens_total", "counter", "cached_tokens", "Of these, tokens that were there."),
    _engine("retractions_total", "counter", "retractions", "Answers set back for want of K/V pages."),
    _engine("recomputed_tokens_total", "counter", "recomputed_tokens", "Tokens whose K/V retractions gave back."),
    Definition("aborts_total", "counter", "Answers ended because nobody wanted them any more, by what they were at.", ("engine", "state")),
    Definition("engine_silence_seconds", "gauge", "Since the last sign of life of an engine that has work; --stall-timeout ends it.", ("engine",)),
    _engine("steps_total", "counter", "steps", "Steps of the engine."),
    _engine("queue_seconds", "histogram", "queue_seconds", "From an answer's arrival to its first step."),
    _engine("prefill_seconds", "histogram", "prefill_seconds", "From an answer's first step to its first token."),
    _engine("picture_encode_seconds", "histogram", "encode_seconds", "Encoding of a step's pictures; its launch on a GPU."),
    _engine("step_seconds", "histogram", "step_seconds", "A turn of the engine's loop that had work."),
    _engine("kv_pages", "gauge", "pages_total", "Pages of K/V."),
    _engine("kv_pages_free", "gauge", "pages_free", "Pages that hold nothing."),
    _engine("kv_pages_cached", "gauge", "pages_cached", "Pages of the prefix cache, locked ones included."),
    _engine("kv_pages_locked", "gauge", "pages_locked", "Pages of the prefix cache that answers use now."),
    _engine("kv_pages_lost", "gauge", "pages_lost", "Pages that are neither free nor cached nor an answer's: must be 0."),
    _engine("kv_usage_ratio", "gauge", "kv_usage", "Part of the pages, 0 to 1, that answers use and that cannot be taken from them."),
    _engine("pictures_encoded_total", "counter", "images_encoded", "Pictures encoded."),
    _engine("vision_cache_hits_total", "counter", "vision_cache_hits", "Pictures whose features were there."),
    _engine("vision_cache_misses_total", "counter", "vision_cache_misses", "Pictures whose features were not."),
    _engine("vision_cache_evictions_total", "counter", "vision_cache_evictions", "Pictures' features that made room."),
    _engine("vision_cache_bytes", "gauge", "vision_cache_bytes", "Bytes of pictures' features."),
    _engine("vision_cache_capacity_bytes", "gauge", "vision_cache_capacity", "Bytes that they may take."),
)  # fmt: skip

Samples = Mapping[tuple[str, ...], float | Histogram]


@router.get(PATH, response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Prometheus' text format; also while the model loads. 404 with `--no-metrics`."""
    lifecycle: Lifecycle = request.app.state.lifecycle
    if not lifecycle.config.metrics:
        raise NotFoundError(f"Unknown URL: GET {PATH}.", code="unknown_url")
    return Response(render(lifecycle), media_type=CONTENT_TYPE_LATEST)


def render(lifecycle: Lifecycle) -> bytes:
    """The page as it stands."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Page(lifecycle))
    ProcessCollector(registry=registry)
    return generate_latest(registry)


class _Page(Collector):
    """One reading of all counters. Nothing is locked: they belong to the event loop that reads them."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        lifecycle = self._lifecycle
        stats = lifecycle.replica_stats
        values = _http(lifecycle)
        for definition in DEFINITIONS:
            yield _family(definition, values.get(definition.name) or _of_engines(definition, stats))
        yield from aliases(lifecycle, stats)


def _http(lifecycle: Lifecycle) -> dict[str, Samples]:
    """What this process counts, by name and label values."""
    admission, observed = lifecycle.admission, lifecycle.observed
    now = time.monotonic()
    alive, total = lifecycle.num_alive
    values: dict[str, Samples] = {
        "build_info": {(sightline.__version__, lifecycle.model_name): 1},
        "state": {(s,): float(s == lifecycle.state) for s in (LOADING, READY, DRAINING, FAILED)},
        "ready_seconds": {(): lifecycle.ready_after or 0.0},
        "uptime_seconds": {(): now - lifecycle.started},
        "engines": {(): total},
        "engines_alive": {(): alive},
        "calls_received_total": {(): admission.num_received},
        "calls_total": {(o.value,): admission.outcomes[o] for o in Outcome},
        "calls_errors_total": {(r,): n for r, n in admission.reasons.items()},
        "calls_in_flight": {(): admission.num_calls},
        "held_bytes": {(): admission.num_bytes},
        "held_tokens": {(): admission.num_tokens},
        "choices_total": {(r,): n for r, n in observed.finishes.items()},
        "time_to_first_token_seconds": {(): observed.first_token},
        "inter_token_seconds": {(): observed.between_tokens},
        "request_seconds": {(): observed.request},
        "write_stall_seconds": {(): observed.stalls},
        "event_loop_lag_seconds": {(): observed.loop_lag},
        "tenant_prompt_tokens_total": {(tenant,): n for tenant, n in observed.prompt_tokens.items()},
        "tenant_cached_tokens_total": {(tenant,): n for tenant, n in observed.cached_tokens.items()},
        "engine_silence_seconds": {(str(i),): seconds for i, seconds in enumerate(lifecycle.silences)},
        "aborts_total": {
            (str(i), state): getattr(each, f"aborts_{state}")
            for i, each in enumerate(lifecycle.replica_stats)
            for state in ("waiting", "prefill", "decode")
        },
    }
    media = lifecycle.media
    if media is not None:
        bounds = limits.table(lifecycle.config, media.limits)
        numbers = (int, float)
        values |= {
            "limit": {(b.name, b.unit): b.value for b in bounds if isinstance(b.value, numbers) and b.unit},
            "pictures_total": {key: n for key, n in media.stats.loads.items()},  # noqa: C416 (dict() loses the wider type)
            "picture_fetched_bytes_total": {(): media.counters.fetched_bytes},
            "picture_fetch_seconds": {(): media.stats.fetch_seconds},
            "picture_decode_seconds": {(): media.stats.decode_seconds},
            "picture_decoding_bytes": {(): lifecycle.pipeline.decoding_bytes},
            "picture_resize_seconds": {(): media.stats.resize_seconds},
        }
    return values


def _of_engines(definition: Definition, stats: Sequence[EngineStats]) -> Samples:
    if not definition.source:
        return {}
    return {(str(i),): getattr(each, definition.source) for i, each in enumerate(stats)}


def _family(definition: Definition, samples: Samples) -> Metric:
    name = f"sightline_{definition.name}"
    if definition.kind == "histogram":
        histograms = HistogramMetricFamily(name, definition.help, labels=definition.labels)
        for labels, value in samples.items():
            assert isinstance(value, Histogram)
            histograms.add_metric(labels, value.buckets(), value.total)
        return histograms
    family = (CounterMetricFamily if definition.kind == "counter" else GaugeMetricFamily)(
        name, definition.help, labels=definition.labels
    )
    for labels, value in samples.items():
        assert not isinstance(value, Histogram)
        family.add_metric(labels, value)
    return family
