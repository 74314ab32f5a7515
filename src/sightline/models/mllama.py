"""Llama 3.2 Vision (arXiv:2407.21783, section 7): the Llama 3 decoder, with layers that look at pictures in between.

Pictures do not stand in the text: cross-attention layers read keys and values made of them, which are what `encode_images`
returns and the vision cache keeps, for the pictures' own tiles only. They never grow, and depend on nothing but the picture.

Semantics are Meta's (`llama-models`): a picture is seen from its placeholder up to the next one that does not adjoin it, and
a text token that sees none passes these layers unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sightline.attention.backend import ForwardContext
from sightline.layers.embedding import OutputHead
from sightline.layers.linear import Linear, MergedLinear, RowLinear
from sightline.layers.norm import RMSNorm
from sightline.layers.normed import normed_swiglu
from sightline.layers.rotary import Rotary
from sightline.models import EncodesImages, Encoding, KVSpec
from sightline.models.config import Fields, refuse_quantization
from sightline.models.decoder import AroundDecoder, Decoder, DecoderConfig, DecoderLayer, DecoderMLP
from sightline.models.mllama_vision import Grid, MllamaVisionConfig, VisionTower, gate
from sightline.parallel import SOLO, Group

# Rows of the embedding beyond the vocabulary: the picture's placeholder is the first of them, and is never generated.
_EXTRA_ROWS = 8


# Published files may omit what equals transformers' MllamaTextConfig.
_TEXT_DEFAULTS = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}
_CROSS_ATTENTION_LAYERS = [3, 8, 13, 18, 23, 28, 33, 38]
_ROPE_THETA = 500000.0


@dataclass(frozen=True)
class MllamaConfig(AroundDecoder):
    """Both halves. cross_attention_layers: indices of the decoder layers that look at pictures and at nothing else."""

    text: DecoderConfig
    cross_attention_layers: tuple[int, ...]
    vision: MllamaVisionConfig
    image_token_id: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> MllamaConfig:
        """config, preprocessor: the contents of config.json and preprocessor_config.json."""
        refuse_quantization(config)
        top = Fields(config)
        text_fields, vision_fields = top.section("text_config"), top.section("vision_config")
        assert text_fields is not None
        assert vision_fields is not None
        text = DecoderConfig.from_fields(text_fields, _TEXT_DEFAULTS, _ROPE_THETA, qkv_bias=False)
        # the embedding has more rows than the head
        text_fields.one_of(bool, "tie_word_embeddings", allowed=[False], default=False)
        layers = text_fields.get(list, "cross_attention_layers", default=_CROSS_ATTENTION_LAYERS)
        if not layers or not all(isinstance(i, int) and 0 <= i < text.num_hidden_layers for i in layers):
            raise text_fields.error(
                "cross_attention_layers",
                f"is {layers!r}, where indices of {text.num_hidden_layers} layers are expected",
            )
        image_token_id = top.get(int, "image_token_index", "image_token_id", default=text.vocab_size)
        if not 0 <= image_token_id < text.vocab_size + _EXTRA_ROWS:
            raise top.error("image_token_index", f"is {image_token_id}, which the embedding does not have")
        return cls(
            text=text,
            cross_attention_layers=tuple(sorted(set(layers))),
            vision=MllamaVisionConfig.from_fields(vision_fields, Fields(preprocessor, "preprocessor_config.json")),
            image_token_id=image_token_id,
        )


class CrossAttention(nn.Module):
    """From text to pictures, with normalised queries and keys and no positions. `layer` counts cross-attention layers."""

    def __init__(self, config: DecoderConfig, layer: int, group: Group = SOLO) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        kv_heads = group.kv_shard(config.num_key_value_heads)
        self.num_kv_heads = kv_heads.width
        queries, keys = group.shard(config.num_attention_heads).times(self.head_dim), kv_heads.times(self.head_dim)
        self.q_proj = MergedLinear(config.hidden_size, {"q_proj": queries})
        self.kv_proj = MergedLinear(config.hidden_size, {"k_proj": keys, "v_proj": keys})
        self.o_proj = RowLinear(queries, config.hidden_size, group=group)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def encode(self, states: Tensor, out: Tensor) -> None:
        """states [N, hidden] of a picture -> its keys and values, into out [2, N, num_kv_heads, head_dim]."""
        k, v = self.kv_proj(states).view(-1, 2, self.num_kv_heads, self.head_dim).unbind(1)
        out[0].copy_(self.k_norm(k))
        out[1].copy_(v)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x [R, hidden], the rows that `ctx.cross` gathers -> [R, hidden]."""
        assert ctx.cross is not None
        q = self.q_norm(self.q_proj(x).view(x.shape[0], -1, self.head_dim))
        return self.o_proj(ctx.backend.cross_forward(q, self.layer, ctx.cross).flatten(1))


class CrossAttentionLayer(nn.Module):
    """Cross-attention and MLP, each scaled by tanh of a learned gate."""

    def __init__(self, config: DecoderConfig, layer: int, group: Group = SOLO) -> None:
        super().__init__()
        self.cross_attn = CrossAttention(config, layer, group)
        self.mlp = DecoderMLP(config, group)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn_attn_gate = gate()
        self.cross_attn_mlp_gate = gate()

    def forward(self, hidden: Tensor, rotary: Rotary, ctx: ForwardContext, rows: Tensor | None = None) -> Tensor:
        """hidden [T, hidden] -> [T, hidden], or [S, hidden] of `rows` alone. Who sees no picture comes back as it came."""
        if ctx.cross is not None:
            x = ctx.cross.gather(hidden)
            attention = self.cross_attn(self.input_layernorm(x), ctx)
            x = torch.addcmul(x, attention, self.cross_attn_attn_gate.tanh())
            inner = normed_swiglu(self.post_attention_layernorm, self.mlp.gate_up_proj, x)
            x = self.mlp.down_proj.add_to(x, inner.mul_(self.cross_attn_mlp_gate.tanh()))
            hidden = ctx.cross.scatter(hidden, x)
        return hidden if rows is None else hidden.index_select(0, rows)


class MllamaDecoder(Decoder):
    """`Decoder` with layers of both kinds. Only those with self-attention have a place in the K/V cache."""

    def __init__(self, config: MllamaConfig, group: Group = SOLO) -> None:
        text = config.text
        # the layers are made below
        super().__init__(replace(text, num_hidden_layers=0, vocab_size=text.vocab_size + _EXTRA_ROWS), group)
        num_self = num_cross = 0
        for i in range(text.num_hidden_layers):
            if i in config.cross_attention_layers:
                self.layers.append(CrossAttentionLayer(text, num_cross, group))
                num_cross += 1
            else:
                self.layers.append(DecoderLayer(text, num_self, group))
                num_self += 1
        self.config = text
        self.num_self, self.num_cross = num_self, num_cross

    @property
    def kv_spec(self) -> KVSpec:
        """What this rank's cache holds for each token: the self-attention layers."""
        return KVSpec(self.num_self, self.num_kv_heads, self.config.head_dim)

    @property
    def cross_spec(self) -> KVSpec:
        """What this rank's vision cache holds for each token of a picture: the cross-attention layers."""
        return KVSpec(self.num_cross, self.num_kv_heads, self.config.head_dim)

    def encode(self, states: Tensor) -> Tensor:
        """states [N, hidden] of a picture -> [cross layers, 2, N, num_kv_heads, head_dim]."""
        layers, heads, dim = self.cross_spec
        out = states.new_empty(layers, 2, states.shape[0], heads, dim)
        for layer in self.layers:
            if isinstance(layer, CrossAttentionLayer):
                layer.cross_attn.encode(states, out[layer.cross_attn.layer])
        return out


class MllamaForConditionalGeneration(EncodesImages, nn.Module):
    """See the contract in `sightline.models`."""

    config_class = MllamaConfig
    uses_mrope = False
    cross_attention = True

    def __init__(self, config: MllamaConfig, group: Group = SOLO) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionTower(config.vision)
        self.multi_modal_projector = Linear(config.vision.output_size, config.hidden_size, bias=True)
        self.model = MllamaDecoder(config, group)
        self.lm_head = OutputHead(config.hidden_size, config.vocab_size, group)

    def map_name(self, name: str) -> str | None:
        """Names of 2024 (`language_model.model.`, `vision_model.`) and of transformers 5 (all below `model.`)."""
        if name.endswith(".rotary_emb.inv_freq"):
            return None
        for prefix, ours in (
            ("language_model.lm_head.", "lm_head."),
            ("language_model.model.", "model."),
            ("model.language_model.", "model."),
            ("model.vision_model.", "vision_model."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
        ):
            if name.startswith(prefix):
                return ours + name.removeprefix(prefix)
        return name

    @property
    def kv_spec(self) -> KVSpec:
        """What the cache holds for each token: the self-attention layers."""
        return self.model.kv_spec

    @property
    def feature_width(self) -> int:
        """Numbers that the vision cache keeps for each feature of a picture: a key and a value for each cross layer."""
        layers, heads, dim = self.model.cross_spec
        return 2 * layers * heads * dim

    def num_features(self, grid: Grid) -> int:
        """Tokens of a picture of (aspect ratio id, rows, columns)."""
        return grid[1] * grid[2] * self.config.vision.tokens_per_tile

    def encoding(self, pixels: Sequence[Tensor], grids: Sequence[Grid]) -> Encoding[list[Tensor]]:
        """pixels: uint8 [tiles, S, S, 3] each, on the device; grids: (aspect ratio id, rows, columns). Returns
        [tiles * tokens, hidden] each."""
        states = yield from self.vision_model(pixels, grids)
        return [self.multi_modal_projector(s) for s in states]

    def kept(self, rows: Tensor) -> Tensor:
        """rows [N, hidden] of a picture -> keys and values [cross layers, 2, N, num_kv_heads, head_dim]."""
        return self.model.encode(rows)

    def embed(self, input_ids: Tensor, image_rows: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """input_ids int64 [T] -> [T, hidden]. Placeholders have an embedding of their own: nothing is merged."""
        assert image_rows is None
        assert features is None
        return self.model.embed_tokens(input_ids)

    def forward(self, hidden: Tensor, positions: Tensor, ctx: ForwardContext, rows: Tensor | None = None) -> Tensor:
        """hidden [T, hidden], positions int64 [T] -> [T, hidden], normalised; with rows int64 [S], those alone. ctx.cross
        says what each row sees."""
        return self.model(hidden, positions, ctx, rows)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> [S, vocab]."""
        return self.lm_head(hidden)
