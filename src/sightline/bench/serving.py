"""Load on a running server over HTTP: `sightline bench serve --base-url http://127.0.0.1:8000`.

A closed loop: `concurrency` clients each send a request, read its stream to the end and send the next. With a request rate an
open one: requests come at random times (Poisson) whether or not earlier ones are answered. Works against any server with
OpenAI's chat completions. Pictures are made before the clock starts; by default every request has its own, so that no cache of the
server can answer for it.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import functools
import io
import itertools
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import msgspec
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sightline.bench.plot import distributions
from sightline.bench.report import Summary, environment, summarize, table

_WORDS = "red green blue small large round flat old new left right above below near far one two three four five".split()


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What to send. image_reuse: the part of the requests, 0 to 1, that ask about the pictures of an earlier one. question_words:
    random words in front of the question, so that no prefix cache knows it."""

    base_url: str = "http://127.0.0.1:8000"
    model: str | None = None
    api_key: str | None = None
    concurrency: int = 8
    request_rate: float | None = None
    num_requests: int = 64
    warmup: int = 2
    max_tokens: int = 32
    ignore_eos: bool = False
    images_per_request: tuple[int, ...] = (1,)
    image_sizes: tuple[tuple[int, int], ...] = ((448, 448),)
    image_format: str = "jpeg"
    image_reuse: float = 0.0
    question: str = "What is in this image?"
    question_words: int = 0
    temperature: float = 0.0
    timeout: float = 600.0
    seed: int = 0
    goodput: dict[str, float] = {}


class Outcome(msgspec.Struct, kw_only=True):
    """One request as its client saw it; seconds. `error` is None for a complete answer. times: of the chunks with text, from the
    request's start; a chunk has one token, or the few that end a character together."""

    started: float
    times: list[float] = []
    latency: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    text: str = ""
    error: str | None = None

    @property
    def ttft(self) -> float | None:
        """Seconds to the first text."""
        return self.times[0] if self.times else None

    @property
    def tpot(self) -> float | None:
        """Mean seconds of a token after the first."""
        return (self.times[-1] - self.times[0]) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    def meets(self, goodput: dict[str, float]) -> bool:
        """Whether none of its times is above the bound for it, in milliseconds."""
        times = {"ttft": self.ttft, "tpot": self.tpot, "latency": self.latency}
        return all(1e3 * (times[name] or 0.0) <= bound for name, bound in goodput.items())


class Result(msgspec.Struct, kw_only=True):
    """All that a run measured; milliseconds and per-second rates. This is the JSON output."""

    load: Load
    environment: dict[str, str]
    duration_seconds: float
    completed: int
    failed: int
    errors: dict[str, int]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    request_throughput: float
    output_token_throughput: float
    total_token_throughput: float
    goodput: float | None
    time_to_first_token_ms: Summary | None
    time_per_output_token_ms: Summary | None
    inter_token_latency_ms: Summary | None
    request_latency_ms: Summary | None


def make_picture(rng: random.Random, size: tuple[int, int], format: str) -> str:
    """A data URL of a smooth random picture: it compresses like a photograph, and no two are equal."""
    coarse = (max(2, size[0] // 32), max(2, size[1] // 32))
    picture = Image.frombytes("RGB", coarse, rng.randbytes(3 * coarse[0] * coarse[1]))
    buffer = io.BytesIO()
    picture.resize(size, Image.Resampling.BICUBIC).save(buffer, format=format.upper())
    return f"data:image/{format};base64,{base64.b64encode(buffer.getvalue()).decode()}"


@functools.cache
def repeats(count: int, reuse: float, seed: int) -> list[int]:
    """Of each request: itself, or with probability `reuse` the first that showed the pictures of an earlier one, any of them alike."""
    rng = random.Random(f"{seed}-repeats")
    shown: list[int] = []
    for index in range(count):
        shown.append(rng.choice(shown) if shown and rng.random() < reuse else index)
    return shown


def data_pictures(load: Load, index: int, purpose: str) -> list[str]:
    """The pictures of request `index`, as data URLs."""
    shown = repeats(load.num_requests, load.image_reuse, load.seed)[index] if purpose == "load" else index
    rng = random.Random(f"{load.seed}-{purpose}-{shown}")
    count = load.images_per_request[shown % len(load.images_per_request)]
    sizes = [load.image_sizes[(shown + i) % len(load.image_sizes)] for i in range(count)]
    return [make_picture(rng, size, load.image_format) for size in sizes]


def make_body(load: Load, model: str, index: int, purpose: str = "load") -> bytes:
    """The JSON of request `index`. The same load, index and purpose give the same bytes."""
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": url}} for url in data_pictures(load, index, purpose)
    ]
    words = random.Random(f"{load.seed}-{purpose}-{index}-words").choices(_WORDS, k=load.question_words)
    question = " ".join([*words, load.question])
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
        "max_tokens": load.max_tokens,
        "temperature": load.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if load.ignore_eos:
        body["ignore_eos"] = True
    return msgspec.json.encode(body)


async def send(client: httpx2.AsyncClient, body: bytes) -> Outcome:
    """Send one request and read its stream to the end. Every failure is an outcome, none is an exception."""
    outcome = Outcome(started=time.perf_counter())
    done = False
    try:
        headers = {"content-type": "application/json"}
        async with client.stream("POST", "/v1/chat/completions", content=body, headers=headers) as answer:
            if answer.status_code != 200:
                message = (await answer.aread()).decode(errors="replace")
                outcome.error = f"HTTP {answer.status_code}: {_error_message(message)}"
            else:
                async for line in answer.aiter_lines():
                    if line == "data: [DONE]":
                        done = True
                    elif line.startswith("data: "):
                        _take(outcome, msgspec.json.decode(line[6:]))
    except (httpx2.HTTPError, OSError, msgspec.DecodeError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.latency = time.perf_counter() - outcome.started
    if outcome.error is None and not done:
        outcome.error = "the stream ended without [DONE]"
    return outcome


def _take(outcome: Outcome, chunk: dict[str, Any]) -> None:
    if error := chunk.get("error"):
        outcome.error = f"in the stream: {error.get('message', error)}"
    for choice in chunk.get("choices") or []:
        if text := choice.get("delta", {}).get("content"):
            outcome.times.append(time.perf_counter() - outcome.started)
            outcome.text += text
    if usage := chunk.get("usage"):
        outcome.prompt_tokens = usage.get("prompt_tokens", 0)
        outcome.output_tokens = usage.get("completion_tokens", 0)
        outcome.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def _error_message(body: str) -> str:
    try:
        error = msgspec.json.decode(body)["error"]
        return str(error["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return body[:200]


@contextlib.contextmanager
def progress(total: int, quiet: bool) -> Iterator[Any]:
    """A callable for each finished request: a bar on a terminal, ten plain lines elsewhere, nothing when quiet."""
    console = Console(stderr=True)
    if quiet:
        yield lambda: None
    elif console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("requests", total=total)
            yield lambda: bar.advance(task)
    else:
        done = 0

        def count() -> None:
            nonlocal done
            done += 1
            if done == total or done % max(1, total // 10) == 0:
                print(f"{done}/{total} requests", file=sys.stderr, flush=True)

        yield count


async def run(load: Load, *, quiet: bool = False) -> tuple[Result, list[Outcome]]:
    """Put the load on the server. Returns the summary and every request's outcome, in the order of their indices."""
    headers = {"authorization": f"Bearer {load.api_key}"} if load.api_key else {}
    most = load.concurrency if load.request_rate is None else None
    limits = httpx2.Limits(max_connections=most, max_keepalive_connections=most)
    async with httpx2.AsyncClient(
        base_url=load.base_url, headers=headers, limits=limits, timeout=load.timeout, trust_env=False
    ) as client:
        model = load.model or await _first_model(client)
        bodies = [make_body(load, model, i) for i in range(load.num_requests)]
        for i in range(load.warmup):
            warm = await send(client, make_body(load, model, i, "warmup"))
            if warm.error is not None:
                raise ServingError(f"the warm-up request failed: {warm.error}")
        began = time.perf_counter()
        with progress(load.num_requests, quiet) as count:
            finished = await _drive(load, client, bodies, count)
        duration = time.perf_counter() - began
    return summarize_run(load, finished, duration), finished


async def _drive(
    load: Load, client: httpx2.AsyncClient, bodies: list[bytes], count: Callable[[], None]
) -> list[Outcome]:
    """Send every body when its turn comes; outcomes in their order."""
    outcomes: dict[int, Outcome] = {}

    async def one(index: int, delay: float = 0.0) -> None:
        await asyncio.sleep(delay)
        outcomes[index] = await send(client, bodies[index])
        count()

    if load.request_rate is None:
        indices = iter(range(len(bodies)))

        async def worker() -> None:
            for index in indices:
                await one(index)

        await asyncio.gather(*(worker() for _ in range(min(load.concurrency, len(bodies)))))
    else:
        rng = random.Random(f"{load.seed}-arrivals")
        due = itertools.accumulate(rng.expovariate(load.request_rate) for _ in bodies)
        await asyncio.gather(*(one(index, delay) for index, delay in enumerate(due)))
    return [outcomes[index] for index in range(len(bodies))]


class ServingError(Exception):
    """The benchmark cannot run; the message says why."""


async def _first_model(client: httpx2.AsyncClient) -> str:
    try:
        answer = await client.get("/v1/models")
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx2.HTTPError, OSError, ValueError, KeyError, IndexError) as error:
        raise ServingError(f"GET {client.base_url}/v1/models: {error or type(error).__name__}") from None


def summarize_run(load: Load, outcomes: list[Outcome], duration: float) -> Result:
    """Totals and percentiles; failed requests count only as failures."""
    good = [o for o in outcomes if o.error is None]
    output = sum(o.output_tokens for o in good)
    prompt = sum(o.prompt_tokens for o in good)
    measured = measurements(outcomes)
    return Result(
        load=msgspec.structs.replace(load, api_key=None),
        environment=environment(("sightline",)),
        duration_seconds=duration,
        completed=len(good),
        failed=len(outcomes) - len(good),
        errors=dict(Counter(o.error for o in outcomes if o.error is not None)),
        prompt_tokens=prompt,
        cached_tokens=sum(o.cached_tokens for o in good),
        output_tokens=output,
        request_throughput=len(good) / duration,
        output_token_throughput=output / duration,
        total_token_throughput=(output + prompt) / duration,
        goodput=sum(o.meets(load.goodput) for o in good) / duration if load.goodput else None,
        time_to_first_token_ms=summarize(measured["time to first token, ms"]),
        time_per_output_token_ms=summarize(measured["time per output token, ms"]),
        inter_token_latency_ms=summarize(measured["inter-token latency, ms"]),
        request_latency_ms=summarize(measured["request latency, ms"]),
    )


def measurements(outcomes: list[Outcome]) -> dict[str, list[float]]:
    """Milliseconds of the complete answers: one per request, and one per pair of chunks for the inter-token latency."""
    good = [o for o in outcomes if o.error is None]
    return {
        "time to first token, ms": [1e3 * o.ttft for o in good if o.ttft is not None],
        "time per output token, ms": [1e3 * o.tpot for o in good if o.tpot is not None],
        "inter-token latency, ms": [1e3 * (b - a) for o in good for a, b in itertools.pairwise(o.times)],
        "request latency, ms": [1e3 * o.latency for o in good],
    }


def describe(result: Result) -> str:
    """The result for a person to read."""
    load = result.load
    sizes = ", ".join(f"{w}x{h}" for w, h in load.image_sizes) if any(load.images_per_request) else "no pictures"
    counts = "/".join(map(str, load.images_per_request))
    pace = f"{load.concurrency} at a time" if load.request_rate is None else f"{load.request_rate:g} a second"
    lines = [
        f"{result.completed} requests of {counts} picture(s) ({sizes}), {pace}, "
        f"in {result.duration_seconds:.2f} s; {result.failed} failed",
        "",
        f"requests/s       {result.request_throughput:10.2f}",
        *(
            [f"goodput, req/s   {result.goodput:10.2f}  ({_bounds(load.goodput)})"]
            if result.goodput is not None
            else []
        ),
        f"output tokens/s  {result.output_token_throughput:10.1f}",
        f"all tokens/s     {result.total_token_throughput:10.1f}",
        f"prompt tokens    {result.prompt_tokens:10d}  ({result.cached_tokens} from the prefix cache)",
        f"output tokens    {result.output_tokens:10d}",
        "",
    ]
    rows = [
        (name, *(f"{value:.1f}" for value in (s.mean, s.p50, s.p90, s.p99, s.max)))
        for name, s in (
            ("time to first token, ms", result.time_to_first_token_ms),
            ("time per output token, ms", result.time_per_output_token_ms),
            ("inter-token latency, ms", result.inter_token_latency_ms),
            ("request latency, ms", result.request_latency_ms),
        )
        if s is not None
    ]
    lines.append(table(("", "mean", "p50", "p90", "p99", "max"), rows))
    lines += [f"{count:5d} x {error}" for error, count in result.errors.items()]
    return "\n".join(lines)


def _bounds(goodput: dict[str, float]) -> str:
    return ", ".join(f"{name} <= {bound:g} ms" for name, bound in goodput.items())


def _bound(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        bound = float(value)
    except ValueError:
        bound = -1.0
    if name not in ("ttft", "tpot", "latency") or bound <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not ttft=MS, tpot=MS or latency=MS")
    return name, bound


def size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT")
    return int(width), int(height)


def parser() -> argparse.ArgumentParser:
    """The flags, with the defaults of `Load`."""
    p = argparse.ArgumentParser(prog="sightline bench serve", description=(__doc__ or "").partition("\n\n")[2])
    d = Load()
    p.add_argument("--base-url", default=d.base_url, help="without the /v1 (default: %(default)s)")
    p.add_argument("--model", help="default: the server's first")
    p.add_argument("--api-key")
    p.add_argument("--concurrency", type=int, default=d.concurrency, help="clients at once (default: %(default)s)")
    p.add_argument("--request-rate", type=float, help="requests a second at random times, instead of clients that wait")
    p.add_argument("--num-requests", type=int, default=d.num_requests, help="default: %(default)s")
    p.add_argument("--warmup", type=int, default=d.warmup, help="requests before the clock starts (%(default)s)")
    p.add_argument("--max-tokens", type=int, default=d.max_tokens, help="per answer (default: %(default)s)")
    p.add_argument("--ignore-eos", action="store_true", help="make every answer max-tokens long (an extension)")
    p.add_argument("--images-per-request", type=int, nargs="+", default=[1], metavar="N", help="in turn (default: 1)")
    p.add_argument("--image-sizes", type=size, nargs="+", default=list(d.image_sizes), metavar="WxH", help="in turn")
    p.add_argument("--image-format", choices=("jpeg", "png", "webp"), default=d.image_format)
    p.add_argument("--image-reuse", type=float, default=d.image_reuse, metavar="PART",
                   help="part of the requests, 0 to 1, that show the pictures of an earlier one: caches may help")  # fmt: skip
    p.add_argument("--question", default=d.question)
    p.add_argument("--question-words", type=int, default=d.question_words, metavar="N",
                   help="random words in front of each question, so that no cache knows it")  # fmt: skip
    p.add_argument("--temperature", type=float, default=d.temperature)
    p.add_argument("--timeout", type=float, default=d.timeout, help="seconds per request (default: %(default)s)")
    p.add_argument("--seed", type=int, default=d.seed)
    p.add_argument("--goodput", type=_bound, nargs="+", default=[], metavar="NAME=MS",
                   help="count requests within bounds: ttft=, tpot= (mean per token after the first), latency=")  # fmt: skip
    p.add_argument("--plot", metavar="FILE.svg", help="draw the distributions of the times")
    p.add_argument("--json", metavar="FILE", help="write the result as JSON too; - for standard output alone")
    return p


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when every request was answered, 1 otherwise."""
    arguments = vars(parser().parse_args(argv))
    target, drawing = arguments.pop("json"), arguments.pop("plot")
    arguments |= {name: tuple(arguments[name]) for name in ("image_sizes", "images_per_request")}
    arguments["goodput"] = dict(arguments["goodput"])
    if arguments["request_rate"] is not None and arguments["request_rate"] <= 0:
        print("sightline bench serve: --request-rate must be above 0", file=sys.stderr)
        return 2
    try:
        result, outcomes = asyncio.run(run(Load(**arguments), quiet=target == "-"))
    except ServingError as error:
        print(f"sightline bench serve: {error}", file=sys.stderr)
        return 1
    if drawing:
        Path(drawing).write_text(distributions(describe(result).partition("\n")[0], measurements(outcomes)))
    encoded = msgspec.json.format(msgspec.json.encode(result))
    if target == "-":
        print(encoded.decode())
    else:
        print(describe(result))
        if target:
            Path(target).write_bytes(encoded + b"\n")
    return 0 if result.failed == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
