"""One tiny random checkpoint for each family, conversations to have with it, and transformers as the judge on the same device.

Heads are as wide as the releases', so the kernels are those that the releases run on. The judge reads the answer as a
prompt: one forward says at each step what it would have said, so one unlucky tie does not spoil the rest of an answer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from PIL import Image
from torch import Tensor

from sightline import Engine, SamplingParams
from sightline.engine.output import RequestOutput
from tests import llava_oracle, mllama_oracle, oracle, tiny, tiny_llava, tiny_mllama
from tests.models.test_qwen2_5_vl import tiny_model as qwen2_5_vl

Messages = list[dict[str, Any]]
NEW_TOKENS = 12
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0)
# float32: two ids whose log-probabilities are nearer than this are a tie, and no log-probability is off by more than FAR.
TIE, FAR = 1e-3, 2e-3
# bfloat16: steps at which float32's first id leads by more than this are clear.
CLEAR = 0.5


@dataclass(frozen=True)
class Kind:
    """make: the checkpoint that we serve. judge: the same weights in transformers' layout, where that is another."""

    make: Callable[[], Path]
    logprobs: Callable[..., Tensor]
    judge: Callable[[], Path] | None = None
    pictures: bool = True
    placeholders: tuple[int, ...] = (tiny.IMAGE_PAD, tiny.IDS["<|video_pad|>"])

    @property
    def sampling(self) -> SamplingParams:
        """Greedy, but never a placeholder: the judge would take one in an answer for a picture."""
        return msgspec.structs.replace(GREEDY, logit_bias=dict.fromkeys(self.placeholders, -100.0))


def _llava(kind: str, text: str, judge: dict[str, Any] | None = None, **layout: Any) -> Kind:
    make = functools.partial(tiny_llava.llava, kind, text=text, wide=True)
    theirs = functools.partial(make, pad=layout.get("pad", False)) if layout else None
    return Kind(functools.partial(make, **layout), llava_oracle.logprobs, theirs)


def _text(kind: str) -> Kind:
    return Kind(functools.partial(tiny_llava.text, kind, wide=True), llava_oracle.logprobs, pictures=False)


FAMILIES: dict[str, Kind] = {
    "Qwen2-VL": Kind(functools.partial(tiny.qwen2_vl, wide=True), oracle.transformers_logprobs),
    "Qwen2.5-VL": Kind(functools.partial(qwen2_5_vl, wide=True), oracle.transformers_logprobs),
    "Llama 3.2 Vision": Kind(
        # its output head has no placeholder
        functools.partial(tiny_mllama.mllama, wide=True),
        mllama_oracle.logprobs,
        placeholders=(),
    ),
    "LLaVA 1.5": _llava("llava", "llama"),
    "LLaVA 1.5, authors' layout": _llava("llava", "llama", layout="original", tower="beside", pad=True),
    "LLaVA-NeXT, Llama": _llava("next", "llama"),
    "LLaVA-NeXT, Mistral": _llava("next", "mistral"),
    "LLaVA-NeXT, Qwen2": _llava("next", "qwen2"),
    "LLaVA-NeXT, authors' layout": _llava("next", "mistral", layout="original"),
    "OneVision": _llava("onevision", "qwen2"),
    "OneVision, authors' layout": _llava("onevision", "qwen2", layout="original"),
    "Llama": _text("llama"),
    "Mistral": _text("mistral"),
    "Qwen2": _text("qwen2"),
}


def conversations(pictures: bool) -> dict[str, Messages]:
    """Without a picture, with one, two side by side, three between words, and of two turns."""

    def user(*parts: Any) -> dict[str, Any]:
        content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
        return {"role": "user", "content": content}

    reply = {"role": "assistant", "content": "A red square."}
    texts = {
        "text": [user("How many shapes are there?")],
        "two turns of text": [user("What shows the picture?"), reply, user("Are you sure?")],
    }
    if not pictures:
        return texts
    a, b, c = (oracle.picture(w, h, seed=i) for i, (w, h) in enumerate([(100, 150), (300, 60), (400, 300)]))
    return texts | {
        "one picture": [user(a, "What is in this picture?")],
        "two pictures": [user(a, b, "Which one is larger?")],
        "interleaved": [user("First", a, "then", b, "and", c, "which is red?")],
        "two turns, a picture in each": [user(a, "What is it?"), reply, user(b, "And this?")],
    }


def pictures_of(messages: Messages) -> list[Image.Image]:
    """In the order of the prompt."""
    parts = [part for message in messages for part in message["content"]]
    return [part["image"] for part in parts if isinstance(part, dict) and "image" in part]


class Answers(NamedTuple):
    """Over all steps of all answers [steps]. ids: what the engine said; logprobs: what it gave them; truth: those of float32
    arithmetic [steps, vocab]; theirs: those of transformers in the engine's type."""

    ids: Tensor
    logprobs: Tensor
    truth: Tensor
    theirs: Tensor


class Judge:
    """transformers' model of a family on the device of the engine that it judges."""

    def __init__(self, family: str, device: str, dtype: torch.dtype) -> None:
        self.kind = FAMILIES[family]
        self.device, self.dtype = device, dtype

    def check(self, engine: Engine, talks: dict[str, Messages], outputs: Sequence[RequestOutput]) -> str:
        """The engine says what the judge would. Returns how often, in words."""
        answers = self._read(engine, talks, outputs)
        return self._check_float32(answers) if self.dtype is torch.float32 else self._check_bfloat16(answers)

    def _check_float32(self, answers: Answers) -> str:
        at = answers.ids[:, None]
        behind = answers.truth.amax(-1) - answers.truth.gather(1, at)[:, 0]
        assert behind.max() <= TIE, f"{answers.ids.tolist()}, but the judge says {answers.truth.argmax(-1).tolist()}"
        far = (answers.logprobs - answers.truth.gather(1, at)[:, 0]).abs().max()
        assert far < FAR, f"a log-probability is {far:.4f} from the judge's"
        return "all"

    def _check_bfloat16(self, answers: Answers) -> str:
        """Where float32 is sure, 19 of 20 ids are its; and the engine is no farther from float32 than transformers is."""
        leader, second = answers.truth.topk(2).values.unbind(-1)
        clear = leader - second > CLEAR
        right = answers.ids == answers.truth.argmax(-1)
        share = right[clear].float().mean()
        assert share >= 0.95, f"{share:.1%} of {int(clear.sum())} clear steps"
        at = answers.ids[:, None]
        truth = answers.truth.gather(1, at)[:, 0]
        ours, theirs = (
            (answers.logprobs - truth).abs().mean(),
            (answers.theirs.gather(1, at)[:, 0] - truth).abs().mean(),
        )
        assert ours < 1.5 * theirs, f"log-probabilities are off by {ours:.4f}, those of transformers by {theirs:.4f}"
        same = (answers.ids == answers.theirs.argmax(-1)).float().mean()
        return (
            f"{same:.1%} of {len(right)} ids are those of transformers in bfloat16, {right.float().mean():.1%} those of "
            f"float32, {share:.1%} at the {int(clear.sum())} clear steps; mean error {ours:.3f}, transformers' {theirs:.3f}"
        )

    def _read(self, engine: Engine, talks: dict[str, Messages], outputs: Sequence[RequestOutput]) -> Answers:
        parts: list[Answers] = []
        for messages, output in zip(talks.values(), outputs, strict=True):
            (choice,) = output.outputs
            assert choice.logprobs is not None
            assert len(choice.token_ids) == len(choice.logprobs) >= NEW_TOKENS
            given = torch.tensor([entry.logprob for entry in choice.logprobs])
            truth = self._logprobs(engine, messages, choice.token_ids, torch.float32)
            same = self.dtype is torch.float32
            theirs = truth if same else self._logprobs(engine, messages, choice.token_ids, self.dtype)
            parts.append(Answers(torch.tensor(choice.token_ids), given, truth, theirs))
        return Answers(*map(torch.cat, zip(*parts, strict=True)))

    def _logprobs(self, engine: Engine, messages: Messages, answer: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What the judge gives at each step of the answer, float32 [steps, vocab]; nothing to placeholders."""
        prompt = engine._run(engine.pipeline.chat(messages))
        ids = prompt.input_ids.tolist()
        if self.kind.judge is not None:
            ids = [tiny_llava.IMAGE if i == tiny_llava.ORIGINAL_IMAGE else i for i in ids]
        model_dir = (self.kind.judge or self.kind.make)()
        logprobs = self.kind.logprobs(model_dir, [*ids, *answer[:-1]], pictures_of(messages), self.device, dtype)
        steps = logprobs[len(ids) - 1 :].cpu()
        steps[:, list(self.kind.placeholders)] = -torch.inf
        return steps
