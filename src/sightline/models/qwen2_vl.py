"""Qwen2-VL (arXiv:2409.12191): a vision tower of any resolution, and the Qwen2 decoder with multimodal rotary positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from sightline.attention.backend import ForwardContext
from sightline.layers.activation import ACTIVATIONS, QUICK, quick_gelu
from sightline.layers.block_attention import block_attention, block_flops
from sightline.layers.embedding import OutputHead, place_features
from sightline.layers.linear import Linear, PatchLinear
from sightline.layers.norm import LayerNorm, RMSNorm
from sightline.layers.parameter import Slot
from sightline.layers.rotary import Rotary, inverse_frequencies, rotate_heads, tables
from sightline.models import EncodesImages, Encoding, KVSpec
from sightline.models.config import Fields, refuse_quantization
from sightline.models.decoder import AroundDecoder, Decoder, DecoderConfig
from sightline.parallel import SOLO, Group

Grid = tuple[int, int, int]

# Mean and deviation of CLIP's training pictures, used by every Qwen2-VL release; files may omit them.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Nested configs omit what equals the defaults of the class that wrote them (transformers' Qwen2VLTextConfig).
_NESTED_TEXT_DEFAULTS = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
}
_ROPE_THETA = 1e6
_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Qwen2VLVisionConfig:
    """`vision_config` of config.json, and how preprocessor_config.json turns uint8 into the tower's input.

    hidden_size: output width (the decoder's); embed_dim: inner width. A pixel x of channel c enters as
    (x * rescale_factor - image_mean[c]) / image_std[c].
    """

    depth: int
    embed_dim: int
    num_heads: int
    intermediate_size: int
    hidden_size: int
    hidden_act: str
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    rope_theta: float
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    rescale_factor: float

    @classmethod
    def from_fields(cls, fields: Fields, preprocessor: Fields) -> Qwen2VLVisionConfig:
        """Defaults are those of transformers' Qwen2VLVisionConfig, which published files omit."""
        embed_dim = fields.positive("embed_dim", default=1280)
        num_heads = fields.positive("num_heads", default=16)
        if embed_dim % (4 * num_heads):
            raise fields.error("embed_dim", f"is {embed_dim}: the width of each of {num_heads} heads must divide by 4")
        rope = fields.section("rope_parameters", optional=True) or Fields({}, fields.where)
        rope.one_of(str, "rope_type", "type", allowed=["axial", "default"], default="axial")
        channels = fields.one_of(int, "in_channels", "in_chans", allowed=[3], default=3)
        normalize = preprocessor.get(bool, "do_normalize", default=True)
        config = cls(
            depth=fields.positive("depth", default=32),
            embed_dim=embed_dim,
            num_heads=num_heads,
            intermediate_size=int(embed_dim * fields.get(float, "mlp_ratio", default=4.0)),
            hidden_size=fields.positive("hidden_size", default=3584),
            hidden_act=fields.one_of(str, "hidden_act", allowed=list(ACTIVATIONS), default="quick_gelu"),
            in_channels=channels,
            patch_size=fields.positive("patch_size", default=14),
            temporal_patch_size=fields.positive("temporal_patch_size", default=2),
            spatial_merge_size=fields.positive("spatial_merge_size", default=2),
            rope_theta=rope.get(float, "rope_theta", default=10000.0),
            image_mean=preprocessor.floats("image_mean", channels, CLIP_MEAN) if normalize else (0.0,) * channels,
            image_std=preprocessor.floats("image_std", channels, CLIP_STD) if normalize else (1.0,) * channels,
            rescale_factor=preprocessor.get(float, "rescale_factor", default=1 / 255)
            if preprocessor.get(bool, "do_rescale", default=True)
            else 1.0,
        )
        for key, value in (
            ("patch_size", config.patch_size),
            ("temporal_patch_size", config.temporal_patch_size),
            ("merge_size", config.spatial_merge_size),
        ):
            preprocessor.one_of(int, key, allowed=[value], default=value)
        return config


@dataclass(frozen=True)
class Qwen2VLConfig(AroundDecoder):
    """Both halves; `from_hf` reads the flat layout of 2024 and the nested one of transformers 5."""

    vision_class: ClassVar[type[Qwen2VLVisionConfig]] = Qwen2VLVisionConfig

    text: DecoderConfig
    vision: Qwen2VLVisionConfig
    tie_word_embeddings: bool
    image_token_id: int
    dtype: str | None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> Qwen2VLConfig:
        """config, preprocessor: the contents of config.json and preprocessor_config.json."""
        refuse_quantization(config)
        top = Fields(config)
        nested = top.section("text_config", optional=True)
        text = DecoderConfig.from_fields(
            nested or top, _NESTED_TEXT_DEFAULTS if nested else {}, _ROPE_THETA, qkv_bias=True
        )
        if text.mrope_section is None:
            raise (nested or top).error("rope_scaling.mrope_section", "is missing")
        vision_fields = top.section("vision_config")
        assert vision_fields is not None
        vision = cls.vision_class.from_fields(vision_fields, Fields(preprocessor, "preprocessor_config.json"))
        if vision.hidden_size != text.hidden_size:
            raise vision_fields.error(
                "hidden_size", f"is {vision.hidden_size}, but the decoder's hidden_size is {text.hidden_size}"
            )
        tied = top.get(bool, "tie_word_embeddings", default=False)
        tied = tied or (nested is not None and nested.get(bool, "tie_word_embeddings", default=False))
        return cls(
            text=text,
            vision=vision,
            tie_word_embeddings=tied,
            image_token_id=top.get(int, "image_token_id", default=151655),
            dtype=(nested or top).get(str, "dtype", "torch_dtype", default=None)
            or top.get(str, "dtype", "torch_dtype", default=None),
        )


class PatchProjection(Linear):
    """The patch kernel. A checkpoint holds a 3-D convolution [E, C, T, P, P] over T equal frames of a still picture; its T
    slices are added at loading, so `weight` is [E, C * P * P]."""

    def __init__(self, config: Qwen2VLVisionConfig) -> None:
        super().__init__(config.in_channels * config.patch_size**2, config.embed_dim)
        frame = (config.patch_size, config.patch_size)
        self.checkpoint_shape = (config.embed_dim, config.in_channels, config.temporal_patch_size, *frame)

    def slots(self, name: str) -> Iterator[tuple[str, Slot]]:
        """The folded kernel; sums in float32."""

        def fold(kernel: Tensor) -> Tensor:
            return kernel.float().sum(dim=2).flatten(1)

        yield f"{name}.weight", Slot(self.weight.data, fold, self.checkpoint_shape)


class PatchEmbed(nn.Module):
    """uint8 pixels -> patch embeddings: normalise, cut into patches, one matrix product."""

    scale: Tensor
    shift: Tensor

    def __init__(self, config: Qwen2VLVisionConfig) -> None:
        super().__init__()
        self.patch, self.merge = config.patch_size, config.spatial_merge_size
        self.proj = PatchProjection(config)
        # x * scale + shift, one row for each channel
        std, mean = (torch.tensor(v, dtype=torch.float64, device="cpu") for v in (config.image_std, config.image_mean))
        device = self.proj.weight.device
        self.register_buffer("scale", (config.rescale_factor / std).float()[:, None].to(device), persistent=False)
        self.register_buffer("shift", (-mean / std).float()[:, None].to(device), persistent=False)

    def patchify(self, pixels: Tensor) -> Tensor:
        """pixels uint8 [H, W, C] -> uint8 [N, C, P * P], rows in merge-block order: the m x m patches of a merged cell
        follow each other, cells row by row."""
        height, width, channels = pixels.shape
        m, p = self.merge, self.patch
        cells = pixels.view(height // (m * p), m, p, width // (m * p), m, p, channels)
        return cells.permute(0, 3, 1, 4, 6, 2, 5).reshape(-1, channels, p * p)

    def forward(self, pixels: Sequence[Tensor]) -> Tensor:
        """pixels: pictures uint8 [H, W, C] -> [N, E] of all their patches."""
        patches = torch.cat([self.patchify(x) for x in pixels]) if len(pixels) > 1 else self.patchify(pixels[0])
        values = torch.addcmul(self.shift, patches.float(), self.scale)
        return self.proj(values.flatten(1).to(self.proj.weight.dtype))


class VisionAttention(nn.Module):
    """Full attention inside each picture."""

    def __init__(self, config: Qwen2VLVisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = PatchLinear(config.embed_dim, 3 * config.embed_dim, bias=True)
        self.proj = PatchLinear(config.embed_dim, config.embed_dim, bias=True)

    def forward(self, x: Tensor, residual: Tensor, rotary: Rotary, groups: Sequence[tuple[int, int]]) -> Tensor:
        """x, residual [N, E] -> residual + attention(x), all but the bias of `proj`. groups: (count, patches) of consecutive
        pictures with equally many patches."""
        num_rows, width = x.shape
        qkv = self.qkv(x)
        qk = rotate_heads(qkv, rotary, 2 * self.num_heads)
        q, k = qk[:, : self.num_heads], qk[:, self.num_heads :]
        v = qkv[:, 2 * width :].view(num_rows, self.num_heads, -1)
        return self.proj.add_product_to(residual, block_attention(q, k, v, groups))


class VisionMLP(nn.Module):
    """fc2(act(fc1 x))."""

    def __init__(self, config: Qwen2VLVisionConfig) -> None:
        super().__init__()
        self.fc1 = PatchLinear(config.embed_dim, config.intermediate_size, bias=True)
        self.fc2 = PatchLinear(config.intermediate_size, config.embed_dim, bias=True)
        self.act = ACTIVATIONS[config.hidden_act]

    @property
    def output(self) -> Linear:
        """The last product."""
        return self.fc2

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x, residual [N, E] -> residual + mlp(x), all but the bias of `output`."""
        if self.act is quick_gelu and self.fc1.is_for_onednn(x):
            # QUICK * quick_gelu(y) is silu(QUICK * y)
            inner = self.fc1.scaled_silu(x, QUICK)
            return self.fc2.add_product_to(residual, inner.mul_(1.0 / QUICK))
        return self.fc2.add_product_to(residual, self.act(self.fc1(x)))


class VisionBlock(nn.Module):
    """Pre-norm block. The bias of each half's last product is left to the norm that follows, which adds it for less. Later
    families change what the class attributes name."""

    norm_class: type[LayerNorm | RMSNorm] = LayerNorm
    mlp_class: Any = VisionMLP

    def __init__(self, config: Qwen2VLVisionConfig) -> None:
        super().__init__()
        self.norm1 = self.norm_class(config.embed_dim, _NORM_EPS)
        self.norm2 = self.norm_class(config.embed_dim, _NORM_EPS)
        self.attn = VisionAttention(config)
        self.mlp: Any = self.mlp_class(config)

    def forward(
        self, x: Tensor, pending: Tensor | None, rotary: Rotary, groups: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """x [N, E], overwritten; pending: [E], still to be added to it -> the same of the next block."""
        normed = self.norm1(x) if pending is None else self.norm1.after_bias(x, pending)
        x = self.attn(normed, x, rotary, groups)
        assert self.attn.proj.bias is not None
        x = self.mlp(self.norm2.after_bias(x, self.attn.proj.bias), x)
        return x, self.mlp.output.bias


class PatchMerger(nn.Module):
    """The m x m patches of a cell side by side, through an MLP to the decoder's width."""

    norm_class: type[LayerNorm | RMSNorm] = LayerNorm

    def __init__(self, config: Qwen2VLVisionConfig) -> None:
        super().__init__()
        self.width = config.embed_dim * config.spatial_merge_size**2
        self.ln_q = self.norm_class(config.embed_dim, _NORM_EPS)
        # named as in the checkpoint, where 1 is the activation
        self.mlp = nn.ModuleDict(
            {
                "0": PatchLinear(self.width, self.width, bias=True),
                "2": PatchLinear(self.width, config.hidden_size, bias=True),
            }
        )

    def forward(self, x: Tensor, pending: Tensor) -> Tensor:
        """x [N, E] in merge-block order, overwritten; pending: see `VisionBlock` -> [N / m^2, hidden_size]."""
        return self.mlp["2"](gelu(self.mlp["0"](self.ln_q.after_bias(x, pending).view(-1, self.width))))


class VisionTower(nn.Module):
    """Patch embedding, blocks with 2-D rotary positions, merger."""

    block_class = VisionBlock
    merger_class = PatchMerger
    inv_freq: Tensor

    def __init__(self, config: Qwen2VLVisionConfig) -> None:
        super().__init__()
        self.merge = config.spatial_merge_size
        self.patch = config.patch_size
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(self.block_class(config) for _ in range(config.depth))
        self.merger = self.merger_class(config)
        frequencies = inverse_frequencies(config.rope_theta, config.embed_dim // config.num_heads // 2)
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def forward(self, pixels: Sequence[Tensor], grids: Sequence[Grid]) -> Encoding[list[Tensor]]:
        """pixels: uint8 [H, W, 3] each; grids: (1, H / patch, W / patch). Returns [patches / merge^2, hidden] each."""
        for picture, (t, h, w) in zip(pixels, grids, strict=True):
            assert (t, *picture.shape[:2]) == (1, h * self.patch, w * self.patch), (
                f"pixels {tuple(picture.shape)} do not fit grid {(t, h, w)} of {self.patch}-pixel patches"
            )
        # pictures of equally many patches become neighbours and share one attention call
        order = sorted(range(len(grids)), key=lambda i: grids[i])
        order.sort(key=lambda i: grids[i][1] * grids[i][2])
        sizes = [grids[i][1] * grids[i][2] for i in order]
        groups = [(sizes.count(n), n) for n in dict.fromkeys(sizes)]

        x = self.patch_embed([pixels[i] for i in order])
        in_order = [grids[i] for i in order]
        encoded = yield from self._encode(x, self._rotary(in_order), in_order, groups)
        features = encoded.split([n // self.merge**2 for n in sizes])
        result: list[Tensor] = [features[0]] * len(order)
        for place, rows in zip(order, features, strict=True):
            result[place] = rows
        return result

    def _encode(
        self, x: Tensor, rotary: Rotary, grids: Sequence[Grid], groups: Sequence[tuple[int, int]]
    ) -> Encoding[Tensor]:
        """x [N, E], patches of pictures of `grids` -> [N / merge^2, hidden]; groups as in `VisionAttention`."""
        pending = None
        for block in self.blocks:
            x, pending = block(x, pending, rotary, groups)
            yield block_flops(block, x.shape[1], groups)
        return self.merger(x, pending)

    def _rotary(self, grids: Sequence[Grid]) -> Rotary:
        """Row and column of each patch, in merge-block order, turn one half of the frequencies each."""
        known: dict[Grid, Tensor] = {}
        for grid in grids:
            if grid not in known:
                known[grid] = self._angles(grid)
        return tables(torch.cat([known[grid] for grid in grids]))

    def _angles(self, grid: Grid) -> Tensor:
        _, h, w = grid
        m = self.merge
        rows = torch.arange(h, device=self.inv_freq.device)[:, None].expand(h, w)
        columns = torch.arange(w, device=self.inv_freq.device)[None, :].expand(h, w)
        blocks = (t.reshape(h // m, m, w // m, m).transpose(1, 2).reshape(-1, 1) for t in (rows, columns))
        return torch.cat([ids * self.inv_freq for ids in blocks], dim=1)


class Qwen2VLForConditionalGeneration(EncodesImages, nn.Module):
    """See the contract in `sightline.models`."""

    config_class = Qwen2VLConfig
    tower_class: type[nn.Module] = VisionTower
    static_encoder = True
    uses_mrope = True

    def __init__(self, config: Qwen2VLConfig, group: Group = SOLO) -> None:
        super().__init__()
        self.config = config
        self.visual = self.tower_class(config.vision)
        self.model = Decoder(config.text, group)
        self.lm_head = None if config.tie_word_embeddings else OutputHead(config.hidden_size, config.vocab_size, group)

    def map_name(self, name: str) -> str | None:
        """Names of 2024 (`visual.`, `model.`) and of transformers 5 (`model.visual.`, `model.language_model.`)."""
        if name.endswith(".rotary_emb.inv_freq") or (self.lm_head is None and name == "lm_head.weight"):
            return None
        for prefix, ours in (("model.visual.", "visual."), ("model.language_model.", "model.")):
            if name.startswith(prefix):
                return ours + name.removeprefix(prefix)
        return name

    @property
    def kv_spec(self) -> KVSpec:
        """What the cache holds for each token."""
        return self.model.kv_spec

    def encoding(self, pixels: Sequence[Tensor], grids: Sequence[Grid]) -> Encoding[list[Tensor]]:
        """pixels: uint8 [H, W, 3] each, on the device; grids: (1, h, w) in patches. Returns [h w / merge^2, hidden] each."""
        return (yield from self.visual(pixels, grids)) if len(pixels) else []

    def embed(self, input_ids: Tensor, image_rows: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """input_ids int64 [T]; image_rows int64 [N] and features [N, hidden] of the placeholders -> [T, hidden]."""
        return place_features(self.model.embed_tokens(input_ids), image_rows, features)

    def forward(self, hidden: Tensor, positions: Tensor, ctx: ForwardContext, rows: Tensor | None = None) -> Tensor:
        """hidden [T, hidden], positions int64 [3, T] -> [T, hidden], normalised; with rows int64 [S], those alone."""
        return self.model(hidden, positions, ctx, rows)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> [S, vocab]."""
        head = self.model.embed_tokens.logits if self.lm_head is None else self.lm_head
        return head(hidden)
