"""The costs of a running server for `sightline bench capacity`, and whether a prediction from them is true.

A few small loads, the server's own counters, and a fit. The engine's time under a load is taken to be a sum of what it did, each
times what that costs: steps, tokens sampled, prompt tokens computed, keys read, pictures encoded. The server counts all of it
(`/server_info`), so a least-squares fit over loads of different kinds gives the costs. It should have nothing else to do meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import msgspec
import numpy as np

from sightline.bench.report import environment, table
from sightline.bench.serving import Load, Outcome, Result, ServingError, repeats, run, size
from sightline.bench.simulate import Costs, Forecast, Profile, Traffic, simulate

_ENGINE = ("step", "row", "token", "kv_token", "feature", "feature_pair")
_HTTP = ("request", "answer_token", "picture")

# concurrency, requests, answer tokens, picture's scale (0: none), words of the question: what a mix of them takes is between these.
_LOADS = (
    (1, 3, 48, 0.0, 12),
    (4, 8, 32, 0.0, 12),
    (16, 32, 32, 0.0, 12),
    (16, 16, 32, 0.0, 300),
    (2, 12, 1, 0.0, 300),
    (1, 8, 1, 1.0, 12),
    (1, 8, 1, 0.5, 12),
    (8, 16, 24, 1.0, 12),
    (16, 32, 16, 0.5, 12),
)


class Sample(NamedTuple):
    """What a load was made of, and the seconds that it took. did: in the order of `_ENGINE`, then of `_HTTP`."""

    did: tuple[float, ...]
    engine_seconds: float
    http_seconds: float


class Comparison(NamedTuple):
    """One figure of a load, measured and predicted."""

    name: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Of the prediction, as a part of what was measured."""
        return self.predicted / self.measured - 1 if self.measured else 0.0


async def calibrate(
    base_url: str,
    *,
    image_size: tuple[int, int] = (448, 448),
    api_key: str | None = None,
    rounds: int = 1,
    quiet: bool = False,
) -> tuple[Profile, float]:
    """Measure a server with one engine, with pictures of this size and of half of it.

    Returns its profile, and the largest part, 0 to 1, by which a load's engine time differs from what the costs say.

    Raises `ServingError` when it does not answer, or fails a request.
    """
    samples = []
    async with _client(base_url, api_key) as client:
        info = await _info(client)
        if info["engines"]["total"] != 1:
            raise ServingError("calibrate a server with one engine: --dp-size 1")
        for seed in range(rounds):
            for spec in _LOADS:
                samples.append(await _sample(client, _load(spec, base_url, image_size, api_key, seed), quiet))
    costs, worst = fit(samples)
    return _profile(info, costs), worst


def _load(
    spec: tuple[int, int, int, float, int], base_url: str, image_size: tuple[int, int], api_key: str | None, seed: int
) -> Load:
    concurrency, num_requests, answer, scale, words = spec
    width, height = image_size
    return Load(
        base_url=base_url,
        api_key=api_key,
        concurrency=concurrency,
        num_requests=num_requests,
        max_tokens=answer,
        ignore_eos=True,
        images_per_request=(int(scale > 0),),
        image_sizes=((int(width * scale), int(height * scale)),),
        question_words=words,
        # what an earlier calibration asked must not be in the caches
        seed=time.time_ns() + seed,
    )


def _client(base_url: str, api_key: str | None) -> httpx2.AsyncClient:
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx2.AsyncClient(base_url=base_url, headers=headers, timeout=60.0, trust_env=False)


async def _info(client: httpx2.AsyncClient) -> dict[str, Any]:
    """`/server_info`, and the processor time of the HTTP process from `/metrics`."""
    try:
        info, metrics = await client.get("/server_info"), await client.get("/metrics")
        info.raise_for_status()
        metrics.raise_for_status()
        lines = dict(line.split() for line in metrics.text.splitlines() if line.startswith("process_"))
        return {**info.json(), "http_seconds": float(lines["process_cpu_seconds_total"])}
    except (httpx2.HTTPError, OSError, ValueError, KeyError) as error:
        raise ServingError(f"{client.base_url}: needs a sightline server: {error or type(error).__name__}") from None


async def _sample(client: httpx2.AsyncClient, load: Load, quiet: bool) -> Sample:
    await run(msgspec.structs.replace(load, num_requests=1, warmup=0, seed=load.seed + 1), quiet=True)
    before, ours = await _info(client), time.process_time()
    _, outcomes = await run(msgspec.structs.replace(load, warmup=0), quiet=quiet)
    # Where they share processors, the client's work slows the server like the HTTP process' own.
    ours = time.process_time() - ours
    after = await _info(client)
    if errors := [o.error for o in outcomes if o.error is not None]:
        raise ServingError(f"a request failed: {errors[0]}")
    return _difference(before, after, outcomes, ours)


def _difference(before: dict[str, Any], after: dict[str, Any], outcomes: Sequence[Outcome], ours: float) -> Sample:
    def grown(name: str) -> float:
        return float(after["engine"][name] - before["engine"][name])

    answer_tokens = sum(o.output_tokens for o in outcomes)
    # A token reads the keys of all before it.
    keys = sum(o.output_tokens * (o.prompt_tokens + o.output_tokens / 2) for o in outcomes)
    pictures = grown("images_encoded")
    size = grown("image_tokens") / len(outcomes)
    engine = (
        grown("steps"),
        float(answer_tokens),
        grown("queried_tokens") - grown("cached_tokens"),
        keys,
        pictures * size,
        pictures * size**2,
    )
    seconds = after["engine"]["step_seconds"]["total"] - before["engine"]["step_seconds"]["total"]
    shares = after["memory_plan"]["device"] == "cpu"
    http = after["http_seconds"] - before["http_seconds"] + (ours if shares else 0.0)
    return Sample((*engine, float(len(outcomes)), float(answer_tokens), pictures * size), seconds, http)


def fit(samples: Sequence[Sample]) -> tuple[Costs, float]:
    """Costs that explain the samples, and the largest part by which one differs."""
    did = np.array([sample.did for sample in samples])
    seconds = np.array([sample.engine_seconds for sample in samples])
    n = len(_ENGINE)
    engine = _non_negative(did[:, :n], seconds)
    http = _non_negative(did[:, n:], np.array([sample.http_seconds for sample in samples]))
    worst = np.abs(did[:, :n] @ engine / seconds - 1).max()
    costs = {name: float(cost) for name, cost in zip(_ENGINE + _HTTP, [*engine, *http], strict=True)}
    return Costs(**costs), float(worst)


def _non_negative(did: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Least squares of the relative errors; what would cost less than nothing costs nothing."""
    scale = np.where(seconds > 0, seconds, 1.0)
    did, seconds = did / scale[:, None], seconds / scale
    costs = np.zeros(did.shape[1])
    free = np.flatnonzero(did.any(axis=0))
    while len(free):
        found = np.linalg.lstsq(did[:, free], seconds, rcond=None)[0]
        if (found >= 0).all():
            costs[free] = found
            break
        free = np.delete(free, found.argmin())
    return costs


def _profile(info: dict[str, Any], costs: Costs) -> Profile:
    plan, config = info["memory_plan"], info["config"]
    on_cpu = plan["device"] == "cpu"
    # As engine.factory chooses them, but for families of very long pictures.
    max_step = config["chunked_prefill_size"] or (2048 if on_cpu else 8192)
    per_token = plan["image_token_bytes"]
    facts = environment(("sightline",))
    return Profile(
        source=f"{info['model']} on {plan['device']}, {facts['cpu']}, {facts['date']}, commit {facts['commit']}",
        costs=costs,
        num_pages=plan["num_pages"],
        picture_tokens=plan["vision_cache"] // per_token if per_token else plan["num_pages"] * plan["page_size"],
        max_running=plan["max_running_requests"],
        max_step_tokens=max_step,
        max_mixed_tokens=None if on_cpu else (config["chunked_prefill_size"] or 768),
        max_encode_tokens=max_step if on_cpu else min(max_step, 1024),
        page_size=plan["page_size"],
        cores=int(facts["cores"]) if on_cpu else None,
    )


async def check(
    base_url: str,
    profile: Profile,
    *,
    traffic: Traffic = Traffic(clients=8, num_requests=48, answer=32),
    image_size: tuple[int, int] = (448, 448),
    api_key: str | None = None,
    rounds: int = 1,
    quiet: bool = False,
) -> list[Comparison]:
    """Put `traffic` on a server, but for the sizes of its prompts, which are the server's; simulate the same; medians of `rounds`."""
    pairs: list[tuple[Result, Forecast]] = []
    async with _client(base_url, api_key) as client:
        for _ in range(rounds):
            before = await _info(client)
            engines, method = before["engines"]["total"], before["config"]["load_balance_method"]
            load = Load(
                base_url=base_url,
                api_key=api_key,
                concurrency=traffic.clients * engines,
                num_requests=traffic.num_requests * engines,
                warmup=0,
                max_tokens=traffic.answer,
                ignore_eos=True,
                image_sizes=(image_size,),
                image_reuse=traffic.reuse,
                question_words=12,
                # what an earlier run asked must not be in the caches
                seed=time.time_ns(),
            )
            result, outcomes = await run(load, quiet=quiet)
            if result.failed:
                raise ServingError(f"a request failed: {next(iter(result.errors))}")
            after = await _info(client)
            same = _as_measured(
                traffic, load, outcomes, after["engine"]["image_tokens"] - before["engine"]["image_tokens"]
            )
            pairs.append((result, simulate(profile, same, engines, method, dp_size=engines)))
    return _compare(pairs)


def _as_measured(traffic: Traffic, load: Load, outcomes: Sequence[Outcome], image_tokens: int) -> Traffic:
    count = len(outcomes)
    # What those with new pictures found cached is what all prompts begin with.
    shown = repeats(count, load.image_reuse, load.seed)
    system = int(statistics.median(o.cached_tokens for i, o in enumerate(outcomes) if shown[i] == i))
    picture = image_tokens // count
    question = round(sum(o.prompt_tokens for o in outcomes) / count) - system - picture
    return msgspec.structs.replace(
        traffic, system=system, picture=picture, question=question, reuse=load.image_reuse, seed=load.seed
    )


def _compare(pairs: Sequence[tuple[Result, Forecast]]) -> list[Comparison]:
    figures = (
        ("requests/s", lambda r: r.request_throughput, lambda f: f.requests_per_second),
        ("first token p50, ms", lambda r: r.time_to_first_token_ms.p50, lambda f: f.time_to_first_token_ms.p50),
        ("first token p90, ms", lambda r: r.time_to_first_token_ms.p90, lambda f: f.time_to_first_token_ms.p90),
        ("answer p50, ms", lambda r: r.request_latency_ms.p50, lambda f: f.request_latency_ms.p50),
        ("prefix hit rate", lambda r: r.cached_tokens / r.prompt_tokens, lambda f: f.prefix_hit_rate),
    )
    median = statistics.median
    return [Comparison(name, median(m(r) for r, _ in pairs), median(p(f) for _, f in pairs)) for name, m, p in figures]


def parser() -> argparse.ArgumentParser:
    """The flags."""
    p = argparse.ArgumentParser(prog="sightline bench calibrate", description=(__doc__ or "").partition("\n\n")[2])
    p.add_argument("profile", metavar="PROFILE.json", help="the profile to write, or with --check to read")
    p.add_argument("--base-url", default=Load().base_url, help="of a server with one engine (default: %(default)s)")
    p.add_argument("--check", action="store_true",
                   help="compare what the profile predicts with what this server does; any number of engines")  # fmt: skip
    p.add_argument("--image-size", type=size, default=(448, 448), metavar="WxH", help="of the pictures (448x448)")
    p.add_argument("--rounds", type=int, default=1, help="times to repeat (default: %(default)s)")
    p.add_argument("--api-key")
    return p


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 1 for a server that does not answer, or requests per second predicted more than 15 % wrong."""
    a = parser().parse_args(argv)
    path = Path(a.profile)
    kind: dict[str, Any] = {"image_size": a.image_size, "api_key": a.api_key, "rounds": a.rounds, "quiet": True}
    try:
        if a.check:
            profile = msgspec.json.decode(path.read_bytes(), type=Profile)
            compared = asyncio.run(check(a.base_url, profile, **kind))
            rows = [(c.name, f"{c.measured:.3g}", f"{c.predicted:.3g}", f"{c.error:+.1%}") for c in compared]
            print(table(("", "measured", "predicted", "error"), rows))
            return int(abs(compared[0].error) > 0.15)
        profile, worst = asyncio.run(calibrate(a.base_url, **kind))
    except (ServingError, OSError, msgspec.DecodeError) as error:
        print(f"sightline bench calibrate: {error}", file=sys.stderr)
        return 1
    path.write_bytes(msgspec.json.format(msgspec.json.encode(profile)) + b"\n")
    print(
        f"{profile.source}\nno load's engine time is more than {worst:.0%} from what the costs say; written to {path}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
