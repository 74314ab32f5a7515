"""A checkpoint's tokenizer, with one rule added: text that a client typed never becomes a special token."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer as HFTokenizer

from sightline.errors import CheckpointError
from sightline.prompt.processor import read_json

_SPACE = "\u2581"  # SentencePiece's spelling
_AFTER_TOKEN = {False: re.compile(""), True: re.compile(r"\s*")}


class AddedToken(NamedTuple):
    """An entry of tokenizer.json's `added_tokens`; lstrip and rstrip swallow the white space beside it."""

    id: int
    content: str
    lstrip: bool
    rstrip: bool


class Tokenizer:
    """Two tokenizers of one tokenizer.json: the whole one, and one without added tokens for the text between them.

    eos_token_ids: ids that end an answer. bos_token: text of the beginning-of-sequence token, if the checkpoint has one.
    Raises `CheckpointError` when tokenizer.json is missing or broken.
    """

    def __init__(self, model_dir: Path) -> None:
        path = model_dir / "tokenizer.json"
        try:
            spec = json.loads(path.read_text(encoding="utf-8"))
            self._whole = HFTokenizer.from_str(json.dumps(spec))
            added = [AddedToken(t["id"], t["content"], t["lstrip"], t["rstrip"]) for t in spec.get("added_tokens", ())]
            plain = json.dumps({**spec, "added_tokens": [], "post_processor": None})
            self._plain = HFTokenizer.from_str(plain)
            # A text's first piece may get a space in front (SentencePiece vocabularies); those after added tokens do not.
            inner = plain.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
            self._inner = HFTokenizer.from_str(inner) if inner != plain else self._plain
        except FileNotFoundError as error:
            raise CheckpointError(f"{model_dir} holds no tokenizer.json.") from error
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(f"tokenizer.json cannot be read: {error}") from error
        for tokenizer in (self._whole, self._plain, self._inner):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self.added = {t.content: t for t in added}
        self._special_ids = frozenset(t["id"] for t in spec.get("added_tokens", ()) if t.get("special"))
        self._added_pattern = _any_of(self.added)
        self._byte_level = _uses(spec, "ByteLevel")
        self._drops_first_space = self._decodes_without_first_space()
        config = read_json(model_dir / "tokenizer_config.json")
        self.bos_token = _token_text(config.get("bos_token"))
        self.eos_token = _token_text(config.get("eos_token"))
        self.eos_token_ids = self._eos_ids(model_dir)
        # Whether encoding puts the beginning-of-sequence token in front by itself.
        self.adds_bos = self.bos_token is not None and self._whole.encode("a").tokens[:1] == [self.bos_token]
        self.vocab_size = self._whole.get_vocab_size(with_added_tokens=True)
        self.max_token_chars = max(map(len, self._whole.get_vocab()), default=1)

    def _eos_ids(self, model_dir: Path) -> tuple[int, ...]:
        eos = read_json(model_dir / "generation_config.json").get("eos_token_id")
        if eos is None:
            eos = self.token_to_id(self.eos_token) if self.eos_token else None
        if eos is None:
            return ()
        return tuple(eos) if isinstance(eos, list) else (int(eos),)

    def _decodes_without_first_space(self) -> bool:
        """Whether decoding leaves out the space that encoding put in front of a text."""
        vocab = self._whole.get_vocab(with_added_tokens=False)
        space = next((i for token, i in vocab.items() if token[:1] == _SPACE and token[1:].isalnum()), None)
        return space is not None and not self._whole.decode([space]).startswith(" ")

    def reserve(self, content: str, token_id: int) -> None:
        """Let templates write `content` for `token_id`, an id beyond the vocabulary, unless the tokenizer has such a token."""
        if content not in self.added:
            self.added[content] = AddedToken(token_id, content, lstrip=False, rstrip=False)
            self._added_pattern = _any_of(self.added)

    # -- text to ids ---------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; what looks like an added token is spelled out."""
        return _encode(self._plain, text)

    def encode_trusted(self, text: str, client_positions: Collection[int] = ()) -> list[int]:
        """Ids of a rendered prompt. An added token is recognised unless it begins at a client's character; everything
        between added tokens is tokenised as transformers would."""
        ids: list[int] = []
        start = position = 0
        while match := self._added_pattern.search(text, position):
            if match.start() in client_positions:
                # A shorter token may still begin inside; look again one character on.
                position = match.start() + 1
                continue
            token = self.added[match.group()]
            before = text[start : match.start()]
            ids += _encode(self._inner if start else self._plain, before.rstrip() if token.lstrip else before)
            ids.append(token.id)
            position = start = _AFTER_TOKEN[token.rstrip].match(text, match.end()).end()  # type: ignore[union-attr]
        return ids + _encode(self._inner if start else self._plain, text[start:])

    def token_to_id(self, token: str) -> int | None:
        """Id of a vocabulary entry or added token."""
        found: int | None = self._whole.token_to_id(token)
        return found

    # -- ids to text ---------------------------------------------------------------------------------------------------

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence."""
        return str(self._whole.decode(ids, skip_special_tokens=skip_special_tokens))

    def stream(self, *, skip_special_tokens: bool = True) -> TextStream:
        """A decoder of ids that come one by one."""
        return TextStream(self, skip_special_tokens, self._drops_first_space)

    def id_to_token(self, token_id: int) -> str:
        """The vocabulary's own spelling; empty for ids that no token has."""
        return self._whole.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; joined over tokens they are the answer's UTF-8."""
        token = self.id_to_token(token_id)
        if token in self.added:
            return token.encode()
        if self._byte_level:
            known = all(c in _BYTE_OF_CHAR for c in token)
            return bytes(_BYTE_OF_CHAR[c] for c in token) if known else token.encode()
        fallback = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
        return bytes([int(fallback[1], 16)]) if fallback else token.replace(_SPACE, " ").encode()

    def is_special(self, token_id: int) -> bool:
        """Whether `skip_special_tokens` leaves it out."""
        return token_id in self._special_ids


class TextStream:
    """Text of ids as they come; never half a character. Joined, it is the decoding of all ids.

    tokenizers' own DecodeStream raises on bytes that are no UTF-8, and decodes again and again while no character ends.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, drop_first_space: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._drop_first_space = drop_first_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this id completes. Bytes that can be no character show as U+FFFD."""
        if self._skip_special and self._tokenizer.is_special(token_id):
            return ""
        return self._shown(self._utf8.decode(self._tokenizer.token_bytes(token_id)))

    def flush(self) -> str:
        """U+FFFD for a character that was never completed."""
        return self._shown(self._utf8.decode(b"", final=True))

    def _shown(self, text: str) -> str:
        if text and self._drop_first_space:
            self._drop_first_space = False
            return text.removeprefix(" ")
        return text


def _encode(tokenizer: HFTokenizer, text: str) -> list[int]:
    # The batch form leaves out offsets and gives other threads the interpreter while it works.
    ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return ids


def _any_of(tokens: Collection[str]) -> re.Pattern[str]:
    """Matches the longest of the tokens that begin at a place."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def _byte_of_char() -> dict[str, int]:
    """The byte-level BPE alphabet (GPT-2): printable bytes stand for themselves, others for characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


def _uses(spec: dict, kind: str) -> bool:
    return f'"{kind}"' in json.dumps([spec.get("pre_tokenizer"), spec.get("decoder")])


def _token_text(value: str | dict | None) -> str | None:
    return value["content"] if isinstance(value, dict) else value
