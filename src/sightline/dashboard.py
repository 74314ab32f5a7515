"""`sightline dashboard`: what to look at and what to be woken by, from the metrics that the server exports.

A Grafana dashboard (JSON, to be imported or provisioned) and Prometheus alert rules (YAML). Every expression is tried in
tests/operations against a real Prometheus that scrapes a real server.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

# Grafana puts an interval here that always holds several scrapes.
_RATE = "[$__rate_interval]"
_ONLY = '{instance=~"$instance"}'


class Query(NamedTuple):
    """expr: PromQL; legend: in Grafana's form, labels in double braces."""

    expr: str
    legend: str


class Panel(NamedTuple):
    """One graph. unit: Grafana's name of it. width: of 24 columns."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    help: str = ""
    width: int = 8


class Alert(NamedTuple):
    """One rule. after: how long `expr` must hold; severity: `page` wakes somebody, `ticket` can wait for the morning."""

    name: str
    expr: str
    after: str
    severity: str
    summary: str
    description: str


def _rate(name: str, by: str = "", where: str = "") -> str:
    selector = '{instance=~"$instance"' + (f", {where}" if where else "") + "}"
    grouped = f"sum by ({by})" if by else "sum"
    return f"{grouped} (rate(sightline_{name}{selector}{_RATE}))"


def _total(name: str, where: str = "") -> str:
    return f'sum (sightline_{name}{{instance=~"$instance"{f", {where}" if where else ""}}})'


def _quantiles(name: str) -> tuple[Query, ...]:
    buckets = _rate(f"{name}_bucket", "le")
    return tuple(Query(f"histogram_quantile({q}, {buckets})", f"p{round(100 * q)}") for q in (0.5, 0.95, 0.99))


def _share(part: str, whole: str) -> str:
    return f"{_rate(part)} / ({_rate(whole)} > 0)"


ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "At a glance",
        (
            Panel("Ready", "none", (Query('sightline_state{state="ready", instance=~"$instance"}', "{{instance}}"),), "1 while requests run."),
            Panel("Engines alive", "none", (Query(f"sightline_engines_alive{_ONLY}", "alive"), Query(f"sightline_engines{_ONLY}", "started")), "A dead engine is not started again."),
            Panel("Calls in flight", "none", (Query(f"sightline_calls_in_flight{_ONLY}", "{{instance}}"),)),
        ),
    ),
    (
        "What clients feel",
        (
            Panel("Calls by outcome", "reqps", (Query(_rate("calls_total", "outcome"), "{{outcome}}"),)),
            Panel("Time to first token", "s", _quantiles("time_to_first_token_seconds")),
            Panel("Between tokens", "s", _quantiles("inter_token_seconds")),
            Panel("Whole request", "s", _quantiles("request_seconds")),
            Panel("Answers by finish reason", "reqps", (Query(_rate("choices_total", "finish_reason"), "{{finish_reason}}"),)),
            Panel("Errors by code", "reqps", (Query(_rate("calls_errors_total", "reason"), "{{reason}}"),)),
        ),
    ),
    (
        "Work",
        (
            Panel("Tokens", "none", (Query(_rate("prompt_tokens_total"), "prompt"), Query(_rate("prefix_cached_tokens_total"), "of these, cached"), Query(_rate("generation_tokens_total"), "generated")), "Tokens a second."),
            Panel("Answers", "none", (Query(_total("requests_running"), "running"), Query(_total("requests_waiting"), "waiting"))),
            Panel("A step of the engine", "s", _quantiles("step_seconds")),
            Panel("Time in the queue", "s", _quantiles("queue_seconds")),
            Panel("Prefill", "s", _quantiles("prefill_seconds"), "From an answer's first step to its first token."),
            Panel("Answers set back", "none", (Query(_rate("retractions_total"), "set back"),), "For want of K/V pages; a second."),
        ),
    ),
    (
        "Pictures",
        (
            Panel("Pictures by result", "none", (Query(_rate("pictures_total", "source, result"), "{{source}}: {{result}}"),), "Pictures a second."),
            Panel("Fetching", "s", _quantiles("picture_fetch_seconds")),
            Panel("Decoding", "s", _quantiles("picture_decode_seconds")),
            Panel("Resizing", "s", _quantiles("picture_resize_seconds"), "On the processor; a GPU resizes as part of encoding."),
            Panel("Encoding", "s", _quantiles("picture_encode_seconds"), "On a GPU: its launch."),
            Panel("Tokens of pictures", "none", (Query(_rate("image_tokens_total"), "tokens"),), "Tokens a second."),
        ),
    ),
    (
        "Caches and memory",
        (
            Panel("Hit rates", "percentunit", (Query(_share("prefix_cached_tokens_total", "prefix_queried_tokens_total"), "prefix, by tokens"), Query(f"{_rate('vision_cache_hits_total')} / ({_rate('vision_cache_hits_total')} + {_rate('vision_cache_misses_total')} > 0)", "pictures"))),
            Panel("K/V pages", "none", (Query(_total("kv_pages"), "all"), Query(_total("kv_pages_cached"), "cached"), Query(_total("kv_pages_locked"), "of these, in use"), Query(_total("kv_pages_free"), "free"))),
            Panel("Pictures' features", "bytes", (Query(_total("vision_cache_bytes"), "held"), Query(_total("vision_cache_capacity_bytes"), "budget"))),
            Panel("Memory of the HTTP process", "bytes", (Query(f"process_resident_memory_bytes{_ONLY}", "{{instance}}"), Query(f"sightline_held_bytes{_ONLY}", "bodies and pictures in flight"))),
            Panel("Processor of the HTTP process", "none", (Query(f"rate(process_cpu_seconds_total{_ONLY}{_RATE})", "{{instance}}"),), "Cores."),
            Panel("Evicted pictures", "none", (Query(_rate("vision_cache_evictions_total"), "evicted"),), "Pictures a second."),
        ),
    ),
    (
        "What makes everybody wait",
        (
            Panel("Event loop late by", "s", _quantiles("event_loop_lag_seconds"), "Of the HTTP process: every request in it waits as long."),
            Panel("Slow readers", "none", (Query(_rate("write_stall_seconds_sum"), "waiting"),), "Answers that wait for their clients to read."),
            Panel("Silence of engines", "s", (Query(f"sightline_engine_silence_seconds{_ONLY}", "{{instance}} {{engine}}"),), "Since the last sign of life of one that has work."),
            Panel("Aborted answers", "none", (Query(_rate("aborts_total", "state"), "{{state}}"),), "By what they were at; a second."),
            Panel("Pixels being decoded", "bytes", (Query(f"sightline_picture_decoding_bytes{_ONLY}", "{{instance}}"),)),
            Panel("Prompt tokens by key", "none", (Query(_rate("tenant_prompt_tokens_total", "tenant"), "{{tenant}}"), Query(_rate("tenant_cached_tokens_total", "tenant"), "{{tenant}}: of these, cached")), "Tokens a second."),
        ),
    ),
)  # fmt: skip

_ERRORS = 'sum by (instance) (rate(sightline_calls_total{outcome="failed"}[5m]))'
_REFUSED = 'sum by (instance) (rate(sightline_calls_total{outcome="refused"}[5m]))'
_CALLS = "sum by (instance) (rate(sightline_calls_received_total[5m]))"
_FETCHED = 'sum by (instance) (rate(sightline_pictures_total{source=~"https?"}[15m]))'
_FETCHED_WELL = 'sum by (instance) (rate(sightline_pictures_total{source=~"https?", result="ok"}[15m]))'

ALERTS: tuple[Alert, ...] = (
    Alert(
        "SightlineNotReady", 'max by (instance) (sightline_state{state="ready"}) == 0', "15m", "page",
        "{{ $labels.instance }} does not serve",
        "It has not been ready for 15 minutes. /startupz says which phase of loading it is in; the log says more.",
    ),
    Alert(
        "SightlineEngineLost", "sightline_engines_alive < sightline_engines", "1m", "page",
        "An engine of {{ $labels.instance }} died",
        "The others go on with less room. The log says why it died; a restart of the server brings it back.",
    ),
    Alert(
        "SightlineStandsStill",
        "sum by (instance) (sightline_requests_running) > 0 and sum by (instance) (rate(sightline_steps_total[2m])) == 0",
        "2m", "page",
        "{{ $labels.instance }} has work and does none",
        "The watchdog (--stall-timeout) ends such an engine; until then nobody is answered.",
    ),
    Alert(
        "SightlineFailing", f"{_ERRORS} / ({_CALLS} > 0) > 0.02", "5m", "page",
        "{{ $labels.instance }} fails {{ $value | humanizePercentage }} of its calls",
        "By its own fault, not the clients'. sightline_calls_errors_total says with which codes.",
    ),
    Alert(
        "SightlineRefusing", f"{_REFUSED} / ({_CALLS} > 0) > 0.05", "10m", "ticket",
        "{{ $labels.instance }} refuses {{ $value | humanizePercentage }} of its calls",
        "More is asked than it can do: start another server or engine, or raise --max-queued-requests and let clients wait.",
    ),
    Alert(
        "SightlineSlowFirstToken",
        "histogram_quantile(0.95, sum by (instance, le) (rate(sightline_time_to_first_token_seconds_bucket[10m]))) > 5",
        "10m", "ticket",
        "First tokens of {{ $labels.instance }} take {{ $value | humanizeDuration }}",
        "Compare sightline_queue_seconds (too many requests), picture_fetch_seconds (slow hosts) and prefill_seconds (long prompts).",
    ),
    Alert(
        "SightlineSetBack", "sum by (instance) (rate(sightline_retractions_total[10m])) > 0.1", "10m", "ticket",
        "{{ $labels.instance }} computes answers twice for want of memory",
        "K/V pages run out while answers grow. Lower --max-running-requests, or give it more memory.",
    ),
    Alert(
        "SightlinePagesLost", "max by (instance) (sightline_kv_pages_lost) > 0", "1m", "ticket",
        "{{ $labels.instance }} has lost {{ $value }} K/V pages",
        "No answer owns them and nothing gives them back: a fault of sightline. Restart when it suits, and report it with the log.",
    ),
    Alert(
        "SightlinePicturesUnreachable", f"1 - {_FETCHED_WELL} / ({_FETCHED} > 0.1) > 0.2", "15m", "ticket",
        "{{ $labels.instance }} cannot fetch {{ $value | humanizePercentage }} of the pictures",
        "Their hosts fail or are too slow, or this machine's way out is broken. sightline_pictures_total says how.",
    ),
)  # fmt: skip


def dashboard() -> dict[str, Any]:
    """Grafana's model of the dashboard (schema 39, Grafana 10 and later)."""
    panels: list[dict[str, Any]] = []
    top = 0
    for row, members in ROWS:
        panels.append({"type": "row", "title": row, "gridPos": _place(0, top, 24, 1), "panels": []})
        top += 1
        left = 0
        for panel in members:
            if left + panel.width > 24:
                left, top = 0, top + 8
            panels.append(_graph(panel, _place(left, top, panel.width, 8)))
            left += panel.width
        top += 8
    for number, each in enumerate(panels, 1):
        each["id"] = number
    return {
        "title": "sightline",
        "uid": "sightline",
        "tags": ["sightline"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source(), _instances()]},
        "panels": panels,
    }


def alert_rules() -> dict[str, Any]:
    """A rule file of Prometheus."""
    rules = [
        {
            "alert": alert.name,
            "expr": alert.expr,
            "for": alert.after,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.summary, "description": alert.description},
        }
        for alert in ALERTS
    ]
    return {"groups": [{"name": "sightline", "rules": rules}]}


def _place(x: int, y: int, w: int, h: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": w, "h": h}


def _graph(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${source}"}
    targets = [
        {"refId": chr(ord("A") + i), "expr": query.expr, "legendFormat": query.legend, "datasource": source}
        for i, query in enumerate(panel.queries)
    ]
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.help,
        "gridPos": place,
        "datasource": source,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": targets,
    }


def _source() -> dict[str, Any]:
    return {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _instances() -> dict[str, Any]:
    return {
        "name": "instance",
        "label": "Server",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${source}"},
        "query": {"query": "label_values(sightline_build_info, instance)", "refId": "instances"},
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
    }


def main(argv: Sequence[str]) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="sightline dashboard",
        description="Print a Grafana dashboard (JSON) for the metrics of `sightline serve`, or alert rules for Prometheus (YAML).",
    )
    parser.add_argument("--alerts", action="store_true", help="the alert rules instead of the dashboard")
    options = parser.parse_args(argv)
    if options.alerts:
        yaml.safe_dump(alert_rules(), sys.stdout, sort_keys=False, width=120)
    else:
        json.dump(dashboard(), sys.stdout, indent=2)
        sys.stdout.write("\n")
    return 0
