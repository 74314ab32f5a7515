"""One file per model family: a config dataclass, modules named like the checkpoint, and the contract below.

A model class `M(nn.Module)` named in `registry.py` provides:

    config_class                             frozen dataclass with `from_hf(config: dict) -> config`; strict: a missing or
                                             unsupported key that matters raises `CheckpointError` naming the key
    M(config)                                builds on the current default device and dtype; no weights yet
    M.map_name(name) -> str | None           checkpoint tensor name (any released layout) -> parameter name, None to skip;
                                             fused parameters (qkv_proj, gate_up_proj) are filled by `models.loader`
    uses_mrope: bool                         whether `forward` wants positions [3, T] (multimodal rotary) or [T]
    kv_spec -> KVSpec                        what the engine allocates per token
    encode_images(pixels, grids) -> [Tensor] pixels: list of uint8 [H, W, 3] on the device; grids: list of (t, h, w);
                                             returns one [num_tokens, hidden] tensor for each picture
    embed(input_ids, image_rows, features)   input_ids [T]; image_rows: int64 [N] rows of T that are placeholders (None
                                             without pictures); features: [N, hidden]; asserts the counts; -> [T, hidden]
    forward(hidden, positions, ctx)          hidden [T, hidden]; positions int64 [3, T] for multimodal rotary, [T] else;
                                             -> [T, hidden], normalised, ready for `logits`
    logits(hidden)                           [S, hidden] -> float32 [S, vocab]

Text-only models lack `encode_images`. No model knows pages, requests or processes.
"""

from __future__ import annotations

from typing import NamedTuple


class KVSpec(NamedTuple):
    """Shape of the K/V cache for one token."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
