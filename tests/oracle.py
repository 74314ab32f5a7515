"""transformers as the judge: log-probabilities, pixels and positions from its own Qwen2-VL and 2.5, in float32 on the CPU."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image


class Pictures(NamedTuple):
    """pixel_values: float32 [sum of h * w, patch]; grids: int64 [N, 3] of (1, h, w) in patches."""

    pixel_values: torch.Tensor
    grids: torch.Tensor


@functools.lru_cache(maxsize=8)
def load(model_dir: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model of the folder, in this type whatever the checkpoint holds."""
    import transformers

    (name,) = json.loads((model_dir / "config.json").read_text())["architectures"]
    model_class = getattr(transformers, name)
    return model_class.from_pretrained(model_dir, dtype=dtype, attn_implementation="eager").eval().to(device)


def to(device: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """The tensors among the inputs of a model, on the device."""
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}


@functools.lru_cache(maxsize=8)
def image_processor(model_dir: Path) -> Any:
    """The PIL image processor: torch's resize gives slightly other pixels."""
    from transformers import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil.from_pretrained(model_dir)


def preprocess(model_dir: Path, pictures: Sequence[Image.Image]) -> Pictures:
    """What transformers feeds its vision tower."""
    batch = image_processor(model_dir)(images=list(pictures), return_tensors="pt")
    return Pictures(batch["pixel_values"], batch["image_grid_thw"])


def resized(model_dir: Path, picture: Image.Image) -> np.ndarray:
    """Its uint8 pixels [H, W, 3] after resizing, before they become floats."""
    from transformers.image_utils import SizeDict

    processor = image_processor(model_dir)
    pixels = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
    size = SizeDict(**processor.size) if isinstance(processor.size, dict) else processor.size
    factor = processor.patch_size * processor.merge_size
    out = processor.resize(pixels, size, resample=processor.resample, factor=factor)
    return np.ascontiguousarray(np.asarray(out).astype(np.uint8).transpose(1, 2, 0))


def num_tokens(model_dir: Path, pictures: Sequence[Image.Image]) -> list[int]:
    """Placeholders of each picture."""
    return [int(grid.prod()) // 4 for grid in preprocess(model_dir, pictures).grids] if pictures else []


def expand(model_dir: Path, input_ids: Sequence[int], pictures: Sequence[Image.Image]) -> list[int]:
    """Replace the i-th placeholder id by as many as picture i fills."""
    image_token_id = load(model_dir).config.image_token_id
    counts = iter(num_tokens(model_dir, pictures))
    ids: list[int] = []
    for token in input_ids:
        ids += [token] * next(counts) if token == image_token_id else [token]
    assert next(counts, None) is None, "more pictures than placeholders"
    return ids


def _inputs(model_dir: Path, input_ids: Sequence[int], pictures: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([list(input_ids)])
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == load(model_dir).config.image_token_id).int()}
    if pictures:
        batch = preprocess(model_dir, pictures)
        inputs |= {"pixel_values": batch.pixel_values, "image_grid_thw": batch.grids}
    return inputs


@torch.no_grad()
def transformers_logprobs(
    model_dir: Path,
    input_ids: Sequence[int],
    pictures: Sequence[Image.Image] = (),
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """input_ids with expanded placeholders [L] -> natural-log probabilities of the next token, float32 [L, vocab]."""
    logits = load(model_dir, device, dtype)(**to(device, _inputs(model_dir, input_ids, pictures))).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)


def transformers_greedy(
    model_dir: Path, input_ids: Sequence[int], pictures: Sequence[Image.Image] = (), max_new_tokens: int = 16
) -> list[int]:
    """New tokens of greedy decoding, without a cache; end-of-sequence ids do not stop it."""
    ids = list(input_ids)
    for _ in range(max_new_tokens):
        ids.append(int(transformers_logprobs(model_dir, ids, pictures)[-1].argmax()))
    return ids[len(input_ids) :]


@torch.no_grad()
def positions(
    model_dir: Path, input_ids: Sequence[int], pictures: Sequence[Image.Image] = ()
) -> tuple[np.ndarray, int]:
    """(rotary positions int64 [3, L], delta): token i >= L stands at i + delta."""
    inputs = _inputs(model_dir, input_ids, pictures)
    ids, delta = load(model_dir).model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], inputs.get("image_grid_thw")
    )
    return ids[:, 0].numpy(), int(delta.item())


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with smooth parts and sharp edges, different for each seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(coarse).copy()
    x0, x1 = sorted(rng.integers(0, width + 1, 2))
    y0, y1 = sorted(rng.integers(0, height + 1, 2))
    pixels[y0:y1, x0:x1] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels)
