"""The engine without HTTP: `sightline bench offline [MODEL]`.

Latency: `runs` questions one after the other, each with pictures of its own, then each again, when the caches know them.
Throughput: `num_requests` other questions at once. Pictures are made before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from sightline.bench.report import Summary, environment, summarize, table
from sightline.bench.serving import Load, data_pictures, size
from sightline.types import MemoryPlan, SamplingParams

if TYPE_CHECKING:
    from sightline.engine.offline import Engine


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure. engine: fields of `EngineConfig`."""

    model: str | None = None
    num_requests: int = 64
    runs: int = 8
    max_tokens: int = 32
    images_per_request: tuple[int, ...] = (1,)
    image_sizes: tuple[tuple[int, int], ...] = ((448, 448),)
    question: str = "What is in this image?"
    engine: dict[str, Any] = {}
    seed: int = 0


class Timing(msgspec.Struct, frozen=True):
    """Distributions over the runs, in milliseconds."""

    time_to_first_token_ms: Summary | None
    time_per_output_token_ms: Summary | None
    latency_ms: Summary | None


class Result(msgspec.Struct, kw_only=True):
    """All that a run measured. This is the JSON output. Every answer has max_tokens tokens."""

    plan: Plan
    environment: dict[str, str]
    memory: MemoryPlan
    load_seconds: float
    latency: Timing
    latency_cached: Timing
    batch_seconds: float
    request_throughput: float
    output_token_throughput: float
    total_token_throughput: float
    prompt_tokens: int
    output_tokens: int


def run(plan: Plan) -> Result:
    """Raises `StartupError` when the engine cannot start."""
    from sightline.engine.offline import Engine

    talks = [_talk(plan, i) for i in range(plan.runs + plan.num_requests)]
    lonely, crowd = talks[: plan.runs], talks[plan.runs :]
    sampling = SamplingParams(temperature=0.0, max_tokens=plan.max_tokens, ignore_eos=True)
    began = time.perf_counter()
    with Engine(plan.model, **plan.engine) as engine:
        loaded = time.perf_counter() - began
        # what a first request compiles or allocates is not measured
        engine.chat(_talk(plan, -1), sampling)
        first = _timing([_one(engine, talk, sampling) for talk in lonely])
        again = _timing([_one(engine, talk, sampling) for talk in lonely])
        began = time.perf_counter()
        answers = engine.chat(crowd, sampling)
        seconds = time.perf_counter() - began
        assert isinstance(answers, list)
        output = sum(len(answer.outputs[0].token_ids) for answer in answers)
        prompt = sum(answer.num_prompt_tokens for answer in answers)
        return Result(
            plan=plan,
            environment=environment(),
            memory=engine.plan,
            load_seconds=loaded,
            latency=first,
            latency_cached=again,
            batch_seconds=seconds,
            request_throughput=len(answers) / seconds,
            output_token_throughput=output / seconds,
            total_token_throughput=(output + prompt) / seconds,
            prompt_tokens=prompt,
            output_tokens=output,
        )


def _talk(plan: Plan, index: int) -> list[dict[str, Any]]:
    load = Load(images_per_request=plan.images_per_request, image_sizes=plan.image_sizes, seed=plan.seed)
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": url}} for url in data_pictures(load, index, "offline")
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": plan.question}]}]


def _one(engine: Engine, talk: list[dict[str, Any]], sampling: SamplingParams) -> tuple[float, float, int]:
    """(seconds to the first token, to the last, number of tokens)."""
    began = time.perf_counter()
    first, count = 0.0, 0
    for delta in engine.stream(talk, sampling):
        first = first or time.perf_counter() - began
        count += len(delta.token_ids)
    return first, time.perf_counter() - began, count


def _timing(runs: list[tuple[float, float, int]]) -> Timing:
    return Timing(
        summarize([1e3 * first for first, _, _ in runs]),
        summarize([1e3 * (last - first) / (count - 1) for first, last, count in runs if count > 1]),
        summarize([1e3 * last for _, last, _ in runs]),
    )


def describe(result: Result) -> str:
    """The result for a person to read."""
    plan = result.plan
    rows = [
        (f"{name}{suffix}", *(f"{value:.1f}" for value in (s.mean, s.p50, s.p90, s.max)))
        for timing, suffix in ((result.latency, ""), (result.latency_cached, ", again"))
        for name, s in (
            ("first token, ms", timing.time_to_first_token_ms),
            ("token after it, ms", timing.time_per_output_token_ms),
            ("answer, ms", timing.latency_ms),
        )
        if s is not None
    ]
    lines = [
        f"loaded in {result.load_seconds:.2f} s on {result.memory.device}; {plan.runs} requests one by one, then "
        f"{plan.num_requests} at once in {result.batch_seconds:.2f} s",
        "",
        f"requests/s       {result.request_throughput:10.2f}",
        f"output tokens/s  {result.output_token_throughput:10.1f}",
        f"all tokens/s     {result.total_token_throughput:10.1f}",
        "",
    ]
    return "\n".join([*lines, table(("one by one", "mean", "p50", "p90", "max"), rows)] if rows else lines)


def parser() -> argparse.ArgumentParser:
    """The flags, with the defaults of `Plan`."""
    p = argparse.ArgumentParser(prog="sightline bench offline", description=(__doc__ or "").partition("\n\n")[2])
    d = Plan()
    p.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder or hub name; the bundled sightline-tiny by default"
    )
    p.add_argument("--num-requests", type=int, default=d.num_requests, help="at once (default: %(default)s)")
    p.add_argument("--runs", type=int, default=d.runs, help="one by one (default: %(default)s)")
    p.add_argument("--max-tokens", type=int, default=d.max_tokens, help="of every answer (default: %(default)s)")
    p.add_argument("--images-per-request", type=int, nargs="+", default=[1], metavar="N", help="in turn (default: 1)")
    p.add_argument("--image-sizes", type=size, nargs="+", default=list(d.image_sizes), metavar="WxH", help="in turn")
    p.add_argument("--question", default=d.question)
    p.add_argument("--engine", type=json.loads, default={}, metavar="JSON",
                   help='fields of EngineConfig: \'{"dtype": "bfloat16", "load_format": "dummy"}\'')  # fmt: skip
    p.add_argument("--seed", type=int, default=d.seed)
    p.add_argument("--json", metavar="FILE", help="write the result as JSON too; - for standard output alone")
    return p


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or that of the engine that could not start."""
    from pydantic import ValidationError

    from sightline.config import EngineConfig
    from sightline.errors import StartupError

    arguments = vars(parser().parse_args(argv))
    target = arguments.pop("json")
    arguments |= {name: tuple(arguments[name]) for name in ("image_sizes", "images_per_request")}
    try:
        EngineConfig(**arguments["engine"])
        result = run(Plan(**arguments))
    except ValidationError as error:
        first = error.errors()[0]
        print(f"sightline bench offline: --engine: {first['loc'][0]}: {first['msg']}", file=sys.stderr)
        return 2
    except StartupError as error:
        print(f"sightline bench offline: {error}", file=sys.stderr)
        return error.exit_code
    encoded = msgspec.json.format(msgspec.json.encode(result)).decode()
    print(encoded if target == "-" else describe(result))
    if target and target != "-":
        Path(target).write_text(f"{encoded}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
