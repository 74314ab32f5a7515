"""transformers as the judge of the LLaVA family and of plain decoders: log-probabilities, pixels, token counts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tests import oracle, tiny_llava


@functools.lru_cache(maxsize=16)
def load(model_dir: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model of a folder in its own layout."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if (model_dir / "preprocessor_config.json").exists() else AutoModelForCausalLM
    model = kind.from_pretrained(model_dir, dtype=dtype, attn_implementation="eager").eval().to(device)
    model.generation_config.eos_token_id = None
    return model


@functools.lru_cache(maxsize=16)
def image_processor(model_dir: Path) -> Any:
    """The PIL image processor."""
    import transformers

    kind = load_kind(model_dir)
    return getattr(transformers, f"{kind}ImageProcessorPil").from_pretrained(model_dir)


def load_kind(model_dir: Path) -> str:
    """Llava, LlavaNext or LlavaOnevision."""
    import json

    config = json.loads((model_dir / "config.json").read_text())
    return str(config["architectures"][0]).removesuffix("ForConditionalGeneration")


def preprocess(model_dir: Path, pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """What transformers feeds its model for the pictures of one prompt: OneVision gets them as one conversation's."""
    images: Any = [list(pictures)] if load_kind(model_dir) == "LlavaOnevision" else list(pictures)
    return dict(image_processor(model_dir)(images=images, return_tensors="pt"))


def num_tokens(model_dir: Path, height: int, width: int) -> int:
    """transformers' own count for a picture in its tiles."""
    import transformers

    kind = load_kind(model_dir)
    tile = tiny_llava.SIGLIP_SIZE if kind == "LlavaOnevision" else tiny_llava.CLIP_SIZE
    stub = object.__new__(getattr(transformers, f"{kind}Processor"))
    stub.image_processor = image_processor(model_dir)
    stub.patch_size = tiny_llava.PATCH
    stub.num_additional_image_tokens = 1
    stub.vision_feature_select_strategy = "default"
    if kind == "LlavaOnevision":
        stub.num_image_tokens, stub.vision_aspect_ratio = 16, "anyres_max_9"
        stub.vision_feature_select_strategy = "full"
        return int(stub._get_number_of_features(height, width, tile, tile))
    return int(stub._get_number_of_features(height, width, tile, tile)) - 1


@torch.no_grad()
def logprobs(
    model_dir: Path,
    input_ids: Sequence[int],
    pictures: Sequence[Image.Image] = (),
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """input_ids with expanded placeholders [L] -> natural-log probabilities of the next token, float32 [L, vocab]."""
    inputs = {"input_ids": torch.tensor([list(input_ids)]), **(preprocess(model_dir, pictures) if pictures else {})}
    logits = load(model_dir, device, dtype)(**oracle.to(device, inputs)).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)


def greedy(model_dir: Path, input_ids: Sequence[int], pictures: Sequence[Image.Image], count: int) -> list[int]:
    """New tokens of transformers' `generate`; end-of-sequence ids do not stop it."""
    inputs = preprocess(model_dir, pictures) if pictures else {}
    ids = torch.tensor([list(input_ids)])
    with torch.no_grad():
        out = load(model_dir).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=count,
            **inputs,
        )
    return [int(token) for token in out[0, len(input_ids) :]]
