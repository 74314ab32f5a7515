"""Sampling against straightforward references, one knob at a time and all together."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from sightline.engine import sampler as sampler_module
from sightline.engine.sampler import Sampler, SamplingState
from sightline.types import SamplingParams

CPU = torch.device("cpu")
VOCAB = 50
EOS = (3, 4)
PROMPT = np.asarray([1, 1, 2, 9, 30], dtype=np.int32)


def make(seed: int | None = 0, vocab: int = VOCAB) -> Sampler:
    return Sampler(vocab, CPU, seed)


def packed(allowed: torch.Tensor) -> np.ndarray:
    """bool [V] as a grammar's mask: int32 words."""
    bits = np.zeros(-(-len(allowed) // 32) * 32, dtype=np.uint8)
    bits[: len(allowed)] = allowed.numpy()
    return np.packbits(bits, bitorder="little").view(np.int32)


def state_of(sampler: Sampler, index: int = 0, prompt: np.ndarray = PROMPT, **params: Any) -> SamplingState:
    return sampler.new_state(SamplingParams(**params), prompt, EOS, index)


def random_logits(seed: int, rows: int = 1, vocab: int = VOCAB, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


# -- a reference that does one row in plain Python -------------------------------------------------------------------------


def reference_probs(
    logits: list[float], params: SamplingParams, output: list[int], prompt: np.ndarray = PROMPT, mask: Any = None
) -> list[float]:
    """The distribution that a row is drawn from, token by token as the documentation says."""
    x = [float(v) for v in logits]
    if mask is not None:
        x = [v if ok else -math.inf for v, ok in zip(x, mask, strict=True)]
    for token, bias in params.logit_bias.items():
        x[token] += bias
    if len(output) < params.min_tokens:
        for token in (*params.stop_token_ids, *(() if params.ignore_eos else EOS)):
            x[token] = -math.inf
    counts = Counter(output)
    for token in {*prompt.tolist(), *output}:
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token, count in counts.items():
        x[token] -= params.frequency_penalty * count + params.presence_penalty
    if params.temperature == 0:
        best = max(range(len(x)), key=lambda i: x[i])
        return [float(i == best) for i in range(len(x))]
    top = max(x)
    weights = [math.exp((v - top) / params.temperature) for v in x]
    if params.top_k > 0:
        cut = sorted(weights, reverse=True)[min(params.top_k, len(weights)) - 1]
        weights = [w if w >= cut else 0.0 for w in weights]
    if params.top_p < 1:
        total, running, cut = sum(weights), 0.0, 0.0
        for weight in sorted(weights, reverse=True):
            if running / total >= params.top_p:
                break
            running, cut = running + weight, weight
        weights = [w if w >= cut else 0.0 for w in weights]
    if params.min_p > 0:
        cut = params.min_p * max(weights)
        weights = [w if w >= cut else 0.0 for w in weights]
    return [w / sum(weights) for w in weights]


def drawn_probs(sampler: Sampler, logits: torch.Tensor, state: SamplingState, monkeypatch: Any) -> list[float]:
    """The distribution that the sampler itself draws from, caught on its way into the cumulative sum."""
    caught: list[torch.Tensor] = []
    searchsorted = torch.searchsorted

    def catch(cumulative: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        caught.append(cumulative.diff(prepend=torch.zeros(1, 1, dtype=torch.float64)) / cumulative[:, -1:])
        return searchsorted(cumulative, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sampler_module.torch, "searchsorted", catch)
        token = sampler.sample(logits.clone(), [state]).token_ids[0]
    if not caught:
        return [float(i == token) for i in range(logits.shape[1])]
    return caught[0][0].tolist()


KNOBS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.0},
    {"temperature": 0.0},
    {"temperature": 1e-9},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": -1},
    {"top_k": 10_000},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"top_p": 0.999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 8, "top_p": 0.7},
    {"top_k": 8, "top_p": 0.7, "min_p": 0.2, "temperature": 1.5},
    {"logit_bias": {5: 3.0, 6: -100.0, 1: 1.0}},
    {"logit_bias": {7: 100.0}, "temperature": 0.0},
    {"min_tokens": 8, "stop_token_ids": (10, 11)},
    {"min_tokens": 8, "stop_token_ids": (10,), "ignore_eos": True},
    {"min_tokens": 3, "stop_token_ids": (10,)},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"frequency_penalty": 0.7},
    {"presence_penalty": 1.1},
    {"frequency_penalty": -1.0, "presence_penalty": -0.5, "temperature": 0.0},
    {
        "temperature": 0.8,
        "top_k": 12,
        "top_p": 0.9,
        "min_p": 0.02,
        "logit_bias": {2: 2.0, 3: 5.0, 20: -1.0},
        "min_tokens": 20,
        "stop_token_ids": (11,),
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.4,
        "presence_penalty": 0.3,
    },
]


@pytest.mark.parametrize("knobs", KNOBS, ids=lambda k: ",".join(f"{a}={b}" for a, b in k.items()) or "none")
@pytest.mark.parametrize("masked", [False, True], ids=["free", "masked"])
def test_the_distribution_equals_the_reference(knobs: dict[str, Any], masked: bool, monkeypatch: pytest.MonkeyPatch):
    sampler = make()
    params = SamplingParams(**{"temperature": 1.0, **knobs})
    for seed in range(6):
        state = sampler.new_state(params, PROMPT, EOS, 0)
        output: list[int] = []
        allowed = torch.rand(VOCAB, generator=torch.Generator().manual_seed(seed)) < 0.7
        for step in range(6):
            logits = random_logits(100 * seed + step)
            state.mask = packed(allowed) if masked else None
            mask = allowed.tolist() if masked else None
            expected = reference_probs(logits[0].tolist(), params, output, mask=mask)
            actual = drawn_probs(sampler, logits, state, monkeypatch)
            assert actual == pytest.approx(expected, abs=2e-5)
            # Choose what the answer contains so far: tokens often repeated.
            token = int(torch.randint(0, 12, (1,), generator=torch.Generator().manual_seed(31 * seed + step)))
            output.append(token)
            rewrite(state, output)


def rewrite(state: SamplingState, log: list[int]) -> None:
    """Pretend that the tokens drawn so far were others."""
    assert state.num_output == len(log)
    if state.counts is not None:
        state.counts.zero_().index_add_(0, torch.tensor(log), torch.ones(len(log)))
    if state.seen is not None:
        state.seen.zero_()
        state.seen[torch.tensor([*PROMPT.tolist(), *log])] = True


def test_the_sampler_counts_its_own_tokens():
    sampler = make()
    state = state_of(sampler, temperature=1.0, frequency_penalty=0.5, repetition_penalty=1.2, seed=5)
    tokens = [sampler.sample(random_logits(i, scale=4.0), [state]).token_ids[0] for i in range(30)]
    assert state.counts is not None
    assert state.counts.tolist() == [tokens.count(t) for t in range(VOCAB)]
    assert state.seen is not None
    assert set(torch.nonzero(state.seen).flatten().tolist()) == {*tokens, *PROMPT.tolist()}
    assert state.num_output == 30


# -- draws -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "knobs", [{}, {"temperature": 0.5}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.9}]
)
def test_draws_follow_the_distribution(knobs: dict[str, Any]):
    """Chi-square over 8000 choices of one prompt, in batches that mix them with others."""
    sampler = make(seed=11)
    logits = random_logits(3, vocab=VOCAB)
    params = SamplingParams(**knobs)
    n = 8000
    counts: Counter[int] = Counter()
    for _ in range(n // 500):
        states = [sampler.new_state(params, PROMPT, EOS, 0) for _ in range(500)]
        counts.update(sampler.sample(logits.repeat(500, 1), states).token_ids)
    expected = reference_probs(logits[0].tolist(), params, [])
    assert all(expected[t] > 0 for t in counts)
    # Bins of at least five expected draws; the rest is one bin.
    bins = [(counts[t], n * p) for t, p in enumerate(expected) if n * p >= 5]
    rest = (n - sum(c for c, _ in bins), n - sum(e for _, e in bins))
    if rest[1] > 0.5:
        bins.append(rest)
    chi2 = sum((c - e) ** 2 / e for c, e in bins)
    df = len(bins) - 1
    # Beyond 4.5 standard deviations (Wilson-Hilferty): one in 300,000 runs of a right sampler.
    assert ((chi2 / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df)) < 4.5
    assert ((chi2 / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df)) > -4.5


def test_successive_draws_of_one_choice_are_independent():
    sampler = make(vocab=2)
    state = sampler.new_state(SamplingParams(seed=1), np.asarray([0]), (), 0)
    tokens = [sampler.sample(torch.zeros(1, 2), [state]).token_ids[0] for _ in range(4000)]
    pairs = Counter(zip(tokens[::2], tokens[1::2], strict=True))
    assert all(abs(pairs[a, b] - 500) < 100 for a in (0, 1) for b in (0, 1))


def run_alone(params: SamplingParams, steps: int = 12, index: int = 0) -> list[int]:
    sampler = make(seed=1)
    state = sampler.new_state(params, PROMPT, EOS, index)
    return [sampler.sample(random_logits(i), [state]).token_ids[0] for i in range(steps)]


@pytest.mark.parametrize(
    "knobs", [{}, {"top_p": 0.8}, {"top_k": 7, "frequency_penalty": 0.5}, {"min_p": 0.05, "logprobs": 2}]
)
def test_a_seed_gives_the_same_answer_whatever_else_is_in_the_batch(knobs: dict[str, Any]):
    params = SamplingParams(seed=42, temperature=1.0, **knobs)
    alone = run_alone(params)
    sampler = make(seed=99)
    strangers = [
        state_of(sampler, temperature=0.0),
        state_of(sampler, top_p=0.5),
        state_of(sampler, temperature=1.0, logprobs=3),
        state_of(sampler, top_k=3, repetition_penalty=1.5),
    ]
    state = sampler.new_state(params, PROMPT, EOS, 0)
    together = []
    for i in range(12):
        where = i % 5
        mates = strangers[: (i * 3) % 5]
        where = min(where, len(mates))
        rows = [*mates[:where], state, *mates[where:]]
        logits = random_logits(1000 + i, rows=len(rows))
        logits[where] = random_logits(i)[0]
        together.append(sampler.sample(logits, rows).token_ids[where])
    assert together == alone


def test_seeds_and_choices_differ():
    answers = {
        (seed, index): tuple(run_alone(SamplingParams(seed=seed), index=index))
        for seed in range(4)
        for index in range(4)
    }
    assert len(set(answers.values())) == 16
    assert run_alone(SamplingParams(seed=-(2**63))) != run_alone(SamplingParams(seed=2**63 - 1))


def test_choices_without_a_seed_differ_and_follow_the_engine_seed():
    def answers(seed: int | None) -> list[int]:
        sampler = make(seed=seed)
        return sampler.sample(torch.zeros(20, VOCAB), [state_of(sampler) for _ in range(20)]).token_ids

    assert answers(5) == answers(5)
    assert answers(5) != answers(6)
    assert len(set(answers(5))) > 5
    assert answers(None) != answers(None)


# -- greedy, ties, extremes ------------------------------------------------------------------------------------------------


def test_a_greedy_batch_is_one_argmax():
    sampler = make()
    logits = random_logits(0, rows=6)
    out = sampler.sample(logits.clone(), [state_of(sampler, temperature=0.0) for _ in range(6)])
    assert out.token_ids == logits.argmax(-1).tolist()
    assert out.logprobs == [None] * 6


def test_greedy_and_drawn_rows_mix():
    sampler = make()
    logits = random_logits(0, rows=4)
    states = [state_of(sampler, temperature=t, seed=1) for t in (0.0, 1.0, 0.0, 1.0)]
    tokens = sampler.sample(logits.clone(), states).token_ids
    assert [tokens[0], tokens[2]] == logits[[0, 2]].argmax(-1).tolist()
    for i in (1, 3):
        fresh = make()
        assert fresh.sample(logits[i : i + 1].clone(), [state_of(fresh, temperature=1.0, seed=1)]).token_ids == [
            tokens[i]
        ]


@pytest.mark.parametrize(
    ("knobs", "kept"),
    [
        ({"top_k": 2}, {0, 1, 2, 3}),
        ({"top_p": 0.3}, {0, 1, 2, 3}),
        ({"min_p": 0.9}, {0, 1, 2, 3}),
        ({"top_k": 5}, set(range(8))),
    ],
)
def test_equals_are_kept_together(knobs: dict[str, Any], kept: set[int], monkeypatch: pytest.MonkeyPatch):
    sampler = make(vocab=8)
    logits = torch.tensor([[2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0]])
    probs = drawn_probs(sampler, logits, state_of(sampler, prompt=np.asarray([1]), **knobs), monkeypatch)
    assert {i for i, p in enumerate(probs) if p > 0} == kept


def test_top_k_of_one_is_greedy_even_among_equals():
    sampler = make(vocab=8)
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 2.0, 2.0, 0.0, 0.0]])
    states = [state_of(sampler, prompt=np.asarray([1]), top_k=1) for _ in range(40)]
    assert set(sampler.sample(logits.repeat(40, 1), states).token_ids) == {int(logits.argmax())}


def test_filters_of_different_rows_do_not_touch_each_other():
    sampler = make()
    knobs: list[dict[str, Any]] = [{}, {"top_k": 3}, {"min_p": 0.3}, {"top_p": 0.5}, {"top_k": 20, "min_p": 0.2}]
    logits = random_logits(8).repeat(400, 1)
    states = [state_of(sampler, **knobs[i % 5]) for i in range(400)]
    tokens = sampler.sample(logits, states).token_ids
    for k, knob in enumerate(knobs):
        expected = reference_probs(random_logits(8)[0].tolist(), SamplingParams(**knob), [])
        support = {t for t, p in enumerate(expected) if p > 0}
        drawn = set(tokens[k::5])
        assert drawn <= support
        assert len(drawn) >= min(3, len(support))


def test_impossible_tokens_are_never_drawn_at_the_ends_of_the_range(monkeypatch: pytest.MonkeyPatch):
    sampler = make(vocab=6)
    logits = torch.tensor([[-math.inf, -math.inf, 1.0, 1.0, -math.inf, -math.inf]])
    for number, token in ((0.0, 2), (0.5 - 2**-40, 2), (0.5, 3), (1 - 2**-40, 3)):
        monkeypatch.setattr(SamplingState, "uniform", lambda self, number=number: number)
        state = state_of(sampler, prompt=np.asarray([1]))
        assert sampler.sample(logits.clone(), [state]).token_ids == [token]


def test_the_uniform_number_is_in_range_and_uniform():
    sampler = make()
    state = state_of(sampler, seed=3)
    numbers = []
    for _ in range(5000):
        numbers.append(state.uniform())
        state.num_output += 1
    assert 0 <= min(numbers) < 0.002
    assert 0.998 < max(numbers) < 1
    assert np.histogram(numbers, bins=10, range=(0, 1))[0].min() > 430


@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e30])
def test_extreme_logits_and_temperatures(scale: float):
    sampler = make()
    for knobs in KNOBS:
        logits = random_logits(1, scale=scale)
        token = sampler.sample(logits, [state_of(sampler, **{"temperature": 1.0, **knobs})]).token_ids[0]
        assert 0 <= token < VOCAB


def test_a_row_of_nan_does_not_hurt_its_neighbours():
    sampler = make()
    for knobs in ({}, {"top_p": 0.5}, {"top_k": 4}, {"temperature": 0.0}):
        logits = random_logits(2, rows=2)
        expected = make().sample(logits[1:].clone(), [state_of(make(), seed=1, **knobs)]).token_ids
        logits[0] = math.nan
        tokens = sampler.sample(logits, [state_of(sampler, seed=1, **knobs) for _ in range(2)]).token_ids
        assert tokens[1:] == expected
        assert 0 <= tokens[0] < VOCAB


def test_min_tokens_holds_back_what_would_end_the_answer():
    sampler = make()
    state = state_of(sampler, temperature=0.0, min_tokens=3, stop_token_ids=(10,))
    logits = torch.zeros(1, VOCAB)
    logits[0, [3, 4, 10]] = torch.tensor([9.0, 8.0, 7.0])
    logits[0, 20] = 1.0
    assert [sampler.sample(logits.clone(), [state]).token_ids[0] for _ in range(5)] == [20, 20, 20, 3, 3]


# -- log-probabilities -----------------------------------------------------------------------------------------------------


def test_logprobs_are_the_models_own():
    sampler = make()
    logits = random_logits(4, rows=5)
    raw = torch.log_softmax(logits, -1)
    states = [
        state_of(sampler, logprobs=3, temperature=0.2, top_k=2, logit_bias={8: 50.0}, repetition_penalty=2.0),
        state_of(sampler, temperature=0.0),
        state_of(sampler, logprobs=0, temperature=1.0, frequency_penalty=1.0),
        state_of(sampler, logprobs=20, temperature=0.0),
        state_of(sampler),
    ]
    states[3].mask = packed(torch.arange(VOCAB) == 33)
    out = sampler.sample(logits.clone(), states)
    assert out.token_ids[0] == 8
    assert out.token_ids[3] == 33
    assert [lp is None for lp in out.logprobs] == [False, True, False, False, True]
    for row, token, logprob, k in zip(raw, out.token_ids, out.logprobs, (3, 0, 0, 20, 0), strict=True):
        if logprob is None:
            continue
        assert logprob.token_id == token
        assert logprob.logprob == pytest.approx(row[token].item(), abs=1e-6)
        best = sorted(range(VOCAB), key=lambda i: -row[i].item())[:k]
        assert [t for t, _ in logprob.top] == best
        assert [p for _, p in logprob.top] == pytest.approx([row[t].item() for t in best], abs=1e-6)


def test_half_precision_logits_are_sampled_in_float32():
    sampler = make()
    logits = random_logits(4).bfloat16()
    out = sampler.sample(logits, [state_of(sampler, temperature=0.0, logprobs=1)])
    assert out.logprobs[0] is not None
    assert out.logprobs[0].logprob == pytest.approx(torch.log_softmax(logits.float(), -1).max().item(), abs=1e-6)


def test_a_wrong_shape_is_refused():
    sampler = make()
    with pytest.raises(AssertionError, match="rows"):
        sampler.sample(torch.zeros(2, VOCAB), [state_of(sampler)])


def test_a_grammar_that_allows_only_the_end_goes_before_min_tokens():
    sampler = make()
    state = state_of(sampler, min_tokens=5)
    state.mask = packed(torch.arange(VOCAB) == EOS[0])
    assert sampler.sample(random_logits(0), [state]).token_ids == [EOS[0]]
    state.mask = packed((torch.arange(VOCAB) == EOS[0]) | (torch.arange(VOCAB) == 20))
    assert sampler.sample(random_logits(0), [state]).token_ids == [20]
