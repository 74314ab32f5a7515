"""The vision towers of the LLaVA family: CLIP (arXiv:2103.00020) and SigLIP (arXiv:2303.15343), plain ViTs of one resolution.

They differ in three things: CLIP has a class token, a norm before the first layer and no bias in its patch kernel. LLaVA takes
the hidden state behind some layer, without the final norm, so later layers and heads are neither built nor read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sightline.layers.activation import ACTIVATIONS, gelu_tanh
from sightline.layers.block_attention import block_attention, block_flops
from sightline.layers.linear import Linear, MergedLinear
from sightline.layers.norm import LayerNorm
from sightline.layers.parameter import Slot
from sightline.models import Encoding
from sightline.models.config import Fields

# Tiles encoded by one pass: enough to fill a device, few enough to bound the activations.
_MAX_BATCH = 64
_CHANNELS = 3

# Defaults of transformers' classes, which published files omit; mean and deviation of a pixel in 0..1.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "image_mean": (0.48145466, 0.4578275, 0.40821073),
        "image_std": (0.26862954, 0.26130258, 0.27577711),
    },
    "siglip_vision_model": {
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
    },
}
VIT_KINDS = tuple(_DEFAULTS)


@dataclass(frozen=True)
class VitConfig:
    """`vision_config` of config.json, and how preprocessor_config.json turns uint8 into the tower's input.

    class_token: CLIP's (with its first norm); drop_class_token: whether features leave it out. num_layers: those that are
    run. A pixel x of channel c enters as (x * rescale_factor - image_mean[c]) / image_std[c].
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float
    class_token: bool
    drop_class_token: bool
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    rescale_factor: float

    @classmethod
    def from_fields(
        cls, fields: Fields, preprocessor: Fields, *, default_kind: str, feature_layer: int, drop_class_token: bool
    ) -> VitConfig:
        """feature_layer: index of the hidden state that is used; 0 is the first layer's input, -1 the last one's output."""
        kind = fields.one_of(str, "model_type", allowed=VIT_KINDS, default=default_kind)
        defaults = _DEFAULTS[kind]
        hidden_size = fields.positive("hidden_size", default=768)
        num_heads = fields.positive("num_attention_heads", default=12)
        if hidden_size % num_heads:
            raise fields.error("hidden_size", f"is {hidden_size}, which {num_heads} attention heads do not divide")
        depth = fields.positive("num_hidden_layers", default=12)
        num_layers = feature_layer if feature_layer >= 0 else depth + 1 + feature_layer
        if not 0 <= num_layers <= depth:
            raise fields.error("num_hidden_layers", f"is {depth}, but the features are those of layer {feature_layer}")
        fields.one_of(int, "num_channels", allowed=[_CHANNELS], default=_CHANNELS)
        normalize = preprocessor.get(bool, "do_normalize", default=True)
        rescale = preprocessor.get(bool, "do_rescale", default=True)
        mean = preprocessor.floats("image_mean", _CHANNELS, defaults["image_mean"])
        std = preprocessor.floats("image_std", _CHANNELS, defaults["image_std"])
        return cls(
            hidden_size=hidden_size,
            intermediate_size=fields.positive("intermediate_size", default=3072),
            num_layers=num_layers,
            num_heads=num_heads,
            image_size=fields.positive("image_size", default=224),
            patch_size=fields.positive("patch_size", default=defaults["patch_size"]),
            hidden_act=fields.one_of(str, "hidden_act", allowed=list(ACTIVATIONS), default=defaults["hidden_act"]),
            layer_norm_eps=fields.get(float, "layer_norm_eps", default=defaults["layer_norm_eps"]),
            class_token=kind == "clip_vision_model",
            drop_class_token=drop_class_token,
            image_mean=mean if normalize else (0.0,) * _CHANNELS,
            image_std=std if normalize else (1.0,) * _CHANNELS,
            rescale_factor=preprocessor.get(float, "rescale_factor", default=1 / 255) if rescale else 1.0,
        )

    @property
    def side(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def has_class_feature(self) -> bool:
        """Whether the class token is among the features."""
        return self.class_token and not self.drop_class_token


class PatchKernel(Linear):
    """uint8 tiles -> patch embeddings. The checkpoint holds a convolution [E, 3, P, P]."""

    scale: Tensor
    shift: Tensor

    def __init__(self, config: VitConfig) -> None:
        self.patch, self.side = config.patch_size, config.side
        super().__init__(_CHANNELS * self.patch**2, config.hidden_size, bias=not config.class_token)
        std, mean = (torch.tensor(v, dtype=torch.float64, device="cpu") for v in (config.image_std, config.image_mean))
        device = self.weight.device
        # x * scale + shift, one row for each channel
        self.register_buffer("scale", (config.rescale_factor / std).float()[:, None].to(device), persistent=False)
        self.register_buffer("shift", (-mean / std).float()[:, None].to(device), persistent=False)

    def slots(self, name: str) -> Iterator[tuple[str, Slot]]:
        """The kernel as a matrix."""
        shape = (self.out_features, _CHANNELS, self.patch, self.patch)
        yield f"{name}.weight", Slot(self.weight.data, lambda kernel: kernel.flatten(1), shape)
        if self.bias is not None:
            yield f"{name}.bias", Slot(self.bias.data)

    def forward(self, tiles: Tensor) -> Tensor:
        """tiles uint8 [t, S, S, 3] -> [t, side^2, E], row by row; pixels beyond the last whole patch are ignored."""
        n, p = self.side, self.patch
        cells = tiles[:, : n * p, : n * p].reshape(-1, n, p, n, p, _CHANNELS)
        cells = cells.permute(0, 1, 3, 5, 2, 4).reshape(-1, n * n, _CHANNELS, p * p)
        values = torch.addcmul(self.shift, cells.float(), self.scale)
        return super().forward(values.flatten(2).to(self.weight.dtype))


class Positions(nn.Module):
    """weight: [rows, E], uninitialised; one row for each token of a tile."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width), requires_grad=False)


class VitEmbeddings(nn.Module):
    """Patches, class token in front of them, positions."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.patch_embedding = PatchKernel(config)
        self.position_embedding = Positions(config.side**2 + config.class_token, config.hidden_size)
        self.class_embedding: nn.Parameter | None = None
        if config.class_token:
            self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size), requires_grad=False)

    def forward(self, tiles: Tensor) -> Tensor:
        """tiles uint8 [t, S, S, 3] -> [t, N, E]."""
        x = self.patch_embedding(tiles)
        if self.class_embedding is not None:
            x = torch.cat((self.class_embedding.expand(x.shape[0], 1, -1), x), dim=1)
        return x + self.position_embedding.weight


class VitAttention(nn.Module):
    """Full attention inside each tile."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.qkv_proj = MergedLinear(width, {"q_proj": width, "k_proj": width, "v_proj": width}, bias=True)
        self.out_proj = Linear(width, width, bias=True)

    def forward(self, x: Tensor, residual: Tensor, num_tiles: int) -> Tensor:
        """x, residual [N, E] -> residual + attention(x), all but the bias of `out_proj`."""
        q, k, v = self.qkv_proj(x).unflatten(1, (3, self.num_heads, -1)).unbind(1)
        return self.out_proj.add_product_to(residual, block_attention(q, k, v, [(num_tiles, len(x) // num_tiles)]))


class VitMLP(nn.Module):
    """fc2(act(fc1 x))."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x, residual [N, E] -> residual + mlp(x), all but the bias of `fc2`."""
        return self.fc2.add_product_to(residual, self._inner(x))

    def _inner(self, x: Tensor) -> Tensor:
        if self.act is gelu_tanh and x.is_cuda and x.element_size() == 2:
            assert self.fc1.bias is not None
            # inside the product: a sixth less time than in a pass of its own
            return torch._addmm_activation(self.fc1.bias, x, self.fc1.weight.t(), use_gelu=True)
        return self.act(self.fc1(x))


class VitLayer(nn.Module):
    """Pre-norm block. The bias of each half's last product is left to the norm that follows, which adds it for less."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.self_attn = VitAttention(config)
        self.mlp = VitMLP(config)
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor, pending: Tensor | None, num_tiles: int) -> tuple[Tensor, Tensor]:
        """x [N, E], overwritten; pending: [E], still to be added to it -> the same of the next layer."""
        normed = self.layer_norm1(x) if pending is None else self.layer_norm1.after_bias(x, pending)
        x = self.self_attn(normed, x, num_tiles)
        assert self.self_attn.out_proj.bias is not None
        assert self.mlp.fc2.bias is not None
        x = self.mlp(self.layer_norm2.after_bias(x, self.self_attn.out_proj.bias), x)
        return x, self.mlp.fc2.bias


class VitEncoder(nn.Module):
    """The layers that are run."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VitLayer(config) for _ in range(config.num_layers))

    def forward(self, x: Tensor) -> Encoding[Tensor]:
        """x [t, N, E], overwritten -> [t, N, E]."""
        num_tiles, num_rows, width = x.shape
        rows, pending = x.flatten(0, 1), None
        for layer in self.layers:
            rows, pending = layer(rows, pending, num_tiles)
            yield block_flops(layer, width, [(num_tiles, num_rows)])
        return (rows if pending is None else rows.add_(pending)).view(x.shape)


class VisionTower(nn.Module):
    """Tiles to features. Submodules are named as in transformers' CLIPVisionModel ("pre_layrnorm" is its spelling)."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = VitEmbeddings(config)
        self.pre_layrnorm = LayerNorm(config.hidden_size, config.layer_norm_eps) if config.class_token else None
        self.encoder = VitEncoder(config)

    def forward(self, tiles: Tensor) -> Encoding[Tensor]:
        """tiles uint8 [t, S, S, 3] -> [t, features, E]: one feature for each patch, row by row."""
        size = self.config.image_size
        assert tiles.shape[1:] == (size, size, _CHANNELS), f"tiles {tuple(tiles.shape)} for a tower of {size} pixels"
        parts = []
        for part in tiles.split(_MAX_BATCH):
            parts.append((yield from self._encode(part)))
        return torch.cat(parts)

    def _encode(self, tiles: Tensor) -> Encoding[Tensor]:
        x = self.embeddings(tiles)
        x = yield from self.encoder(x if self.pre_layrnorm is None else self.pre_layrnorm(x))
        return x[:, 1:] if self.config.class_token and self.config.drop_class_token else x

    def has_slot(self, name: str) -> bool:
        """Whether the checkpoint's tensor `name` (as below `vision_model.`) is used, and not of a later layer or a head."""
        part, _, rest = name.partition(".")
        if part == "encoder":
            return int(rest.split(".")[1]) < self.config.num_layers
        return part not in ("post_layernorm", "head") and not name.endswith(".position_ids")
