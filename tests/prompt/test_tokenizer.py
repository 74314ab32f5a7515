"""Text to ids and back, for vocabularies of both kinds: byte-level BPE (Qwen, Llama 3) and SentencePiece (Llama 2)."""

from __future__ import annotations

import functools
import json
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from sightline.errors import CheckpointError
from sightline.prompt.detokenizer import Detokenizer
from sightline.prompt.tokenizer import Tokenizer
from tests import tiny

SCHEMES = ("legacy", "first", "always", "never")
SPECIAL = ("<s>", "</s>", "<image>")


@functools.cache
def sentencepiece(scheme: str) -> tuple[HFTokenizer, Tokenizer]:
    """A small vocabulary with byte fallback. scheme: how a space comes before the text, as in Llama 2's files."""
    pieces = ["▁", "a", "b", "c", "▁a", "▁b", "ab", "▁ab", "▁▁", "<", ">", "image", "s", "é"]
    tokens = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b"), ("▁", "▁")]
    vocab = {token: i for i, token in enumerate(tokens)}
    whole = HFTokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if scheme == "legacy":
        whole.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        whole.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    whole.decoder = decoders.Sequence([*parts, *([] if scheme == "never" else [decoders.Strip(" ", 1, 0)])])
    whole.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    folder = Path(tempfile.mkdtemp())
    whole.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    return whole, Tokenizer(folder)


def streamed(tokenizer: Tokenizer, ids: list[int], **options: bool) -> str:
    detokenizer = Detokenizer(tokenizer, **options)
    return "".join(detokenizer.push([i], final=at == len(ids) - 1).text for at, i in enumerate(ids))


PIECES = st.lists(st.sampled_from([*SPECIAL, "a", "b", "ab", " ", "  ", "\n", "é", "🎈", "<", "image"]), max_size=12)


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=150, deadline=None)
@given(pieces=PIECES)
def test_templates_text_is_tokenised_as_a_whole(scheme: str, pieces: list[str]) -> None:
    whole, mine = sentencepiece(scheme)
    text = "".join(pieces)
    assert mine.encode_trusted(text) == whole.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=150, deadline=None)
@given(pieces=PIECES.filter(bool))
def test_streamed_text_is_the_whole_decoding(scheme: str, pieces: list[str]) -> None:
    whole, mine = sentencepiece(scheme)
    ids = whole.encode("".join(pieces), add_special_tokens=False).ids
    for skip in (True, False):
        assert streamed(mine, ids, skip_special_tokens=skip) == whole.decode(ids, skip_special_tokens=skip)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 280), min_size=1, max_size=12))
def test_any_bytes_stream(ids: list[int]) -> None:
    """tokenizers shows every byte of a run with a mistake in it as U+FFFD, also those before it that were shown already."""
    whole, mine = sentencepiece("first")
    text, expected = streamed(mine, ids), whole.decode(ids)
    assert text == expected or ("\ufffd" in expected and "\ufffd" in text)


@pytest.mark.parametrize("data", [b"\x80", b"\xf0\x9f"], ids=["never a character", "half a character"])
def test_broken_bytes_cost_no_more_than_others(data: bytes) -> None:
    mine = Tokenizer(tiny.qwen2_vl())
    ids = [next(i for i in range(tiny.NUM_TEXT_TOKENS) if mine.token_bytes(i) == bytes([b])) for b in data] * 10_000
    began = time.perf_counter()
    assert streamed(mine, ids) == "\ufffd" * 10_000
    assert time.perf_counter() - began < 1.0


def test_space_around_added_tokens_is_swallowed_as_declared(tmp_path: Path) -> None:
    whole = HFTokenizer.from_file(str(tiny.qwen2_vl() / "tokenizer.json"))
    whole.add_special_tokens([AddedToken("<l>", lstrip=True), AddedToken("<r>", rstrip=True)])
    whole.save(str(tmp_path / "tokenizer.json"))
    mine = Tokenizer(tmp_path)
    for text in ("a <l> b", "a <r> b", "a \n<l> <r>  \n b", "<r> ", " <l>", "<r><l> <r> a"):
        assert mine.encode_trusted(text) == whole.encode(text, add_special_tokens=False).ids


def test_begin_and_end_tokens(tmp_path: Path) -> None:
    mine = Tokenizer(tiny.qwen2_vl())
    assert tiny.IM_END in mine.eos_token_ids
    _, llama = sentencepiece("first")
    assert (llama.bos_token, llama.eos_token) == ("<s>", "</s>")
    assert llama.eos_token_ids == (llama.token_to_id("</s>"),)
    with pytest.raises(CheckpointError, match="holds no"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer(tmp_path)
