"""transformers' `generate` on a Qwen2-VL checkpoint: what `compare` measures sightline against.

As a careful user would call it: weights in memory, sdpa attention, K/V cache, inference mode, PIL image processor (the
only one that a CPU machine without torchvision has), and pictures that begin as encoded bytes, as they do for a server.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image


class Question(NamedTuple):
    """One picture (encoded bytes) and what is asked about it. schema: JSON schema of the answer; transformers has none."""

    picture: bytes
    text: str
    schema: str | None = None


class Answer(NamedTuple):
    """Generated token ids; seconds from the call to the first token (None: not measured) and to the end."""

    token_ids: list[int]
    first: float | None
    total: float


class PeerMissingError(Exception):
    """transformers is not installed."""


class TransformersPeer:
    """Loads the checkpoint once; `answer` and `answer_batch` generate exactly `num_tokens` tokens, greedily."""

    def __init__(self, model_dir: Path, *, num_threads: int, dtype: str = "float32") -> None:
        try:
            import transformers
            from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as pil_backend
        except ImportError as error:
            raise PeerMissingError(
                f"The comparison needs transformers ({error}): pip install 'sightline[test]'"
            ) from None
        import torch

        torch.set_num_threads(num_threads)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self._torch = torch
        self._streamer_base = transformers.generation.BaseStreamer
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir, padding_side="left")
        self._images = pil_backend.Qwen2VLImageProcessorPil.from_pretrained(model_dir)
        self._model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
            model_dir, dtype=getattr(torch, dtype)
        ).eval()
        # Every answer has the same length on both sides: the end-of-sequence token is a token like any other.
        self._model.generation_config.eos_token_id = None
        self._image_token = self._tokenizer.convert_ids_to_tokens(self._model.config.image_token_id)

    def answer(self, question: Question, num_tokens: int) -> Answer:
        """One request alone, with the time of its first token."""
        began = time.perf_counter()
        clock = _first_token_clock(self._streamer_base)
        tokens = self._generate([question], num_tokens, clock)[0]
        ended = time.perf_counter()
        return Answer(tokens, clock.first - began, ended - began)

    def answer_batch(self, questions: Sequence[Question], num_tokens: int) -> list[Answer]:
        """All in one padded batch, which a server can do only when all arrive at once and want equally many tokens."""
        began = time.perf_counter()
        tokens = self._generate(questions, num_tokens, None)
        total = time.perf_counter() - began
        return [Answer(ids, None, total) for ids in tokens]

    def _generate(self, questions: Sequence[Question], num_tokens: int, streamer: Any) -> list[list[int]]:
        inputs = self._inputs(questions)
        with self._torch.inference_mode():
            output = self._model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=num_tokens,
                streamer=streamer,
            )
        answers: list[list[int]] = output[:, inputs["input_ids"].shape[1] :].tolist()
        return answers

    def _inputs(self, questions: Sequence[Question]) -> dict[str, Any]:
        pictures = [Image.open(io.BytesIO(q.picture)).convert("RGB") for q in questions]
        vision = self._images(pictures, return_tensors="pt")
        merge = self._images.merge_size**2
        prompts = []
        for question, grid in zip(questions, vision["image_grid_thw"], strict=True):
            content = [{"type": "image"}, {"type": "text", "text": question.text}]
            prompt = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            prompts.append(prompt.replace(self._image_token, self._image_token * (int(grid.prod()) // merge)))
        text = self._tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        is_image = text["input_ids"] == self._model.config.image_token_id
        return {
            "input_ids": text["input_ids"],
            "attention_mask": text["attention_mask"],
            "mm_token_type_ids": is_image.int(),
            "pixel_values": vision["pixel_values"],
            "image_grid_thw": vision["image_grid_thw"],
        }


def _first_token_clock(base: Any) -> Any:
    """A streamer that notes when the first generated token comes; `generate` hands it the prompt before."""

    class Clock(base):
        calls = 0
        first = 0.0

        def put(self, value: Any) -> None:
            self.calls += 1
            if self.calls == 2:
                self.first = time.perf_counter()

        def end(self) -> None:
            pass

    return Clock()
