"""The Qwen2 decoder (arXiv:2407.10671): pre-norm transformer, grouped-query attention with q/k/v biases, SwiGLU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sightline.attention.backend import ForwardContext
from sightline.layers.activation import silu_and_mul
from sightline.layers.attention import DecoderAttention
from sightline.layers.embedding import Embedding
from sightline.layers.linear import Linear, MergedLinear
from sightline.layers.norm import RMSNorm
from sightline.layers.rotary import MultimodalRotaryEmbedding, Rotary, RotaryEmbedding
from sightline.models import KVSpec
from sightline.models.config import Fields


@dataclass(frozen=True)
class Qwen2Config:
    """Field names are config.json's. mrope_section: widths of the time, height and width axes, None for ordinary rotary."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int] | None

    @classmethod
    def from_fields(cls, fields: Fields, defaults: dict[str, Any], rope_theta: float | None = None) -> Qwen2Config:
        """Read the keys of a text config.

        defaults: values of keys that the writer omits when they equal its class's defaults (nested layouts only).
        rope_theta: the value for files that name none.
        """
        hidden_size = fields.positive("hidden_size", default=defaults.get("hidden_size"))
        num_heads = fields.positive("num_attention_heads", default=defaults.get("num_attention_heads"))
        num_kv_heads = fields.positive("num_key_value_heads", default=defaults.get("num_key_value_heads"))
        if hidden_size % num_heads:
            raise fields.error("hidden_size", f"is {hidden_size}, which {num_heads} attention heads do not divide")
        if num_heads % num_kv_heads:
            raise fields.error("num_key_value_heads", f"is {num_kv_heads}, which does not divide {num_heads} heads")
        fields.one_of(str, "hidden_act", allowed=["silu"], default="silu")
        fields.one_of(bool, "use_sliding_window", allowed=[False], default=False)
        theta, sections = _rope(fields, hidden_size // num_heads, rope_theta)
        return cls(
            vocab_size=fields.positive("vocab_size", default=defaults.get("vocab_size")),
            hidden_size=hidden_size,
            intermediate_size=fields.positive("intermediate_size", default=defaults.get("intermediate_size")),
            num_hidden_layers=fields.positive("num_hidden_layers", default=defaults.get("num_hidden_layers")),
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=hidden_size // num_heads,
            max_position_embeddings=fields.positive(
                "max_position_embeddings", default=defaults.get("max_position_embeddings")
            ),
            rms_norm_eps=_eps(fields, defaults),
            rope_theta=theta,
            mrope_section=sections,
        )


def _eps(fields: Fields, defaults: dict[str, Any]) -> float:
    if "rms_norm_eps" in defaults:
        return fields.get(float, "rms_norm_eps", default=defaults["rms_norm_eps"])
    return fields.get(float, "rms_norm_eps")


def _rope(fields: Fields, head_dim: int, theta: float | None) -> tuple[float, tuple[int, int, int] | None]:
    """(rope_theta, mrope_section), from `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta` (2024)."""
    rope = fields.section("rope_parameters", optional=True) or fields.section("rope_scaling", optional=True)
    if rope is None:
        return fields.get(float, "rope_theta") if theta is None else fields.get(
            float, "rope_theta", default=theta
        ), None
    kind = rope.one_of(str, "rope_type", "type", allowed=["default", "mrope"], default="default")
    if "rope_theta" in rope.values:
        theta = rope.get(float, "rope_theta")
    else:
        theta = fields.get(float, "rope_theta") if theta is None else fields.get(float, "rope_theta", default=theta)
    sections = rope.get(list, "mrope_section", default=None)
    if sections is None:
        if kind == "mrope":
            raise rope.error("mrope_section", "is missing")
        return theta, None
    if len(sections) != 3 or not all(isinstance(s, int) and s >= 0 for s in sections) or sum(sections) * 2 != head_dim:
        raise rope.error("mrope_section", f"is {sections!r}, where three widths of sum {head_dim // 2} are expected")
    return theta, (sections[0], sections[1], sections[2])


class Qwen2MLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        width = config.intermediate_size
        self.gate_up_proj = MergedLinear(config.hidden_size, {"gate_proj": width, "up_proj": width})
        self.down_proj = Linear(width, config.hidden_size)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x [T, hidden] (normalised), residual [T, hidden] -> residual + mlp(x)."""
        return self.down_proj.add_to(residual, silu_and_mul(self.gate_up_proj(x)))


class Qwen2DecoderLayer(nn.Module):
    """One layer; `layer` is its index in the K/V cache."""

    def __init__(self, config: Qwen2Config, layer: int) -> None:
        super().__init__()
        self.self_attn = DecoderAttention(
            layer,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            qkv_bias=True,
        )
        self.mlp = Qwen2MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, rotary: Rotary, ctx: ForwardContext, rows: Tensor | None = None) -> Tensor:
        """hidden [T, hidden] -> [T, hidden], or [S, hidden] of `rows` alone."""
        hidden = self.self_attn(self.input_layernorm(hidden), hidden, rotary, ctx, rows)
        return self.mlp(self.post_attention_layernorm(hidden), hidden)


class Qwen2Model(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Qwen2DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary: nn.Module
        if config.mrope_section is None:
            self.rotary = RotaryEmbedding(config.head_dim, config.rope_theta)
        else:
            self.rotary = MultimodalRotaryEmbedding(config.head_dim, config.rope_theta, config.mrope_section)

    @property
    def kv_spec(self) -> KVSpec:
        """What the cache holds for each token."""
        return KVSpec(self.config.num_hidden_layers, self.config.num_key_value_heads, self.config.head_dim)

    def forward(self, hidden: Tensor, positions: Tensor, ctx: ForwardContext, rows: Tensor | None = None) -> Tensor:
        """hidden [T, hidden]; positions int64 [T], or [3, T] with `mrope_section` -> [T, hidden], normalised.

        rows: int64 [S], rows whose output is wanted; the last layer then spends nothing more on the others. -> [S, hidden]
        """
        rotary = self.rotary(positions)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            hidden = layer(hidden, rotary, ctx, rows if i == last else None)
        return self.norm(hidden)
