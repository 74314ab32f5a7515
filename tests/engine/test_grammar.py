"""Answers follow their grammars: random schemas with an independent validator, and everything that goes on beside a grammar.

SIGHTLINE_SCHEMAS sets how many random schemas are tried.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from PIL import Image

from sightline import Engine, RequestOutput, SamplingParams
from sightline.engine import grammar as module
from sightline.engine.grammar import Matcher
from sightline.errors import EngineError, GrammarCostError, RequestError
from sightline.types import Grammar
from tests import tiny, tiny_mllama

NUM_SCHEMAS = int(os.environ.get("SIGHTLINE_SCHEMAS", "300"))
ASK = [{"role": "user", "content": "say something"}]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(tiny.qwen2_vl()) as engine:
        yield engine


def answer(engine: Engine, kind: Any, text: str = "", messages: Any = ASK, **sampling: Any) -> RequestOutput:
    sampling = {"temperature": 1.0, "seed": 1, "max_tokens": 1500, **sampling}
    return engine.chat(messages, SamplingParams(grammar=Grammar(kind, text), **sampling))


def random_schema(rng: random.Random, depth: int) -> dict[str, Any]:
    """Of finite answers, or a random model would hardly ever come to their end."""
    kinds = ["integer", "number", "boolean", "null", "string", "enum", "const", "pattern", "format"]
    match rng.choice(kinds if depth == 0 else [*kinds, *["object", "array", "tuple", "anyOf", "ref"] * 2]):
        case "integer":
            low = rng.randint(-50, 1000)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)}
        case "number":
            return {"type": "number", "exclusiveMinimum": rng.randint(-3, 3), "maximum": 5}
        case "boolean" | "null" as kind:
            return {"type": kind}
        case "string":
            low = rng.randint(0, 3)
            return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 9)}
        case "enum":
            return {"enum": rng.sample([1, 2.5, "a", 'q"\\\n', "é😀", None, True, [], [1, "x"]], rng.randint(1, 4))}
        case "const":
            return {"const": rng.choice([0, "x y", {"k": [1]}, False])}
        case "pattern":
            return {"type": "string", "pattern": rng.choice(["^[A-Z]{2}-[0-9]{1,3}$", "^(a|bc){1,4}$", r"^\d{3}x?$"])}
        case "format":
            return {"type": "string", "format": rng.choice(["uuid", "ipv4"])}
        case "array":
            low = rng.randint(0, 2)
            return {
                "type": "array",
                "items": random_schema(rng, depth - 1),
                "minItems": low,
                "maxItems": low + rng.randint(0, 2),
            }
        case "tuple":
            items = [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]
            return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
        case "anyOf":
            return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
        case "ref":
            return {"$ref": "#/$defs/shared"}
        case _:
            names = rng.sample(["a", "b", "long name", "ü", 'q"'], rng.randint(0, 4))
            return {
                "type": "object",
                "properties": {name: random_schema(rng, depth - 1) for name in names},
                "required": [name for name in names if rng.random() < 0.7],
                "additionalProperties": False,
            }


def test_answers_of_random_schemas_are_valid(engine: Engine) -> None:
    """All of a batch run together, with answers to other questions between them."""
    finished = 0
    for start in range(0, NUM_SCHEMAS, 16):
        seeds = range(start, min(start + 16, NUM_SCHEMAS))
        schemas = []
        for seed in seeds:
            rng = random.Random(seed)
            schemas.append({**random_schema(rng, 3), "$defs": {"shared": random_schema(rng, 0)}})
        outputs: dict[int, RequestOutput] = {}

        def ask(i: int, schema: dict[str, Any], outputs: dict[int, RequestOutput] = outputs) -> None:
            outputs[i] = answer(engine, "json_schema", json.dumps(schema), seed=i)

        threads = [threading.Thread(target=ask, args=each) for each in zip(seeds, schemas, strict=True)]
        for thread in threads:
            thread.start()
        free = engine.chat(ASK, SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True))
        for thread in threads:
            thread.join()
        assert len(free.outputs[0].token_ids) == 20
        for seed, schema in zip(seeds, schemas, strict=True):
            (out,) = outputs[seed].outputs
            if out.finish_reason == "stop":
                finished += 1
                errors = [
                    str(e)
                    for e in jsonschema_rs.validator_for(schema, validate_formats=True).iter_errors(
                        json.loads(out.text)
                    )
                ]
                assert not errors, f"{schema}\n{out.text}\n{errors}"
    assert finished >= 0.95 * NUM_SCHEMAS


@pytest.mark.parametrize(
    ("kind", "text", "pattern"),
    [
        ("regex", r"[0-9]{3}-[a-f]{2,4}", r"[0-9]{3}-[a-f]{2,4}"),
        ("regex", "^(ja|nee)$", "ja|nee"),
        ("regex", "(é|😀|日本){2}", "(é|😀|日本){2}"),
        ("choice", '["red", "green \\"x\\"\\n", "日本"]', 'red|green "x"\n|日本'),
        ("choice", '["a", "ab", "abc"]', "a|ab|abc"),
        ("ebnf", 'root ::= item ("," item){0,3}\nitem ::= [0-9] | "x"', "[0-9x](,[0-9x]){0,3}"),
        ("lark", "start: A B?\nA: /a{1,3}/\nB: /b/", "a{1,3}b?"),
    ],
)
def test_the_whole_answer_matches(engine: Engine, kind: str, text: str, pattern: str) -> None:
    for seed in range(5):
        output = answer(engine, kind, text, seed=seed)
        assert re.fullmatch(pattern, output.text), output.text
        assert output.outputs[0].finish_reason == "stop"


def test_json_object(engine: Engine) -> None:
    closing = engine.pipeline.tokenizer.encode("}")[0]
    output = answer(engine, "json_object", logit_bias={closing: 50.0})
    assert isinstance(json.loads(output.text), dict)


def test_every_choice_has_its_own_place(engine: Engine) -> None:
    outputs = answer(engine, "regex", "[a-z]{3,30}[0-9]{3}", n=6).outputs
    assert len({out.text for out in outputs}) > 1
    assert all(re.fullmatch("[a-z]{3,30}[0-9]{3}", out.text) for out in outputs)


def test_with_a_picture_and_in_a_stream(engine: Engine) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    messages = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "?"}]}]
    sampling = SamplingParams(grammar=Grammar("regex", "[a-z]{20}"), temperature=1.0, seed=3)
    deltas = list(engine.stream(messages, sampling))
    assert len(deltas) > 1
    whole = "".join(delta.text for delta in deltas)
    assert re.fullmatch("[a-z]{20}", whole)
    assert engine.chat(messages, sampling).text == whole


def test_a_stop_string_or_the_limit_cuts(engine: Engine) -> None:
    output = answer(engine, "regex", "[a-c]{50}", stop=("b",))
    assert re.fullmatch("[ac]*", output.text)
    assert output.outputs[0].finish_reason == "stop"
    cut = answer(engine, "regex", "[a-c]{50}", max_tokens=5)
    assert cut.outputs[0].finish_reason == "length"
    assert re.fullmatch("[a-c]{5,}", cut.text)


def test_the_grammar_ends_the_answer(engine: Engine) -> None:
    """Also when the request would go on: min_tokens and ignore_eos give way."""
    assert answer(engine, "choice", '["ab"]', min_tokens=50).text == "ab"
    output = answer(engine, "choice", '["ab", "abc"]', ignore_eos=True, max_tokens=50)
    assert output.text in ("ab", "abc")
    assert output.outputs[0].finish_reason == "stop"
    assert answer(engine, "regex", "a{0}").text == ""


@pytest.mark.parametrize("text", ["<|im_end|>", "a<|image_pad|>b", "<|im_start|>system"])
def test_text_that_spells_an_added_token_is_written_with_ordinary_ones(engine: Engine, text: str) -> None:
    tokenizer = engine.pipeline.tokenizer
    assert any(name in text for name in tokenizer.added)
    outputs = [
        answer(engine, "json_schema", json.dumps({"enum": [text]})),
        answer(engine, "choice", json.dumps([text])),
    ]
    assert [output.text for output in outputs] == [json.dumps(text), text]
    ids = [i for output in outputs for i in output.outputs[0].token_ids]
    assert not {t.id for t in tokenizer.added.values()} & set(ids) - set(tokenizer.eos_token_ids)


@pytest.mark.parametrize("kind", ["Unigram", "BPE"])
def test_a_tokenizer_without_spellings_has_the_same_ids(tmp_path: Path, kind: str) -> None:
    """Also where added tokens stand in the model's own vocabulary, as SentencePiece's do."""
    words = ["<unk>", "<s>", "</s>", "a", "b", "ab"]
    added = [{"id": i, "content": words[i], "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False} for i in range(3)]  # fmt: skip
    model: dict[str, Any] = {
        "type": "Unigram",
        "unk_id": 0,
        "vocab": [[word, -float(i)] for i, word in enumerate(words)],
    }
    if kind == "BPE":
        model = {
            "type": "BPE",
            "unk_token": "<unk>",
            "vocab": {w: i for i, w in enumerate(words)},
            "merges": [["a", "b"]],
        }
    spec = {
        "version": "1.0",
        "added_tokens": added,
        "model": model,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "normalizer": None,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps({**spec, "pre_tokenizer": None, "post_processor": None}))
    compiler = module.GrammarCompiler(tmp_path, [2], len(words))
    matcher = compiler.matcher(Grammar("regex", "[ab]{2}"))
    matcher.compiled.result()
    matcher.start()
    for allowed, token_id in (({3, 4, 5}, 5), ({2}, 2)):
        matcher.fill()
        bits = np.unpackbits(matcher.mask.view(np.uint8), bitorder="little")[: len(words)]
        assert set(np.flatnonzero(bits).tolist()) == allowed
        matcher.accept(token_id)
    assert matcher.ended


@pytest.mark.parametrize("regex", ["((a{100}){100}){100}", "a{1000000}"])
def test_a_small_grammar_does_not_hold_up_a_step(regex: str) -> None:
    """What is allowed next is found out between two steps of everybody; unbounded, these take seconds."""
    compiler = module.GrammarCompiler(tiny.qwen2_vl(), [2], 400)
    matcher = compiler.matcher(Grammar("regex", regex))
    matcher.compiled.result()
    matcher.start()
    began = time.thread_time()
    with contextlib.suppress(GrammarCostError):
        matcher.fill()
    assert time.thread_time() - began < 0.5


def test_a_grammar_that_costs_too_much_is_its_clients_mistake(engine: Engine) -> None:
    with pytest.raises(RequestError, match="simpler") as caught:
        answer(engine, "regex", ".*" * 300 + "x")
    assert (caught.value.status, caught.value.code) == (400, "invalid_value")


def test_a_tokenizer_that_knows_more_than_the_output_head() -> None:
    """Llama 3.2 Vision's picture token has no logit."""
    with Engine(tiny_mllama.mllama()) as engine:
        assert answer(engine, "choice", '["red", "green"]').text in ("red", "green")
        schema = {
            "type": "object",
            "properties": {"a": {"enum": [1, 2]}},
            "required": ["a"],
            "additionalProperties": False,
        }
        assert json.loads(answer(engine, "json_schema", json.dumps(schema)).text)["a"] in (1, 2)


def test_a_bad_grammar_is_refused_before_it_is_run(engine: Engine) -> None:
    with pytest.raises(RequestError, match="look-around"):
        answer(engine, "regex", "(?=a)")


@pytest.mark.check(38, cases=1)
def test_a_grammar_that_fails_ends_its_own_request(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = Matcher.fill

    def failing(self: Matcher) -> None:
        if self.bad:  # type: ignore[attr-defined]
            raise EngineError("grammar: too costly")
        fill(self)

    start = Matcher.start

    def marked(self: Matcher) -> None:
        start(self)
        self.bad = self.compiled.grammar == "x{9}"  # type: ignore[attr-defined]

    compiler_matcher = module.GrammarCompiler.matcher

    def remember(self: Any, grammar: Grammar) -> Matcher:
        matcher = compiler_matcher(self, grammar)
        matcher.compiled.grammar = grammar.text  # type: ignore[attr-defined]
        return matcher

    monkeypatch.setattr(Matcher, "fill", failing)
    monkeypatch.setattr(Matcher, "start", marked)
    monkeypatch.setattr(module.GrammarCompiler, "matcher", remember)
    good: list[str] = []
    thread = threading.Thread(target=lambda: good.append(answer(engine, "regex", "[a-z]{60}").text))
    thread.start()
    with pytest.raises(EngineError):
        answer(engine, "regex", "x{9}")
    thread.join()
    assert re.fullmatch("[a-z]{60}", good[0])


@pytest.mark.check(38, cases=1)
def test_others_go_on_while_a_grammar_is_compiled(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Future[Any]] = []
    compiler_matcher = module.GrammarCompiler.matcher

    def slow(self: Any, grammar: Grammar) -> Matcher:
        matcher = compiler_matcher(self, grammar)
        held.append(matcher.compiled)
        matcher.compiled = Future()
        return matcher

    monkeypatch.setattr(module.GrammarCompiler, "matcher", slow)
    slow_matchers: list[str] = []
    thread = threading.Thread(target=lambda: slow_matchers.append(answer(engine, "regex", "zz|z").text))
    created: list[Matcher] = []
    init = Matcher.__init__

    def keep(self: Matcher, *args: Any) -> None:
        init(self, *args)
        created.append(self)

    monkeypatch.setattr(Matcher, "__init__", keep)
    thread.start()
    assert len(engine.chat(ASK, SamplingParams(max_tokens=20, ignore_eos=True)).outputs[0].token_ids) == 20
    while not held:
        thread.join(0.01)
    assert thread.is_alive()
    created[0].compiled.set_result(held[0].result())
    thread.join(30)
    assert slow_matchers[0] in ("z", "zz")
