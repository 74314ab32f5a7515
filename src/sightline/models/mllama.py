"""Llama 3.2 Vision (arXiv:2407.21783, section 7): the Llama 3 decoder, with layers that look at pictures in between.

Pictures do not stand in the text: cross-attention layers read keys and values made of them, which are what `encode_images`
returns and the vision cache keeps, for the pictures' own tiles only. They never grow, and depend on nothing but the picture.

Semantics are Meta's (`llama-models`): a picture is seen from its placeholder up to the next one that does not adjoin it, and
a text token that sees none passes these layers unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sightline.attention.backend import ForwardContext
from sightline.layers.activation import silu_and_mul
from sightline.layers.attention import DecoderAttention
from sightline.layers.embedding import Embedding
from sightline.layers.linear import Linear, MergedLinear
from sightline.layers.norm import RMSNorm
from sightline.layers.rotary import Rotary, RotaryEmbedding
from sightline.models import KVSpec
from sightline.models.config import Fields, refuse_quantization
from sightline.models.mllama_vision import Grid, MllamaVisionConfig, VisionTower, gate

# Rows of the embedding beyond the vocabulary: the picture's placeholder is the first of them, and is never generated.
_EXTRA_ROWS = 8


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretch of the rotary frequencies ("rope_type": "llama3"; `llama-models`, `apply_scaling`).

    Wavelengths above original / low_freq_factor are stretched by `factor`, those below original / high_freq_factor stay, and
    between the two it is interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original: int

    def apply(self, frequencies: Tensor) -> Tensor:
        """float32 [head_dim // 2] -> the same shape."""
        turns = self.original * frequencies / (2 * math.pi)
        share = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        share = share.clamp(0.0, 1.0)
        return frequencies * (share + (1.0 - share) / self.factor)


@dataclass(frozen=True)
class MllamaTextConfig:
    """`text_config` of config.json. cross_attention_layers: indices of the layers that look at pictures and nothing else."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    cross_attention_layers: tuple[int, ...]

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_fields(cls, fields: Fields) -> MllamaTextConfig:
        """Defaults are those of transformers' MllamaTextConfig, which published files may omit."""
        num_layers = fields.positive("num_hidden_layers", default=40)
        hidden_size = fields.positive("hidden_size", default=4096)
        num_heads = fields.positive("num_attention_heads", default=32)
        num_kv_heads = fields.positive("num_key_value_heads", default=8)
        if hidden_size % num_heads:
            raise fields.error("hidden_size", f"is {hidden_size}, which {num_heads} attention heads do not divide")
        if num_heads % num_kv_heads:
            raise fields.error("num_key_value_heads", f"is {num_kv_heads}, which does not divide {num_heads} heads")
        fields.one_of(str, "hidden_act", allowed=["silu"], default="silu")
        # the embedding has more rows than the head
        fields.one_of(bool, "tie_word_embeddings", allowed=[False], default=False)
        layers = fields.get(list, "cross_attention_layers", default=[3, 8, 13, 18, 23, 28, 33, 38])
        if not layers or not all(isinstance(i, int) and 0 <= i < num_layers for i in layers):
            raise fields.error(
                "cross_attention_layers", f"is {layers!r}, where indices of {num_layers} layers are expected"
            )
        theta, scaling = _rope(fields)
        return cls(
            vocab_size=fields.positive("vocab_size", default=128256),
            hidden_size=hidden_size,
            intermediate_size=fields.positive("intermediate_size", default=14336),
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            max_position_embeddings=fields.positive("max_position_embeddings", default=131072),
            rms_norm_eps=fields.get(float, "rms_norm_eps", default=1e-5),
            rope_theta=theta,
            rope_scaling=scaling,
            cross_attention_layers=tuple(sorted(set(layers))),
        )


def _rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """From `rope_parameters` (transformers 5), or `rope_scaling` and `rope_theta` (2024)."""
    rope = fields.section("rope_parameters", optional=True) or fields.section("rope_scaling", optional=True)
    theta = fields.get(float, "rope_theta", default=500000.0)
    if rope is None:
        return theta, None
    theta = rope.get(float, "rope_theta", default=theta)
    if rope.one_of(str, "rope_type", "type", allowed=["default", "llama3"]) == "default":
        return theta, None
    return theta, RopeScaling(
        factor=rope.get(float, "factor"),
        low_freq_factor=rope.get(float, "low_freq_factor"),
        high_freq_factor=rope.get(float, "high_freq_factor"),
        original=rope.positive("original_max_position_embeddings"),
    )


@dataclass(frozen=True)
class MllamaConfig:
    """Both halves."""

    text: MllamaTextConfig
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
        text = MllamaTextConfig.from_fields(text_fields)
        image_token_id = top.get(int, "image_token_index", "image_token_id", default=text.vocab_size)
        if not 0 <= image_token_id < text.vocab_size + _EXTRA_ROWS:
            raise top.error("image_token_index", f"is {image_token_id}, which the embedding does not have")
        return cls(
            text=text,
            vision=MllamaVisionConfig.from_fields(vision_fields, Fields(preprocessor, "preprocessor_config.json")),
            image_token_id=image_token_id,
        )

    @property
    def vocab_size(self) -> int:
        """Rows of the output head."""
        return self.text.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the decoder."""
        return self.text.hidden_size

    @property
    def intermediate_size(self) -> int:
        """Width of the decoder's MLP."""
        return self.text.intermediate_size

    @property
    def max_position_embeddings(self) -> int:
        """Longest context of the release."""
        return self.text.max_position_embeddings


class TextMLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: MllamaTextConfig) -> None:
        super().__init__()
        width = config.intermediate_size
        self.gate_up_proj = MergedLinear(config.hidden_size, {"gate_proj": width, "up_proj": width})
        self.down_proj = Linear(width, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        return self.down_proj(silu_and_mul(self.gate_up_proj(x)))


class SelfAttentionLayer(nn.Module):
    """A layer of Llama 3. `layer` is its index in the K/V cache."""

    def __init__(self, config: MllamaTextConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = DecoderAttention(
            layer,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            qkv_bias=False,
        )
        self.mlp = TextMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, rotary: Rotary, ctx: ForwardContext) -> Tensor:
        """hidden [T, hidden] -> [T, hidden]."""
        hidden = self.self_attn(self.input_layernorm(hidden), hidden, rotary, ctx)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class CrossAttention(nn.Module):
    """From text to pictures, with normalised queries and keys and no positions. `layer` counts cross-attention layers."""

    def __init__(self, config: MllamaTextConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.num_kv_heads = config.num_key_value_heads
        kv_width = self.num_kv_heads * self.head_dim
        self.q_proj = Linear(config.hidden_size, config.num_attention_heads * self.head_dim)
        self.kv_proj = MergedLinear(config.hidden_size, {"k_proj": kv_width, "v_proj": kv_width})
        self.o_proj = Linear(config.num_attention_heads * self.head_dim, config.hidden_size)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def encode(self, states: Tensor, out: Tensor) -> None:
        """states [N, hidden] of a picture -> its keys and values, into out [2, N, num_kv_heads, head_dim]."""
        k, v = self.kv_proj(states).view(-1, 2, self.num_kv_heads, self.head_dim).unbind(1)
        out[0].copy_(self.k_norm(k))
        out[1].copy_(v)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x [R, hidden], rows that see something -> [R, hidden]."""
        assert ctx.cross is not None
        q = self.q_norm(self.q_proj(x).view(x.shape[0], -1, self.head_dim))
        return self.o_proj(ctx.backend.cross_forward(q, self.layer, ctx.cross).flatten(1))


class CrossAttentionLayer(nn.Module):
    """Cross-attention and MLP, each scaled by tanh of a learned gate."""

    def __init__(self, config: MllamaTextConfig, layer: int) -> None:
        super().__init__()
        self.cross_attn = CrossAttention(config, layer)
        self.mlp = TextMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn_attn_gate = gate()
        self.cross_attn_mlp_gate = gate()

    def forward(self, hidden: Tensor, rotary: Rotary, ctx: ForwardContext) -> Tensor:
        """hidden [T, hidden] -> [T, hidden]; rows that see no picture are returned as they came."""
        if ctx.cross is None:
            return hidden
        x = ctx.cross.gather(hidden)
        x = torch.addcmul(x, self.cross_attn(self.input_layernorm(x), ctx), self.cross_attn_attn_gate.tanh())
        mlp = self.mlp(self.post_attention_layernorm(x))
        return ctx.cross.scatter(hidden, torch.addcmul(x, mlp, self.cross_attn_mlp_gate.tanh()))


class MllamaTextModel(nn.Module):
    """Embedding, layers of both kinds, final norm. Only self-attention layers have a place in the K/V cache."""

    def __init__(self, text: MllamaTextConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(text.vocab_size + _EXTRA_ROWS, text.hidden_size)
        self.layers = nn.ModuleList()
        num_self = num_cross = 0
        for i in range(text.num_hidden_layers):
            if i in text.cross_attention_layers:
                self.layers.append(CrossAttentionLayer(text, num_cross))
                num_cross += 1
            else:
                self.layers.append(SelfAttentionLayer(text, num_self))
                num_self += 1
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.rotary = RotaryEmbedding(text.head_dim, text.rope_theta)
        if text.rope_scaling is not None:
            self.rotary.inv_freq = text.rope_scaling.apply(self.rotary.inv_freq)
        self.kv_spec = KVSpec(num_self, text.num_key_value_heads, text.head_dim)
        self.cross_spec = KVSpec(num_cross, text.num_key_value_heads, text.head_dim)

    def encode(self, states: Tensor) -> Tensor:
        """states [N, hidden] of a picture -> [cross layers, 2, N, num_kv_heads, head_dim]."""
        layers, heads, dim = self.cross_spec
        out = states.new_empty(layers, 2, states.shape[0], heads, dim)
        for layer in self.layers:
            if isinstance(layer, CrossAttentionLayer):
                layer.cross_attn.encode(states, out[layer.cross_attn.layer])
        return out

    def forward(self, hidden: Tensor, positions: Tensor, ctx: ForwardContext) -> Tensor:
        """hidden [T, hidden], positions int64 [T] -> [T, hidden], normalised."""
        rotary = self.rotary(positions)
        for layer in self.layers:
            hidden = layer(hidden, rotary, ctx)
        return self.norm(hidden)


class MllamaForConditionalGeneration(nn.Module):
    """See the contract in `sightline.models`."""

    config_class = MllamaConfig
    uses_mrope = False
    cross_attention = True

    def __init__(self, config: MllamaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionTower(config.vision)
        self.multi_modal_projector = Linear(config.vision.output_size, config.hidden_size, bias=True)
        self.model = MllamaTextModel(config.text)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)

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

    def encode_images(self, pixels: Sequence[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        """pixels: uint8 [tiles, S, S, 3] each, on the device; grids: (aspect ratio id, rows, columns). Returns keys and
        values [cross layers, 2, tiles * tokens, num_kv_heads, head_dim] each."""
        return [self.model.encode(self.multi_modal_projector(s)) for s in self.vision_model(pixels, grids)]

    def embed(self, input_ids: Tensor, image_rows: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """input_ids int64 [T] -> [T, hidden]. Placeholders have an embedding of their own: nothing is merged."""
        assert image_rows is None
        assert features is None
        return self.model.embed_tokens(input_ids)

    def forward(self, hidden: Tensor, positions: Tensor, ctx: ForwardContext) -> Tensor:
        """hidden [T, hidden], positions int64 [T] -> [T, hidden], normalised. ctx.cross says what each row sees."""
        return self.model(hidden, positions, ctx)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> float32 [S, vocab]."""
        return self.lm_head(hidden).float()
