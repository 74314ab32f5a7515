"""Text as it comes: equal to the whole, never half a character, cut at the first stop string."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.prompt.detokenizer import Detokenizer
from sightline.prompt.tokenizer import Tokenizer
from tests import tiny


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer(tiny.qwen2_vl())


def run(ids: list[int], size: int = 1, **options) -> tuple[list[str], int, str | None]:
    """(deltas, tokens used, stop string) for ids pushed `size` at a time."""
    detokenizer = Detokenizer(tokenizer(), **options)
    deltas: list[str] = []
    used = 0
    for at in range(0, len(ids), size):
        delta = detokenizer.push(ids[at : at + size], final=at + size >= len(ids))
        deltas.append(delta.text)
        used += delta.num_tokens_used
        if delta.stopped is not None:
            return deltas, used, delta.stopped
    return deltas, used, None


TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
IDS = st.lists(st.integers(0, tiny.NUM_TEXT_TOKENS - 1), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(TEXTS.filter(bool), st.integers(1, 5))
def test_deltas_of_text_are_the_text(text: str, size: int) -> None:
    ids = tokenizer().encode(text)
    deltas, used, _ = run(ids, size)
    assert "".join(deltas) == tokenizer().decode(ids)
    assert used == len(ids)
    assert all("\ufffd" not in d for d in deltas) or "\ufffd" in text


@settings(max_examples=200, deadline=None)
@given(IDS, st.integers(1, 5))
def test_deltas_of_any_ids_are_the_decoding(ids: list[int], size: int) -> None:
    assert "".join(run(ids, size)[0]) == tokenizer().decode(ids)


@settings(max_examples=200, deadline=None)
@given(TEXTS.filter(lambda s: len(s) > 3), st.data())
def test_first_stop_string_cuts(text: str, data) -> None:
    ids = tokenizer().encode(text)
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : start + data.draw(st.integers(1, 4))]
    decoded = tokenizer().decode(ids)
    if stop not in decoded:
        return
    deltas, used, stopped = run(ids, data.draw(st.integers(1, 4)), stop=(stop, "never to be found"))
    assert stopped == stop
    assert "".join(deltas) == decoded[: decoded.index(stop)]
    # One token fewer would not have completed the stop string.
    assert stop in tokenizer().decode(ids[:used])
    assert stop not in tokenizer().decode(ids[: used - 1])
    included = run(ids, 1, stop=(stop,), include_stop=True)[0]
    assert "".join(included) == decoded[: decoded.index(stop)] + stop


def test_stop_over_several_tokens_is_held_back() -> None:
    ids = tokenizer().encode("a STOP b")
    detokenizer = Detokenizer(tokenizer(), stop=("STOP",))
    shown = ""
    for token in ids:
        delta = detokenizer.push([token])
        shown += delta.text
        assert "S" not in shown
        if delta.stopped:
            break
    assert shown == "a "
    assert delta.stopped == "STOP"


def test_what_only_began_like_a_stop_is_given_out() -> None:
    assert "".join(run(tokenizer().encode("a STO b ST"), stop=("STOP",))[0]) == "a STO b ST"


def test_min_tokens_come_before_any_stop() -> None:
    ids = tokenizer().encode("xxyxxy")
    assert "".join(run(ids, stop=("y",))[0]) == "xx"
    deltas, _, stopped = run(ids, stop=("y",), min_tokens=4)
    assert "".join(deltas).startswith("xxyx")
    assert stopped == "y"


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens(skip: bool) -> None:
    ids = [*tokenizer().encode("a"), tiny.IM_END, *tokenizer().encode("b")]
    text = "".join(run(ids, skip_special_tokens=skip)[0])
    assert text == ("ab" if skip else "a<|im_end|>b")


def test_token_bytes_join_to_the_text() -> None:
    text = "naïve 🎈 text\n"
    ids = tokenizer().encode(text)
    assert b"".join(tokenizer().token_bytes(i) for i in ids) == text.encode()
    assert tokenizer().token_bytes(tiny.IM_END) == b"<|im_end|>"
