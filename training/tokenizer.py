"""sightline-tiny's own tokenizer: single bytes, plus whole words for the closed vocabulary of its dialogues.

It is a byte-level BPE without merges (`ignore_merges`): a pre-token that is in the vocabulary is one token, anything
else is spelled byte by byte. So every text encodes, and a word in a picture is read letter by letter.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random

import talk
import world
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
MAX_LENGTH = 4096
CHAT_TEMPLATE = """\
{%- macro show(content) -%}
{%- if content is string -%}
{{- content -}}
{%- elif content -%}
{%- for part in content -%}
{%- if part.type in ('image', 'image_url', 'input_image') or 'image' in part or 'image_url' in part -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{{- '<|im_start|>' + ('system' if message.role == 'developer' else message.role) + '\\n' -}}
{{- show(message.content) -}}
{%- for call in message.tool_calls or [] -%}
{%- set call = call.function if call.function else call -%}
{{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' -}}
{{- (call.arguments if call.arguments is string else call.arguments | tojson) + '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def corpus(rng: Random, n: int) -> tuple[Counter[str], Counter[str]]:
    """Pre-tokens of questions and of answers; the strings shown are digits here, so no word of a picture gets in."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    advance = [[0.6] * len(world.CHARS)] * len(world.FONTS)
    questions, answers = Counter[str](), Counter[str]()
    for i in range(n):
        strings = [("7", rng.choice(("word", "number", "letter", "text"))) for _ in range(rng.randint(1, 2))]
        pics = [
            world.scene(rng, 128, 128) if rng.random() < 0.7 else world.text_picture(rng, 128, 128, advance, strings)
            for _ in range(2)
        ]
        messages = (talk.single(pics[0], rng), talk.pair(pics, rng), talk.textual(rng))[i % 3]
        for m in messages:
            (answers if m.role == "assistant" else questions).update(t for t, _ in split.pre_tokenize_str(m.text))
    return questions, answers


def build() -> Tokenizer:
    questions, answers = corpus(Random(0), 12000)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {t for t, n in answers.items() if n >= 6 and len(t) > 1}
    words |= {t for t, n in questions.items() if n >= 20 and len(t) > 1 and (t[0] in "Ġ<" or t[0].isupper())}
    words |= {"Ġ" + w for w in ("seven", "eight", "nine", "ten", "zero", "user", "tool")} | {
        "user",
        "assistant",
        "system",
        "tool",
    }
    words = {t for t in words if not any(c.isdigit() for c in t) and (t[-4:] == "JSON" or not t.lstrip("Ġ").isupper())}
    vocab = {t: i for i, t in enumerate(alphabet + sorted(words))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(t)): {
                "content": t, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True,
            }
            for t in SPECIAL
        },
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_LENGTH,
        "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    t = build()
    print(t.get_vocab_size(), [w for w, i in sorted(t.get_vocab().items(), key=lambda p: p[1])][250:])
