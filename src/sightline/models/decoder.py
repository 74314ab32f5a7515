"""The decoder that Llama (arXiv:2302.13971), Mistral (arXiv:2310.06825) and Qwen2 (arXiv:2407.10671) share: pre-norm
transformer, grouped-query attention with rotary positions, SwiGLU. What differs between them is configuration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sightline.attention.backend import ForwardContext
from sightline.layers.attention import DecoderAttention
from sightline.layers.embedding import Embedding
from sightline.layers.linear import MergedLinear, RowLinear
from sightline.layers.norm import RMSNorm
from sightline.layers.normed import normed_swiglu
from sightline.layers.rotary import MultimodalRotaryEmbedding, Rotary, RotaryEmbedding
from sightline.models import KVSpec
from sightline.models.config import Fields
from sightline.parallel import SOLO, Group

# What a config that omits these keys means: the defaults of transformers' classes of that `model_type`.
TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
    },
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
    },
}


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretch of the rotary frequencies ("rope_type": "llama3"; `llama-models`, `apply_scaling`).

    Wavelengths above original / low_freq_factor are stretched by `factor`, those below original / high_freq_factor stay, and
    between the two it is interpolated. "rope_type": "linear" stretches all of them.
    """

    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original: int | None = None

    def apply(self, frequencies: Tensor) -> Tensor:
        """float32 [head_dim // 2] -> the same shape."""
        if self.original is None or self.low_freq_factor is None or self.high_freq_factor is None:
            return frequencies / self.factor
        turns = self.original * frequencies / (2 * math.pi)
        share = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        share = share.clamp(0.0, 1.0)
        return frequencies * (share + (1.0 - share) / self.factor)


@dataclass(frozen=True)
class DecoderConfig:
    """Field names are config.json's. mrope_section: widths of the time, height and width axes, None for ordinary rotary.

    max_position_embeddings: at most the sliding window, beyond which Mistral's first release would attend differently.
    """

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
    mrope_section: tuple[int, int, int] | None = None
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    output_bias: bool = False

    @property
    def group_sizes(self) -> list[int]:
        """Over how many ranks it can be split: query heads and the MLP evenly, key heads evenly or with copies."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        return [
            n
            for n in range(1, heads + 1)
            if heads % n == self.intermediate_size % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)
        ]

    @classmethod
    def from_fields(
        cls,
        fields: Fields,
        defaults: dict[str, Any],
        rope_theta: float | None = None,
        qkv_bias: bool | None = None,
    ) -> DecoderConfig:
        """Read the keys of a text config.

        defaults: values of keys that the writer omits when they equal its class's defaults (nested layouts only).
        rope_theta: the value for files that name none. qkv_bias: True for Qwen2, None to go by `attention_bias`.
        """
        hidden_size = fields.positive("hidden_size", default=defaults.get("hidden_size"))
        num_heads = fields.positive("num_attention_heads", default=defaults.get("num_attention_heads"))
        # Llama's first configs have no such key: each query head had its own
        kv_default = defaults.get("num_key_value_heads", num_heads if qkv_bias is None else None)
        num_kv_heads = fields.positive("num_key_value_heads", default=kv_default)
        if hidden_size % num_heads and fields.values.get("head_dim") is None:
            raise fields.error("hidden_size", f"is {hidden_size}, which {num_heads} attention heads do not divide")
        if num_heads % num_kv_heads:
            raise fields.error("num_key_value_heads", f"is {num_kv_heads}, which does not divide {num_heads} heads")
        fields.one_of(str, "hidden_act", allowed=["silu"], default="silu")
        fields.one_of(bool, "mlp_bias", allowed=[False], default=False)
        head_dim = fields.positive("head_dim", default=hidden_size // num_heads)
        theta, sections, scaling = _rope(fields, head_dim, rope_theta)
        bias = fields.get(bool, "attention_bias", default=False)
        return cls(
            vocab_size=fields.positive("vocab_size", default=defaults.get("vocab_size")),
            hidden_size=hidden_size,
            intermediate_size=fields.positive("intermediate_size", default=defaults.get("intermediate_size")),
            num_hidden_layers=fields.positive("num_hidden_layers", default=defaults.get("num_hidden_layers")),
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=_context(fields, defaults, windowed=qkv_bias is not True),
            rms_norm_eps=_eps(fields, defaults),
            rope_theta=theta,
            mrope_section=sections,
            rope_scaling=scaling,
            qkv_bias=bias if qkv_bias is None else qkv_bias,
            output_bias=bias and qkv_bias is None,
        )


class AroundDecoder:
    """Config of a model around a decoder `text`: the sizes that the engine reads are the decoder's."""

    text: DecoderConfig

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
    def group_sizes(self) -> list[int]:
        """Over how many ranks the decoder can be split."""
        return self.text.group_sizes

    @property
    def num_attention_heads(self) -> int:
        """Query heads of the decoder."""
        return self.text.num_attention_heads

    @property
    def max_position_embeddings(self) -> int:
        """Longest context of the release."""
        return self.text.max_position_embeddings


def text_config(fields: Fields, model_type: str, defaults: dict[str, Any] | None = None) -> DecoderConfig:
    """The decoder of a `model_type` ("llama", "mistral" or "qwen2"). defaults: as for `DecoderConfig.from_fields`."""
    return DecoderConfig.from_fields(
        fields,
        TEXT_DEFAULTS[model_type] if defaults is None else defaults,
        rope_theta=10000.0,
        qkv_bias={"qwen2": True, "mistral": False}.get(model_type),
    )


def _context(fields: Fields, defaults: dict[str, Any], windowed: bool) -> int:
    """windowed: whether `sliding_window` counts by itself (Mistral) or needs `use_sliding_window` (Qwen2)."""
    length = fields.positive("max_position_embeddings", default=defaults.get("max_position_embeddings"))
    fields.one_of(bool, "use_sliding_window", allowed=[False], default=False)
    window = fields.values.get("sliding_window", defaults.get("sliding_window"))
    if not windowed or window is None:
        return length
    return min(length, fields.positive("sliding_window", default=window))


def _eps(fields: Fields, defaults: dict[str, Any]) -> float:
    if "rms_norm_eps" in defaults:
        return fields.get(float, "rms_norm_eps", default=defaults["rms_norm_eps"])
    return fields.get(float, "rms_norm_eps")


def _rope(
    fields: Fields, head_dim: int, theta: float | None
) -> tuple[float, tuple[int, int, int] | None, RopeScaling | None]:
    """(rope_theta, mrope_section, scaling), from `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta`."""
    rope = fields.section("rope_parameters", optional=True) or fields.section("rope_scaling", optional=True)
    if rope is not None and "rope_theta" in rope.values:
        theta = rope.get(float, "rope_theta")
    else:
        theta = fields.get(float, "rope_theta") if theta is None else fields.get(float, "rope_theta", default=theta)
    if rope is None:
        return theta, None, None
    kind = rope.one_of(str, "rope_type", "type", allowed=["default", "mrope", "llama3", "linear"], default="default")
    if kind == "linear":
        return theta, None, RopeScaling(rope.get(float, "factor"))
    if kind == "llama3":
        scaling = RopeScaling(
            factor=rope.get(float, "factor"),
            low_freq_factor=rope.get(float, "low_freq_factor"),
            high_freq_factor=rope.get(float, "high_freq_factor"),
            original=rope.positive("original_max_position_embeddings"),
        )
        return theta, None, scaling
    sections = rope.get(list, "mrope_section", default=None)
    if sections is None:
        if kind == "mrope":
            raise rope.error("mrope_section", "is missing")
        return theta, None, None
    if len(sections) != 3 or not all(isinstance(s, int) and s >= 0 for s in sections) or sum(sections) * 2 != head_dim:
        raise rope.error("mrope_section", f"is {sections!r}, where three widths of sum {head_dim // 2} are expected")
    return theta, (sections[0], sections[1], sections[2]), None


class DecoderMLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: DecoderConfig, group: Group = SOLO) -> None:
        super().__init__()
        inner = group.shard(config.intermediate_size)
        self.gate_up_proj = MergedLinear(config.hidden_size, {"gate_proj": inner, "up_proj": inner})
        self.down_proj = RowLinear(inner, config.hidden_size, group=group)

    def forward(self, hidden: Tensor, norm: RMSNorm) -> Tensor:
        """hidden [T, hidden], overwritten -> hidden + mlp(norm(hidden))."""
        return self.down_proj.add_to(hidden, normed_swiglu(norm, self.gate_up_proj, hidden))


class DecoderLayer(nn.Module):
    """One layer; `layer` is its index in the K/V cache."""

    def __init__(self, config: DecoderConfig, layer: int, group: Group = SOLO) -> None:
        super().__init__()
        self.self_attn = DecoderAttention(
            layer,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            qkv_bias=config.qkv_bias,
            output_bias=config.output_bias,
            group=group,
        )
        self.mlp = DecoderMLP(config, group)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, rotary: Rotary, ctx: ForwardContext, rows: Tensor | None = None) -> Tensor:
        """hidden [T, hidden], overwritten -> [T, hidden], or [S, hidden] of `rows` alone."""
        hidden = self.self_attn(hidden, self.input_layernorm, rotary, ctx, rows)
        return self.mlp(hidden, self.post_attention_layernorm)


class Decoder(nn.Module):
    """Embedding, layers and final norm; of all but the norms, a group's ranks hold a share each."""

    def __init__(self, config: DecoderConfig, group: Group = SOLO) -> None:
        super().__init__()
        self.config = config
        self.num_kv_heads = group.kv_shard(config.num_key_value_heads).width
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, group)
        self.layers = nn.ModuleList(DecoderLayer(config, i, group) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary: nn.Module
        if config.mrope_section is None:
            self.rotary = RotaryEmbedding(config.head_dim, config.rope_theta)
            if config.rope_scaling is not None:
                self.rotary.inv_freq = config.rope_scaling.apply(self.rotary.inv_freq)
        else:
            self.rotary = MultimodalRotaryEmbedding(config.head_dim, config.rope_theta, config.mrope_section)

    @property
    def kv_spec(self) -> KVSpec:
        """What this rank's cache holds for each token."""
        return KVSpec(self.config.num_hidden_layers, self.num_kv_heads, self.config.head_dim)

    def forward(self, hidden: Tensor, positions: Tensor, ctx: ForwardContext, rows: Tensor | None = None) -> Tensor:
        """hidden [T, hidden]; positions int64 [T], or [3, T] with `mrope_section` -> [T, hidden], normalised.

        rows: int64 [S], rows whose output is wanted; the last layer then spends nothing more on the others. -> [S, hidden]
        """
        rotary = self.rotary(positions)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            hidden = layer(hidden, rotary, ctx, rows if i == last else None)
        return self.norm(hidden)
