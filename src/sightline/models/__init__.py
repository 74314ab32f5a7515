"""One file per model family: a config dataclass, modules named like the checkpoint, and the contract below.

A model class `M(nn.Module)` named in `registry.py` provides:

    config_class                             frozen dataclass with `from_hf(config, preprocessor) -> config`, from the contents
                                             of config.json and preprocessor_config.json; strict: a missing or unsupported
                                             key that matters raises `CheckpointError` naming the key. It has the decoder's
                                             vocab_size, hidden_size, intermediate_size, num_attention_heads and
                                             max_position_embeddings
                                             and group_sizes, over how many ranks it can be split
    M(config, group)                         builds on the current default device and dtype, no weights yet; what this rank of
                                             the group holds, by default all. Every rank calls the methods below alike
    map_name(name) -> str | None             checkpoint tensor name (any released layout) -> name of its slot, None to skip;
                                             slots are parameters, but merged parameters (qkv_proj, gate_up_proj) have one
                                             for each tensor that the checkpoint holds, see `layers.parameter`
    uses_mrope: bool                         whether `forward` wants positions [3, T] (multimodal rotary) or [T]
    kv_spec -> KVSpec                        what the engine allocates per token, for this rank's heads
    encoding(pixels, grids) -> Encoding      pixels: list of uint8 [H, W, 3] on the device; grids: list of (t, h, w); the work
                                             in parts, which returns one [num_tokens, hidden] tensor for each picture. Every
                                             rank has the whole vision tower, and calls this for pictures of its own
    static_encoder: bool                     whether `encoding` does nothing on the host but launch, the same for equal shapes
                                             and grids, so that CUDA graphs can repeat it (False if absent)
    embed(input_ids, image_rows, features)   input_ids [T]; image_rows: int64 [N] rows of T that are placeholders (None
                                             without pictures); features: [N, hidden]; asserts the counts; -> [T, hidden]
    forward(hidden, positions, ctx, rows)    hidden [T, hidden]; positions int64 [3, T] for multimodal rotary, [T] else;
                                             -> [T, hidden], normalised, ready for `logits`; with rows (int64 [S], optional)
                                             only these, [S, hidden]: a prompt's last layer need not finish all its tokens
    logits(hidden)                           [S, hidden] -> [S, vocab]

Text-only models lack `encoding`; others get `encode_images`, all of it at once, from `EncodesImages`. A model whose pictures
stand beside the text instead of in it also has

    cross_attention = True                   then `embed` gets no image_rows, and `forward` finds in `ctx.cross` which rows see
                                             which pictures
    kept(rows) -> Tensor                     of a picture's encoding [features, hidden], what the vision cache keeps: [layers, 2,
                                             features, num_kv_heads, head_dim], keys and values of this rank's heads
    num_features(grid) -> int                features of a picture
    feature_width: int                       numbers kept for each of them: 2 * layers * num_kv_heads * head_dim

No model knows pages, requests or processes.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

_Result = TypeVar("_Result")
# Each `next` launches a part, such as one layer, and gives the floating-point operations in it; so a large picture can give way
# to decoding. The value that it returns is the result.
Encoding = Generator[float, None, _Result]


class KVSpec(NamedTuple):
    """Shape of the K/V cache for one token."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


def drain(encoding: Encoding[_Result]) -> _Result:
    """All parts, one after the other."""
    while True:
        try:
            next(encoding)
        except StopIteration as end:
            result: _Result = end.value
            return result


class EncodesImages:
    """What a model with `encoding` gets for those who want it whole."""

    def encoding(self, pixels: Sequence[Tensor], grids: Sequence[tuple[int, int, int]]) -> Encoding[list[Tensor]]:
        """See the contract above."""
        raise NotImplementedError

    def kept(self, rows: Tensor) -> Tensor:
        """See the contract above."""
        return rows

    def encode_images(self, pixels: Sequence[Tensor], grids: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        """Features of each picture."""
        return [self.kept(rows) for rows in drain(self.encoding(pixels, grids))]
