"""What routers and autoscalers read, under the names that vLLM and SGLang export: `--metrics-compat`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from sightline.server.lifecycle import Lifecycle
from sightline.types import EngineStats

# The peer's name -> the field or property of a snapshot; names that end in _total are counters.
_ENGINE: dict[str, dict[str, str]] = {
    "vllm": {
        "num_requests_running": "num_running",
        "num_requests_waiting": "num_waiting",
        "kv_cache_usage_perc": "kv_usage",
        "prompt_tokens_total": "prompt_tokens",
        "generation_tokens_total": "generated_tokens",
        "prefix_cache_queries_total": "queried_tokens",
        "prefix_cache_hits_total": "cached_tokens",
        "num_preemptions_total": "retractions",
        "mm_cache_queries_total": "pictures_asked",
        "mm_cache_hits_total": "vision_cache_hits",
    },
    "sglang": {
        "num_running_reqs": "num_running",
        "num_queue_reqs": "num_waiting",
        "token_usage": "kv_usage",
        "cache_hit_rate": "prefix_hit_rate",
        "prompt_tokens_total": "prompt_tokens",
        "generation_tokens_total": "generated_tokens",
    },
}
_HISTOGRAMS = {
    "time_to_first_token_seconds": "first_token",
    "inter_token_latency_seconds": "between_tokens",
    "e2e_request_latency_seconds": "request",
}
_ENGINE_LABEL = {"vllm": "engine", "sglang": "dp_rank"}


def aliases(lifecycle: Lifecycle, stats: Sequence[EngineStats]) -> Iterator[Metric]:
    """The metrics of `--metrics-compat`; none by default."""
    peer = lifecycle.config.metrics_compat
    if peer == "none":
        return
    model = lifecycle.model_name
    for name, source in _ENGINE[peer].items():
        kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
        family = kind(f"{peer}:{name}", "See sightline's own.", labels=("model_name", _ENGINE_LABEL[peer]))
        for i, each in enumerate(stats):
            family.add_metric((model, str(i)), getattr(each, source))
        yield family
    for name, source in _HISTOGRAMS.items():
        times = HistogramMetricFamily(f"{peer}:{name}", "See sightline's own.", labels=("model_name",))
        histogram = getattr(lifecycle.observed, source)
        times.add_metric((model,), histogram.buckets(), histogram.total)
        yield times
    if peer == "vllm" and (plan := lifecycle.plan) is not None:
        sizes = GaugeMetricFamily(
            "vllm:cache_config_info", "Sizes of the K/V cache.", labels=("engine", "block_size", "num_gpu_blocks")
        )
        for i, each in enumerate(stats):
            sizes.add_metric((str(i), str(plan.page_size), str(each.pages_total)), 1)
        yield sizes
