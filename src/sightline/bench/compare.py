"""sightline beside transformers `generate`, in one run on one machine: `make bench` or `sightline bench compare`.

The same checkpoint, dtype, thread count, pictures, questions and number of new tokens on both sides; greedy. Each
measured picture is new to both, so no cache helps. Rounds alternate which side goes first, and medians are printed with
their ranges, so that a busy machine shows. Each side is a process of its own, as a server would be, so that one's idle
threads do not slow the other. Both start at encoded bytes and end at token ids, which are compared.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from sightline import demo
from sightline.bench.peer import Answer, PeerMissingError, Question
from sightline.bench.report import environment, table
from sightline.bench.serving import make_picture
from sightline.bench.sides import Side

QUESTION = "What is in this picture?"
# Never at its end within an answer of some hundred tokens.
SCHEMA = (
    '{"type": "array", "minItems": 1000, "items": {"type": "object", "required": ["name", "x"], "properties": '
    '{"name": {"type": "string", "maxLength": 12}, "x": {"type": "integer", "minimum": 0, "maximum": 100}}}}'
)
_SCHEMA_SIDE = "sightline, by a JSON schema"


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured."""

    model: str
    num_threads: int = 2
    dtype: str = "float32"
    num_tokens: int = 32
    image_size: int = 224
    concurrency: int = 8
    rounds: int = 5
    seed: int = 0


class Samples(msgspec.Struct):
    """One measured quantity of one side, a value for each round."""

    side: str
    what: str
    unit: str
    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)


class Comparison(msgspec.Struct):
    """All samples, and how many greedy answers were equal, token by token."""

    plan: Plan
    environment: dict[str, str]
    samples: list[Samples]
    equal_answers: int
    compared_answers: int

    def median(self, side: str, what: str) -> float:
        """Of one side's samples."""
        return next(s.median for s in self.samples if s.side == side and s.what == what)

    def ratio(self, what: str, ours: str, theirs: str) -> float:
        """How much better `ours` is: above 1 is faster, for times and for rates."""
        a, b = self.median(ours, what), self.median(theirs, what)
        return b / a if next(s.unit for s in self.samples if s.what == what) == "ms" else a / b


def compare(plan: Plan, say: Callable[[str], None] = lambda line: None) -> Comparison:
    """Run all rounds. `say` hears about progress."""
    samples: dict[tuple[str, str], Samples] = {}
    equal = compared = 0

    def record(side: str, what: str, unit: str, value: float) -> None:
        samples.setdefault((side, what), Samples(side, what, unit, [])).values.append(value)

    def after_first(side: str, answer: Answer) -> None:
        assert answer.first is not None
        rate = (plan.num_tokens - 1) / (answer.total - answer.first)
        record(side, "tokens/s after the first, one client", "tokens/s", rate)

    def single(side: str, answer: Answer) -> None:
        assert answer.first is not None
        record(side, "first token, one client", "ms", 1e3 * answer.first)
        after_first(side, answer)
        record(side, "answer, one client", "ms", 1e3 * answer.total)

    with contextlib.ExitStack() as stack:
        say("loading transformers ...")
        peer = stack.enter_context(Side("transformers", plan.model, plan.num_threads, plan.dtype))
        say("loading sightline ...")
        ours = stack.enter_context(Side("sightline", plan.model, plan.num_threads, plan.dtype))
        pictures = questions(plan)
        say("warming up ...")
        warm = [next(pictures) for _ in range(plan.concurrency)]
        for side in (peer, ours):
            side.answer(warm[0], plan.num_tokens)
            side.answer_batch(warm, plan.num_tokens)
        for round_number in range(plan.rounds):
            say(f"round {round_number + 1} of {plan.rounds} ...")
            one, many = next(pictures), [next(pictures) for _ in range(plan.concurrency)]
            answers: dict[str, list[list[int]]] = {}
            for name, side in _alternate(("transformers", peer), ("sightline", ours), round_number):
                answer = side.answer(one, plan.num_tokens)
                single(name, answer)
                if side is ours:
                    again = ours.answer(one, plan.num_tokens)
                    assert again.first is not None
                    record("sightline, the same picture again", "first token, one client", "ms", 1e3 * again.first)
                rate = plan.concurrency * plan.num_tokens
                what = f"tokens/s, {plan.concurrency} requests"
                batch = side.answer_batch(many, plan.num_tokens)
                if side is peer:
                    record("transformers, one batch", what, "tokens/s", rate / batch[0].total)
                    began = time.perf_counter()
                    batch = [peer.answer(question, plan.num_tokens) for question in many]
                    record("transformers, one by one", what, "tokens/s", rate / (time.perf_counter() - began))
                else:
                    record("sightline", what, "tokens/s", rate / batch[0].total)
                    # The pictures are known by now: what differs from the second time without a schema is the grammar.
                    after_first(_SCHEMA_SIDE, ours.answer(one._replace(schema=SCHEMA), plan.num_tokens))
                    step = f"a step of {plan.concurrency} known requests"
                    for side_name, schema in (("sightline", None), (_SCHEMA_SIDE, SCHEMA)):
                        again = ours.answer_batch([q._replace(schema=schema) for q in many], plan.num_tokens)[0]
                        record(side_name, step, "ms", 1e3 * again.total / plan.num_tokens)
                answers[name] = [answer.token_ids, *(a.token_ids for a in batch)]
            pairs = list(zip(answers["transformers"], answers["sightline"], strict=True))
            equal += sum(a == b for a, b in pairs)
            compared += len(pairs)
    facts = environment(("sightline", "torch", "transformers"))
    return Comparison(plan, facts, list(samples.values()), equal, compared)


def _alternate(first: Any, second: Any, round_number: int) -> Sequence[Any]:
    return (first, second) if round_number % 2 == 0 else (second, first)


def questions(plan: Plan) -> Iterator[Question]:
    """Pictures that were never seen before, all of one size."""
    rng = random.Random(plan.seed)
    while True:
        url = make_picture(rng, (plan.image_size, plan.image_size), "jpeg")
        yield Question(base64.b64decode(url.partition(",")[2]), QUESTION)


def describe(result: Comparison) -> str:
    """The comparison for a person to read, as Markdown."""
    plan = result.plan
    out = io.StringIO()
    facts = ", ".join(f"{name} {value}" for name, value in result.environment.items())
    print(facts, file=out)
    print(
        f"{plan.num_threads} threads, {plan.dtype}, one {plan.image_size}x{plan.image_size} JPEG per request, "
        f"{plan.num_tokens} new tokens, greedy; median (lowest to highest) of {plan.rounds} rounds; {_placement(plan)}\n",
        file=out,
    )
    rows = [
        (f"{s.what}: {s.side}", f"{s.median:.1f} {s.unit}", f"({min(s.values):.1f} to {max(s.values):.1f})")
        for s in sorted(result.samples, key=lambda s: (s.what, s.side))
    ]
    print(table(("", "median", "range"), rows), file=out)
    many = f"tokens/s, {plan.concurrency} requests"
    print("\nsightline against transformers (above 1: sightline is faster)", file=out)
    for what, theirs, goal in (
        ("first token, one client", "transformers", "goal 1"),
        ("tokens/s after the first, one client", "transformers", "goal 1"),
        ("answer, one client", "transformers", ""),
        (many, "transformers, one by one", "goal 3"),
        (many, "transformers, one batch", "its best effort"),
    ):
        note = f"  ({goal})" if goal else ""
        print(f"  {result.ratio(what, 'sightline', theirs):5.2f} x  {what}, against {theirs}{note}", file=out)
    single_cost = 1e3 / result.median(_SCHEMA_SIDE, alone := "tokens/s after the first, one client")
    single_cost -= 1e3 / result.median("sightline", alone)
    step = f"a step of {plan.concurrency} known requests"
    batch_cost = result.median(_SCHEMA_SIDE, step) - result.median("sightline", step)
    print(
        f"\na JSON schema costs {single_cost:.2f} ms a token for one client, {batch_cost:.2f} ms a step of "
        f"{plan.concurrency} requests",
        file=out,
    )
    print(f"\nequal greedy answers, token by token: {result.equal_answers} of {result.compared_answers}", file=out)
    return out.getvalue()


def _placement(plan: Plan) -> str:
    if bound := os.environ.get("OMP_PROC_BIND"):
        return f"OMP_PROC_BIND={bound} on both sides"
    if plan.num_threads == 2 and sys.platform == "linux":
        return "sightline holds its two threads on two cores (OMP_PROC_BIND=true is the like for both sides)"
    return "threads run where the system puts them"


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when it measured; whether the goals are met is for the reader to see."""
    d = Plan(model="")
    p = argparse.ArgumentParser(prog="sightline bench compare", description=(__doc__ or "").partition("\n\n")[2])
    p.add_argument("--model", help="folder of a Qwen2-VL checkpoint (default: the model in the box)")
    p.add_argument("--num-threads", type=int, default=d.num_threads, help="default: %(default)s")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default=d.dtype, help="default: %(default)s")
    p.add_argument("--num-tokens", type=int, default=d.num_tokens, help="per answer (default: %(default)s)")
    p.add_argument("--image-size", type=int, default=d.image_size, help="side in pixels (default: %(default)s)")
    p.add_argument("--concurrency", type=int, default=d.concurrency, help="default: %(default)s")
    p.add_argument("--rounds", type=int, default=d.rounds, help="default: %(default)s")
    p.add_argument("--seed", type=int, default=d.seed)
    p.add_argument("--json", metavar="FILE", help="write all samples as JSON too")
    arguments = vars(p.parse_args(argv))
    target = arguments.pop("json")
    arguments["model"] = arguments["model"] or str(demo.model_path())
    try:
        result = compare(Plan(**arguments), lambda line: print(line, file=sys.stderr, flush=True))
    except PeerMissingError as error:
        print(f"sightline bench compare: {error}", file=sys.stderr)
        return 1
    print(describe(result))
    if target:
        Path(target).write_bytes(msgspec.json.format(msgspec.json.encode(result)) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
