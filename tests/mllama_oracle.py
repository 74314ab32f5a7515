"""transformers as the judge of Llama 3.2 Vision, patched to Meta's semantics (`llama-models`, multimodal model).

transformers 5.23 differs from Meta's code, from which the released weights come, in three places. The patch undoes them:

1. The vision tower's intermediate states are the inputs of the layers `intermediate_layers_indices`; transformers since 4.56
   takes their outputs, one layer too late.
2. A text token that sees no picture (everything before the first) passes a cross-attention layer unchanged: Meta zeroes the
   attention's and the MLP's contribution. transformers zeroes the MLP's alone, and lets such tokens attend to every tile.
3. Which token sees which tiles follows from the prompt; transformers' own processor makes that mask, and it is used as is.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from tests import oracle


@functools.lru_cache(maxsize=8)
def load(model_dir: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """The patched model."""
    from transformers import MllamaForConditionalGeneration

    model = MllamaForConditionalGeneration.from_pretrained(model_dir, dtype=dtype, attn_implementation="eager")
    model = model.eval().to(device)
    for encoder in (model.model.vision_model.transformer, model.model.vision_model.global_transformer):
        encoder.forward = types.MethodType(_states_before_layers, encoder)
    for layer in model.model.language_model.layers:
        if isinstance(layer, MllamaCrossAttentionDecoderLayer):
            layer.forward = types.MethodType(_both_branches_masked, layer)
    return model


def _states_before_layers(self: Any, hidden_states: torch.Tensor, attention_mask: Any = None) -> BaseModelOutput:
    states = []
    for layer in self.layers:
        states.append(hidden_states)
        hidden_states = layer(hidden_states=hidden_states, attention_mask=attention_mask)
    return BaseModelOutput(last_hidden_state=hidden_states, hidden_states=tuple(states))


def _both_branches_masked(
    self: Any,
    hidden_states: torch.Tensor,
    cross_attention_states: Any,
    cross_attention_mask: Any,
    attention_mask: Any,
    full_text_row_masked_out_mask: torch.Tensor,
    **kwargs: Any,
) -> torch.Tensor:
    rows = full_text_row_masked_out_mask[:, 0]
    attention, _ = self.cross_attn(
        hidden_states=self.input_layernorm(hidden_states),
        attention_mask=cross_attention_mask,
        cross_attention_states=cross_attention_states,
    )
    hidden_states = hidden_states + self.cross_attn_attn_gate.tanh() * attention * rows
    mlp = self.mlp(self.post_attention_layernorm(hidden_states))
    return hidden_states + self.cross_attn_mlp_gate.tanh() * mlp * rows


@functools.lru_cache(maxsize=8)
def image_processor(model_dir: Path) -> Any:
    from transformers import MllamaImageProcessorPil

    return MllamaImageProcessorPil.from_pretrained(model_dir)


def preprocess(model_dir: Path, pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """pixel_values [1, images, 4, 3, S, S], aspect_ratio_ids, aspect_ratio_mask, num_tiles."""
    return dict(image_processor(model_dir)(images=[list(pictures)], return_tensors="pt"))


@torch.no_grad()
def vision_states(model_dir: Path, picture: Image.Image) -> torch.Tensor:
    """The tower's output for a picture's own tokens, float32 [tiles * tokens, output]."""
    batch = preprocess(model_dir, [picture])
    num_tiles = batch.pop("num_tiles")[0][0]
    states = load(model_dir).model.vision_model(**batch).last_hidden_state
    return states[0, 0, :num_tiles].flatten(0, 1)


@torch.no_grad()
def logprobs(
    model_dir: Path,
    input_ids: Sequence[int],
    pictures: Sequence[Image.Image] = (),
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Natural-log probabilities of the next token, float32 [L, vocab]."""
    model = load(model_dir, device, dtype)
    inputs: dict[str, Any] = {"input_ids": torch.tensor([list(input_ids)])}
    if pictures:
        batch = preprocess(model_dir, pictures)
        num_tiles = batch.pop("num_tiles")
        ranges = get_cross_attention_token_mask(list(input_ids), model.config.image_token_index)
        mask = convert_sparse_cross_attention_mask_to_dense(
            [ranges], num_tiles, max_num_tiles=model.config.vision_config.max_num_tiles, length=len(input_ids)
        )
        inputs |= {**batch, "cross_attention_mask": torch.tensor(mask)}
    return torch.log_softmax(model(**oracle.to(device, inputs), use_cache=False).logits[0].float(), dim=-1)


def greedy(
    model_dir: Path, input_ids: Sequence[int], pictures: Sequence[Image.Image] = (), max_new_tokens: int = 12
) -> list[int]:
    """New tokens of greedy decoding, without a cache; end-of-sequence ids do not stop it."""
    ids = list(input_ids)
    for _ in range(max_new_tokens):
        ids.append(int(logprobs(model_dir, ids, pictures)[-1].argmax()))
    return ids[len(input_ids) :]


def tiles(model_dir: Path, picture: Image.Image) -> tuple[np.ndarray, tuple[int, int, int]]:
    """uint8 [t, S, S, 3] and (aspect ratio id, rows, columns), from transformers' processor before it makes floats."""
    batch = image_processor(model_dir)(
        images=picture.convert("RGB"), return_tensors="np", do_rescale=False, do_normalize=False
    )
    ratio = int(batch["aspect_ratio_ids"][0, 0])
    rows, columns = load(model_dir).config.vision_config.supported_aspect_ratios[ratio - 1]
    pixels = batch["pixel_values"][0, 0, : rows * columns].transpose(0, 2, 3, 1)
    return np.ascontiguousarray(pixels.astype(np.uint8)), (ratio, rows, columns)
