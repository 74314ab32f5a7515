"""The vision tower of Llama 3.2 Vision (Meta's `llama-models`, the "Llama 3" report arXiv:2407.21783, section 7).

A picture is up to four square tiles. All tiles of a picture are one sequence for a plain transformer and a gated "global" one.
Meta's tower always has four slots and pads each tile's 1601 tokens to 1608; its mask hides a pair of tokens from each other
only if *both* are padding. So a picture's own tokens do attend to padding, and skipping the empty slots would be wrong.

What follows computes exactly that without a mask: own tokens stand first, padding behind; own queries see all keys, padding
queries see own keys. Padding tokens that start equal stay equal, so one of them may stand for all with log(how many) added to
its scores: that makes pictures of one or two tiles two and a half and one and a half times cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from sightline.layers.activation import ACTIVATIONS
from sightline.layers.block_attention import block_flops
from sightline.layers.linear import Linear, MergedLinear
from sightline.layers.norm import LayerNorm
from sightline.layers.parameter import Slot
from sightline.models import Encoding
from sightline.models.config import Fields

# (aspect ratio id, rows, columns)
Grid = tuple[int, int, int]

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Meta pads each tile's tokens to a multiple of this.
_ALIGN = 8
# torch's default, which layernorm_pre and layernorm_post use whatever `norm_eps` says
_OUTER_EPS = 1e-5
# Pictures encoded by one pass: enough to fill a device, few enough to bound the activations.
_MAX_BATCH = 4


@dataclass(frozen=True)
class MllamaVisionConfig:
    """`vision_config` of config.json, and how preprocessor_config.json turns uint8 into the tower's input.

    image_size: side of a tile in pixels. arrangements: (rows, columns) of aspect ratio id 1, 2, ... intermediate_layers:
    their inputs are part of the output. A pixel x of channel c enters as (x * rescale_factor - image_mean[c]) / image_std[c].
    """

    hidden_size: int
    num_heads: int
    intermediate_size: int
    hidden_act: str
    num_hidden_layers: int
    num_global_layers: int
    intermediate_layers: tuple[int, ...]
    image_size: int
    patch_size: int
    norm_eps: float
    max_num_tiles: int
    arrangements: tuple[tuple[int, int], ...]
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    rescale_factor: float

    @classmethod
    def from_fields(cls, fields: Fields, preprocessor: Fields) -> MllamaVisionConfig:
        """Defaults are those of transformers' MllamaVisionConfig, which published files may omit."""
        hidden_size = fields.positive("hidden_size", default=1280)
        num_heads = fields.positive("attention_heads", "num_attention_heads", default=16)
        if hidden_size % num_heads:
            raise fields.error("hidden_size", f"is {hidden_size}, which {num_heads} attention heads do not divide")
        fields.one_of(int, "num_channels", allowed=[3], default=3)
        num_layers = fields.positive("num_hidden_layers", default=32)
        intermediate = fields.get(list, "intermediate_layers_indices", default=[3, 7, 15, 23, 30])
        if not all(isinstance(i, int) and 0 <= i < num_layers for i in intermediate):
            raise fields.error("intermediate_layers_indices", f"is {intermediate!r}, with {num_layers} layers")
        output_dim = fields.positive("vision_output_dim", default=7680)
        if output_dim != hidden_size * (1 + len(intermediate)):
            raise fields.error(
                "vision_output_dim",
                f"is {output_dim}, where {1 + len(intermediate)} states of {hidden_size} are output",
            )
        image_size = fields.positive("image_size", default=448)
        size = preprocessor.get(dict, "size", default={"height": image_size, "width": image_size})
        if (size.get("height"), size.get("width")) != (image_size, image_size):
            raise preprocessor.error("size", f"is {size!r}, but config.json's vision_config.image_size is {image_size}")
        max_tiles = fields.positive("max_num_tiles", default=4)
        preprocessor.one_of(int, "max_image_tiles", allowed=[max_tiles], default=max_tiles)
        normalize = preprocessor.get(bool, "do_normalize", default=True)
        rescale = preprocessor.get(bool, "do_rescale", default=True)
        return cls(
            hidden_size=hidden_size,
            num_heads=num_heads,
            intermediate_size=fields.positive("intermediate_size", default=5120),
            hidden_act=fields.one_of(str, "hidden_act", allowed=list(ACTIVATIONS), default="gelu"),
            num_hidden_layers=num_layers,
            num_global_layers=fields.positive("num_global_layers", default=8),
            intermediate_layers=tuple(intermediate),
            image_size=image_size,
            patch_size=fields.positive("patch_size", default=14),
            norm_eps=fields.get(float, "norm_eps", default=1e-5),
            max_num_tiles=max_tiles,
            arrangements=_arrangements(fields, max_tiles),
            image_mean=preprocessor.floats("image_mean", 3, _CLIP_MEAN) if normalize else (0.0,) * 3,
            image_std=preprocessor.floats("image_std", 3, _CLIP_STD) if normalize else (1.0,) * 3,
            rescale_factor=preprocessor.get(float, "rescale_factor", default=1 / 255) if rescale else 1.0,
        )

    @property
    def tokens_per_tile(self) -> int:
        """Patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def output_size(self) -> int:
        """The final state and the intermediate ones, side by side."""
        return self.hidden_size * (1 + len(self.intermediate_layers))


def _arrangements(fields: Fields, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """The tables of tile embeddings are numbered by this list, and so is what the processor sends."""
    sides = range(1, max_tiles + 1)
    expected = [[rows, columns] for rows in sides for columns in sides if rows * columns <= max_tiles]
    given = fields.get(list, "supported_aspect_ratios", default=expected)
    if given != expected:
        raise fields.error("supported_aspect_ratios", f"is {given!r}, which is not supported (supported: {expected!r})")
    return tuple((rows, columns) for rows, columns in expected)


def gate() -> nn.Parameter:
    """A learned gate, used through tanh. Open until loaded: pictures shall matter with dummy weights too."""
    return nn.Parameter(torch.full((1,), 0.5), requires_grad=False)


class _Table(nn.Module):
    """weight: [rows, columns], uninitialised; read row by row."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns), requires_grad=False)


class _Layout(NamedTuple):
    """How the rows of a picture with `tiles` tiles stand: its own tokens, those of empty slots, padding of every slot.

    slots: how many of the tower's slots are computed. padding: padding rows of each. row_slots: int64 [N - num_own], slot
    of each row that is not the picture's own. key_bias: [1, 1, 1, N], logarithm of how many tokens a row stands for;
    None where each stands for itself.
    """

    slots: int
    padding: int
    row_slots: Tensor
    key_bias: Tensor | None


class TilePatches(Linear):
    """uint8 tiles -> patch embeddings. The checkpoint holds a convolution [E, 3, P, P] without bias."""

    scale: Tensor
    shift: Tensor

    def __init__(self, config: MllamaVisionConfig) -> None:
        self.patch = config.patch_size
        super().__init__(3 * self.patch**2, config.hidden_size)
        std, mean = (torch.tensor(v, dtype=torch.float64, device="cpu") for v in (config.image_std, config.image_mean))
        device = self.weight.device
        self.register_buffer("scale", (config.rescale_factor / std).float()[:, None].to(device), persistent=False)
        self.register_buffer("shift", (-mean / std).float()[:, None].to(device), persistent=False)

    def slots(self, name: str) -> Iterator[tuple[str, Slot]]:
        """The kernel as a matrix."""
        shape = (self.out_features, 3, self.patch, self.patch)
        yield f"{name}.weight", Slot(self.weight.data, lambda kernel: kernel.flatten(1), shape)

    def forward(self, tiles: Tensor) -> Tensor:
        """tiles uint8 [t, S, S, 3] -> [t, (S / P)^2, E], row by row."""
        count, side, _, channels = tiles.shape
        n, p = side // self.patch, self.patch
        patches = tiles[:, : n * p, : n * p].reshape(count, n, p, n, p, channels).permute(0, 1, 3, 5, 2, 4)
        values = torch.addcmul(self.shift, patches.reshape(count, n * n, channels, p * p).float(), self.scale)
        return super().forward(values.flatten(2).to(self.weight.dtype))


class TileEmbedding(nn.Module):
    """A vector for each (aspect ratio, slot), gated."""

    def __init__(self, config: MllamaVisionConfig) -> None:
        super().__init__()
        self.shape = (config.max_num_tiles, config.hidden_size)
        self.embedding = _Table(len(config.arrangements) + 1, math.prod(self.shape))
        self.gate = gate()

    def forward(self, aspect_ratio: int) -> Tensor:
        """-> [slots, E]."""
        return self.table(aspect_ratio) * self.gate.tanh()

    def table(self, aspect_ratio: int) -> Tensor:
        """Without the gate."""
        return self.embedding.weight[aspect_ratio].view(self.shape)


class PositionEmbedding(nn.Module):
    """(1 - tanh g) * one table for every tile + tanh g * a table for each (aspect ratio, slot)."""

    def __init__(self, config: MllamaVisionConfig) -> None:
        super().__init__()
        self.shape = (config.max_num_tiles, config.tokens_per_tile, config.hidden_size)
        self.gate = gate()
        self.embedding = nn.Parameter(torch.empty(self.shape[1:]), requires_grad=False)
        self.tile_embedding = _Table(len(config.arrangements) + 1, math.prod(self.shape))

    def forward(self, aspect_ratio: int, slots: int) -> Tensor:
        """-> [slots, tokens_per_tile, E]."""
        gate = self.gate.tanh()
        return (1 - gate) * self.embedding + gate * self.table(aspect_ratio)[:slots]

    def table(self, aspect_ratio: int) -> Tensor:
        """The tables of all slots, without the gate."""
        return self.tile_embedding.weight[aspect_ratio].view(self.shape)


class VisionAttention(nn.Module):
    """Own queries see all keys, padding queries see own keys."""

    def __init__(self, config: MllamaVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.qkv_proj = MergedLinear(width, {"q_proj": width, "k_proj": width, "v_proj": width})
        self.o_proj = Linear(width, width)

    def forward(self, x: Tensor, num_own: int, key_bias: Tensor | None) -> Tensor:
        """x [B, N, E], the first num_own rows the picture's own; key_bias [1, 1, 1, N] -> [B, N, E]."""
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = scaled_dot_product_attention(q[:, :, :num_own], k, v, key_bias)
        if num_own < x.shape[1]:
            padding = scaled_dot_product_attention(q[:, :, num_own:], k[:, :, :num_own], v[:, :, :num_own])
            out = torch.cat((out, padding), dim=2)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """fc2(act(fc1 x))."""

    def __init__(self, config: MllamaVisionConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] -> [..., E]."""
        return self.fc2(self.act(self.fc1(x)))


class VisionLayer(nn.Module):
    """Pre-norm layer; the global ones scale both branches by tanh of a learned gate."""

    def __init__(self, config: MllamaVisionConfig, gated: bool) -> None:
        super().__init__()
        self.self_attn = VisionAttention(config)
        self.mlp = VisionMLP(config)
        self.input_layernorm = LayerNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, config.norm_eps)
        self.gate_attn = gate() if gated else None
        self.gate_ffn = gate() if gated else None

    def forward(self, x: Tensor, num_own: int, key_bias: Tensor | None) -> Tensor:
        """x [B, N, E] -> [B, N, E]."""
        attention = self.self_attn(self.input_layernorm(x), num_own, key_bias)
        x = x + attention if self.gate_attn is None else torch.addcmul(x, attention, self.gate_attn.tanh())
        mlp = self.mlp(self.post_attention_layernorm(x))
        return x + mlp if self.gate_ffn is None else torch.addcmul(x, mlp, self.gate_ffn.tanh())


class VisionEncoder(nn.Module):
    """A stack of layers."""

    def __init__(self, config: MllamaVisionConfig, num_layers: int, gated: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config, gated) for _ in range(num_layers))

    def forward(
        self, x: Tensor, num_own: int, key_bias: Tensor | None, keep: Sequence[int] = ()
    ) -> Encoding[tuple[Tensor, list[Tensor]]]:
        """x [B, N, E] -> the last state, and the states [B, num_own, E] *before* the layers `keep`, as Meta takes them."""
        kept: dict[int, Tensor] = {}
        for i, layer in enumerate(self.layers):
            if i in keep:
                kept[i] = x[:, :num_own]
            x = layer(x, num_own, key_bias)
            yield block_flops(layer, x.shape[2], [(x.shape[0], x.shape[1])])
        return x, [kept[i] for i in keep]


class VisionTower(nn.Module):
    """Tiles -> states for cross-attention, of the picture's own tokens only."""

    def __init__(self, config: MllamaVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = TilePatches(config)
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size), requires_grad=False)
        self.gated_positional_embedding = PositionEmbedding(config)
        self.pre_tile_positional_embedding = TileEmbedding(config)
        self.post_tile_positional_embedding = TileEmbedding(config)
        self.layernorm_pre = LayerNorm(config.hidden_size, _OUTER_EPS)
        self.layernorm_post = LayerNorm(config.hidden_size, _OUTER_EPS)
        self.transformer = VisionEncoder(config, config.num_hidden_layers, gated=False)
        self.global_transformer = VisionEncoder(config, config.num_global_layers, gated=True)
        self._equal_slots: dict[int, bool] = {}

    def forward(self, pixels: Sequence[Tensor], grids: Sequence[Grid]) -> Encoding[list[Tensor]]:
        """pixels: uint8 [tiles, S, S, 3] each; grids: (aspect ratio id, rows, columns) -> [tiles * tokens, output] each."""
        side = self.config.image_size
        for tiles, (ratio, rows, columns) in zip(pixels, grids, strict=True):
            assert self.config.arrangements[ratio - 1] == (rows, columns), f"grid {(ratio, rows, columns)}"
            assert tuple(tiles.shape) == (rows * columns, side, side, 3), (
                f"pixels {tuple(tiles.shape)} do not fit {rows} x {columns} tiles of {side} pixels"
            )
        # pictures with equally many rows share their passes
        groups: dict[tuple[int, bool], list[int]] = {}
        for i, (ratio, rows, columns) in enumerate(grids):
            groups.setdefault((rows * columns, self._shortened(ratio, rows * columns)), []).append(i)
        result: dict[int, Tensor] = {}
        for (num_tiles, shortened), members in groups.items():
            layout = self._layout(num_tiles, shortened)
            for first in range(0, len(members), _MAX_BATCH):
                chosen = members[first : first + _MAX_BATCH]
                ratios = [grids[i][0] for i in chosen]
                states = yield from self._encode([pixels[i] for i in chosen], ratios, num_tiles, layout)
                result.update(zip(chosen, states.unbind(), strict=True))
        return [result[i] for i in range(len(pixels))]

    def _encode(
        self, pixels: Sequence[Tensor], ratios: Sequence[int], num_tiles: int, layout: _Layout
    ) -> Encoding[Tensor]:
        """Pictures of num_tiles tiles -> [B, num_own, output]."""
        num_own = num_tiles * self.config.tokens_per_tile
        x = torch.stack([self._embed(tiles, ratio, layout) for tiles, ratio in zip(pixels, ratios, strict=True)])
        x, kept = yield from self.transformer(x, num_own, layout.key_bias, self.config.intermediate_layers)
        x = self.layernorm_post(x) + torch.stack([self._after(ratio, num_tiles, layout) for ratio in ratios])
        x, _ = yield from self.global_transformer(x, num_own, layout.key_bias)
        # the kept states are interleaved: feature d of state k stands at width + d * len(kept) + k
        return torch.cat((x[:, :num_own], torch.stack(kept, dim=-1).flatten(-2)), dim=-1)

    def _embed(self, tiles: Tensor, ratio: int, layout: _Layout) -> Tensor:
        """uint8 [t, S, S, 3] -> [N, E], the input of the first layer."""
        patches = self.patch_embedding(tiles)
        # an empty slot holds zeros after normalisation, and the patch kernel has no bias
        empty = patches.new_zeros(layout.slots - patches.shape[0], *patches.shape[1:])
        patches = torch.cat((patches, empty)) + self.pre_tile_positional_embedding(ratio)[: layout.slots, None]
        x = torch.cat((self.class_embedding.expand(layout.slots, 1, -1), patches), dim=1)
        x = self.layernorm_pre(x + self.gated_positional_embedding(ratio, layout.slots))
        return torch.cat((x.flatten(0, 1), x.new_zeros(layout.slots * layout.padding, x.shape[-1])))

    def _after(self, ratio: int, num_tiles: int, layout: _Layout) -> Tensor:
        """[N, E], what is added to every row between the two stacks."""
        table = self.post_tile_positional_embedding(ratio)
        own = table[:num_tiles].repeat_interleave(self.config.tokens_per_tile, dim=0)
        return torch.cat((own, table[layout.row_slots]))

    def _layout(self, num_tiles: int, shortened: bool) -> _Layout:
        tokens, weight = self.config.tokens_per_tile, self.class_embedding
        padding = -tokens % _ALIGN
        num_empty = self.config.max_num_tiles - num_tiles
        slots = num_tiles + 1 if shortened else self.config.max_num_tiles
        kept_padding = min(padding, 1) if shortened else padding
        empty = torch.arange(num_tiles, slots, device=weight.device).repeat_interleave(tokens)
        pads = torch.arange(slots, device=weight.device).repeat_interleave(kept_padding)
        bias = None
        if shortened:
            counts = [1] * (num_tiles * tokens) + [num_empty] * tokens
            counts += ([padding] * num_tiles + [padding * num_empty]) * kept_padding
            bias = (
                torch.tensor(counts, dtype=torch.float32, device=weight.device).log().to(weight.dtype)[None, None, None]
            )
        return _Layout(slots, kept_padding, torch.cat((empty, pads)), bias)

    def _shortened(self, ratio: int, num_tiles: int) -> bool:
        """Whether one empty slot may stand for all: the tables give them equal embeddings (zeros in the releases), and
        there are at least two, for with fewer there is little to gain."""
        if self.config.max_num_tiles - num_tiles < 2:
            return False
        if ratio not in self._equal_slots:
            parts = (
                self.pre_tile_positional_embedding,
                self.post_tile_positional_embedding,
                self.gated_positional_embedding,
            )
            tables = [part.table(ratio)[num_tiles:] for part in parts]
            self._equal_slots[ratio] = all(bool((table == table[:1]).all()) for table in tables)
        return self._equal_slots[ratio]
