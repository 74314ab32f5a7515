"""What more replicas would do: `sightline bench capacity --replicas 1 8 64 --reuse 0 0.3`.

Simulates clusters with the engine's own scheduler, caches and router, and a model that takes as long as a profile says: the one
of `sightline bench calibrate`, or by default that of Qwen2-VL-7B on H200s. Traffic is given for each replica, so more of them get more
of it. Says for each size what routing by cached pictures and prefixes gains over the other methods, in requests per
second, or at a given --rate in the time to the first token.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec

from sightline.bench.plot import lines
from sightline.bench.report import environment, table
from sightline.bench.simulate import Costs, Forecast, Profile, Traffic, simulate
from sightline.engine.encode_queue import SLICE_SECONDS

METHODS = ("cache_aware", "round_robin", "shortest_queue")

# From docs/performance.md (Qwen2-VL-7B): decode steps of 8 to 64 rows 4.30 to 5.19 ms, a mixed one of 768 rows 17.5; a 1024x1024 picture
# (1369 placeholders) 26 ms in the vision tower, 13.5 of them attention, and about 16 for its JSON, JPEG and copies before the
# engine. What the HTTP process takes for one token was not measured there and counts as nothing.
H200 = Profile(
    source="Qwen2-VL-7B in bfloat16 on one H200 each, from docs/performance.md",
    costs=Costs(
        step=4.1e-3,
        row=0.018e-3,
        token=0.0174e-3,
        feature=0.0091e-3,
        feature_pair=13.5e-3 / 1369**2,
        request=1e-3,
        picture=0.012e-3,
    ),
    num_pages=115_000,
    picture_tokens=600_000,
    max_running=256,
    max_step_tokens=8192,
    max_mixed_tokens=768,
    max_encode_tokens=1024,
    slice_seconds=SLICE_SECONDS,
)


class Result(msgspec.Struct, frozen=True):
    """All that was simulated. This is the JSON output."""

    profile: Profile
    environment: dict[str, str]
    forecasts: list[tuple[Traffic, Forecast]]


def run(
    profile: Profile, traffics: Sequence[Traffic], replicas: Sequence[int], methods: Sequence[str], dp_size: int
) -> Result:
    """Every combination; methods differ only where there is a choice."""
    forecasts: list[tuple[Traffic, Forecast]] = []
    for traffic in traffics:
        for count in replicas:
            for method in methods if count > 1 else methods[:1]:
                forecast = simulate(profile, traffic, count, method, dp_size=dp_size)  # type: ignore[arg-type]
                forecasts.append((traffic, forecast))
    return Result(profile, environment(("sightline",)), forecasts)


def gains(result: Result) -> dict[float, list[tuple[float, float]]]:
    """For each part of repeated pictures: (replicas, what cache_aware gains over the best of the others, as a part).

    In requests per second for clients that wait; at a given rate in the 90th percentile of the time to the first token.
    """
    found: dict[float, list[tuple[float, float]]] = {}
    for (reuse, count), group in groupby(result.forecasts, key=lambda pair: (pair[0].reuse, pair[1].replicas)):
        values = {forecast.method: _worth(traffic, forecast) for traffic, forecast in group}
        others = [value for method, value in values.items() if method != "cache_aware"]
        if "cache_aware" in values and others:
            found.setdefault(reuse, []).append((count, values["cache_aware"] / max(others) - 1))
    return found


def _worth(traffic: Traffic, forecast: Forecast) -> float:
    assert forecast.time_to_first_token_ms is not None
    return forecast.steady if traffic.rate is None else 1 / forecast.time_to_first_token_ms.p90


def describe(result: Result) -> str:
    """The result for a person to read."""
    rows = []
    for traffic, f in result.forecasts:
        first = f.time_to_first_token_ms
        assert first is not None
        rows.append(
            (
                f"{traffic.reuse:g}",
                str(f.replicas),
                f.method if f.replicas > 1 else "",
                f"{f.steady if traffic.rate is None else f.requests_per_second:.1f}",
                f"{first.p50:.0f}",
                f"{first.p90:.0f}",
                f"{first.p99:.0f}",
                f"{f.prefix_hit_rate:.1%}",
                "" if f.found is None else f"{f.found:.1%}",
                f"{f.busy:.0%}",
            )
        )
    head = ("reuse", "replicas", "method", "requests/s", "TTFT p50", "p90", "p99, ms", "prefix hits", "found", "busy")
    text = [result.profile.source, "", table(head, rows), ""]
    what = "requests/s" if result.forecasts[0][0].rate is None else "a first token's p90, as a speed,"
    for reuse, points in gains(result).items():
        each = ", ".join(f"{count:g} replicas {gain:+.1%}" for count, gain in points)
        text.append(
            f"{what} of cache_aware against the better of the others, {reuse:g} of the pictures repeated: {each}"
        )
    return "\n".join(text)


def parser() -> argparse.ArgumentParser:
    """The flags, with the defaults of `Traffic`."""
    p = argparse.ArgumentParser(prog="sightline bench capacity", description=(__doc__ or "").partition("\n\n")[2])
    d = Traffic()
    p.add_argument("--profile", metavar="FILE.json", help="what `sightline bench calibrate` wrote")
    p.add_argument("--replicas", type=_count, nargs="+", default=[1, 2, 8, 32], metavar="N")
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    p.add_argument("--reuse", type=_part, nargs="+", default=[d.reuse], metavar="PART",
                   help="parts of the requests, 0 to 1, about a picture of an earlier one (default: 0.3)")  # fmt: skip
    p.add_argument(
        "--clients", type=_count, default=d.clients, help="that wait for answers, for each replica (%(default)s)"
    )
    p.add_argument("--rate", type=float, help="requests a second and replica at random times, instead of clients")
    p.add_argument("--num-requests", type=_count, default=d.num_requests, help="for each replica (%(default)s)")
    for name in ("system", "picture", "question", "answer"):
        p.add_argument(f"--{name}", type=int, default=getattr(d, name), metavar="TOKENS", help="default: %(default)s")
    p.add_argument(
        "--vary", type=_part, default=0.5, metavar="PART", help="by which answers are shorter or longer (%(default)s)"
    )
    p.add_argument("--dp-size", type=_count, default=8, help="replicas behind one HTTP process (default: %(default)s)")
    p.add_argument("--seed", type=int, default=d.seed)
    p.add_argument("--plot", metavar="FILE.svg", help="draw what cache_aware gains")
    p.add_argument("--json", metavar="FILE", help="write the result as JSON too; - for standard output alone")
    return p


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _part(text: str) -> float:
    try:
        part = float(text)
    except ValueError:
        part = -1.0
    if not 0 <= part <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1")
    return part


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 1 for a profile that cannot be read."""
    a = vars(parser().parse_args(argv))
    path, target, drawing, reuses = (a.pop(name) for name in ("profile", "json", "plot", "reuse"))
    where: dict[str, Any] = {name: a.pop(name) for name in ("replicas", "methods", "dp_size")}
    try:
        profile = msgspec.json.decode(Path(path).read_bytes(), type=Profile) if path else H200
    except (OSError, msgspec.DecodeError) as error:
        print(f"sightline bench capacity: --profile: {error}", file=sys.stderr)
        return 1
    result = run(profile, [Traffic(**a, reuse=reuse) for reuse in reuses], **where)
    if drawing:
        series = {f"{reuse:g} of the pictures repeated": points for reuse, points in gains(result).items()}
        title = f"Requests/s that cache_aware routing gains: {profile.source}"
        Path(drawing).write_text(lines(title, "replicas", series))
    encoded = msgspec.json.format(msgspec.json.encode(result))
    print(encoded.decode() if target == "-" else describe(result))
    if target and target != "-":
        Path(target).write_bytes(encoded + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
