"""The comparison with transformers, small: both sides do the same work, and the numbers are what was timed."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import msgspec
import pytest

from sightline.bench import main
from sightline.bench.compare import Comparison, Plan, Samples, describe, questions
from sightline.bench.peer import TransformersPeer
from tests import tiny


@pytest.fixture(scope="module")
def small() -> Plan:
    return Plan(model=str(tiny.qwen2_vl()), num_tokens=6, image_size=84, concurrency=3, rounds=2)


def test_the_peer_answers_alike_alone_and_in_a_batch(small: Plan) -> None:
    peer = TransformersPeer(Path(small.model), num_threads=2)
    some = list(itertools.islice(questions(small), 3))
    assert len({q.picture for q in some}) == 3
    alone = [peer.answer(q, 6) for q in some]
    batch = peer.answer_batch(some, 6)
    assert [a.token_ids for a in alone] == [a.token_ids for a in batch]
    assert len({tuple(a.token_ids) for a in alone}) > 1, "the pictures matter"
    for answer in alone:
        assert len(answer.token_ids) == 6
        assert answer.first is not None
        assert 0 < answer.first < answer.total


def test_both_sides_do_the_same_work(small: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "result.json"
    flags = ["--num-tokens", "6", "--image-size", "84", "--concurrency", "3", "--rounds", "2", "--json", str(target)]
    assert main(["compare", "--model", small.model, *flags]) == 0
    result = msgspec.json.decode(target.read_bytes(), type=Comparison)
    assert (result.plan.num_tokens, result.plan.image_size) == (6, 84)
    assert (result.plan.concurrency, result.plan.rounds) == (3, 2)
    assert {"date", "commit", "cpu", "sightline", "torch", "transformers"} <= set(result.environment)
    assert result.compared_answers == 2 * (1 + 3)
    assert result.equal_answers == result.compared_answers, "greedy answers equal transformers', token by token"
    assert {s.side for s in result.samples} == {
        "transformers",
        "transformers, one batch",
        "transformers, one by one",
        "sightline",
        "sightline, the same picture again",
        "sightline, by a JSON schema",
    }
    assert all(len(s.values) == 2 and min(s.values) > 0 for s in result.samples)
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == "round 2 of 2 ..."
    assert describe(result) in printed.out
    assert "equal greedy answers, token by token: 8 of 8" in printed.out
    assert re.search(r"a JSON schema costs -?\d+\.\d\d ms a token for one client", printed.out)
    assert "against transformers, one by one  (goal 3)" in printed.out


def test_ratios_say_how_much_faster_we_are() -> None:
    samples = [
        Samples("sightline", "time", "ms", [10.0, 30.0, 20.0]),
        Samples("transformers", "time", "ms", [50.0, 40.0, 30.0]),
        Samples("sightline", "rate", "tokens/s", [100.0]),
        Samples("transformers", "rate", "tokens/s", [400.0]),
    ]
    result = Comparison(Plan(model=""), {}, samples, 0, 0)
    assert result.ratio("time", "sightline", "transformers") == 2.0
    assert result.ratio("rate", "sightline", "transformers") == 0.25
