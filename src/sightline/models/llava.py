"""LLaVA 1.5 (arXiv:2310.03744), LLaVA-NeXT and LLaVA-OneVision (arXiv:2408.03326): tower, projector, any of three decoders.

A picture is one square view, or that and tiles of a larger one. The tiles' features are joined to one map, the margins that
padded the picture into its tiles are cut off, and each row of the map ends in a learned `image_newline`.

Two layouts of checkpoints are read. transformers' nests `text_config` and `vision_config`, under names of 2024 or of
transformers 5. The authors' (`LlavaLlamaForCausalLM` and its like) has the decoder's keys at the top and names the tower in
`mm_vision_tower`, a checkpoint of its own that fills what this one lacks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from sightline.attention.backend import ForwardContext
from sightline.layers.activation import ACTIVATIONS
from sightline.layers.embedding import OutputHead, place_features
from sightline.layers.linear import Linear
from sightline.models import EncodesImages, Encoding, KVSpec
from sightline.models.config import Fields, refuse_quantization
from sightline.models.decoder import TEXT_DEFAULTS, AroundDecoder, Decoder, DecoderConfig, text_config
from sightline.models.vit import VisionTower, VitConfig
from sightline.parallel import SOLO, Group

# (rows of tiles, height, width): height and width of the map in features, after its margins were cut off. (0, 0, 0) is the
# square view alone, (0, 1, 0) the square view and one newline.
Grid = tuple[int, int, int]

_CLIP, _SIGLIP = "clip_vision_model", "siglip_vision_model"
# A map with more features than allowed is shrunk only when the factor is above this (LLaVA-NeXT's `llava_arch.py`).
_SHRINK_ABOVE = 1.1


@dataclass(frozen=True)
class _Release:
    """What transformers' config class of an architecture means by a missing key."""

    image_token_id: int
    tower: str
    feature_layer: int
    select: str
    text: str
    newline: bool = True


_HF: dict[str, _Release] = {
    "LlavaForConditionalGeneration": _Release(32000, _CLIP, -2, "default", "llama", newline=False),
    "LlavaNextForConditionalGeneration": _Release(32000, _CLIP, -2, "default", "llama"),
    "LlavaOnevisionForConditionalGeneration": _Release(151646, _SIGLIP, -1, "full", "qwen2"),
}
_ORIGINAL = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaQwenForCausalLM": "qwen2",
}
# Towers that the authors' checkpoints name, for when their folder is not at hand and not needed.
_TOWERS: dict[str, dict[str, Any]] = {
    "clip-vit-large-patch14-336": {
        "model_type": _CLIP,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    },
    "siglip-so400m-patch14-384": {
        "model_type": _SIGLIP,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
}


@dataclass(frozen=True)
class LlavaConfig(AroundDecoder):
    """Both halves and what joins them. newline: whether there is an `image_newline`. max_tiles: maps of more features than
    so many tiles have are shrunk; None for no bound."""

    text: DecoderConfig
    vision: VitConfig
    tie_word_embeddings: bool
    image_token_id: int
    projector_act: str
    projector_bias: bool
    newline: bool
    max_tiles: int | None
    dtype: str | None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> LlavaConfig:
        """config, preprocessor: the contents of config.json and preprocessor_config.json; in the authors' layout the former
        with the tower's own config.json under "companion_config", if that was found."""
        refuse_quantization(config)
        fields = Fields(config)
        architecture = fields.get(list, "architectures")[0]
        images = Fields(preprocessor, "preprocessor_config.json")
        if architecture in _HF:
            return cls._nested(fields, images, _HF[architecture])
        return cls._flat(fields, images, _ORIGINAL[architecture])

    @classmethod
    def _nested(cls, fields: Fields, images: Fields, release: _Release) -> LlavaConfig:
        text_fields, vision_fields = fields.section("text_config"), fields.section("vision_config")
        assert text_fields is not None
        assert vision_fields is not None
        kind = text_fields.one_of(str, "model_type", allowed=list(TEXT_DEFAULTS), default=release.text)
        select = fields.one_of(
            str, "vision_feature_select_strategy", allowed=["default", "full"], default=release.select
        )
        vision = VitConfig.from_fields(
            vision_fields,
            images,
            default_kind=release.tower,
            feature_layer=fields.get(int, "vision_feature_layer", default=release.feature_layer),
            drop_class_token=select == "default",
        )
        if select == "default" and not vision.class_token:
            raise fields.error(
                "vision_feature_select_strategy", "is 'default', but the tower has no class token to drop"
            )
        if release.newline and vision.has_class_feature:
            raise fields.error("vision_feature_select_strategy", "is 'full', but a class token has no place in the map")
        tied = fields.get(bool, "tie_word_embeddings", default=False)
        return cls(
            text=text_config(text_fields, kind),
            vision=vision,
            tie_word_embeddings=tied or text_fields.get(bool, "tie_word_embeddings", default=False),
            image_token_id=fields.get(int, "image_token_index", "image_token_id", default=release.image_token_id),
            projector_act=fields.one_of(str, "projector_hidden_act", allowed=list(ACTIVATIONS), default="gelu"),
            projector_bias=fields.get(bool, "multimodal_projector_bias", default=True),
            newline=release.newline,
            max_tiles=_max_tiles(
                fields, "vision_aspect_ratio", "anyres_max_9" if release.tower == _SIGLIP else "anyres"
            ),
            dtype=fields.get(str, "dtype", "torch_dtype", default=None)
            or text_fields.get(str, "dtype", "torch_dtype", default=None),
        )

    @classmethod
    def _flat(cls, fields: Fields, images: Fields, kind: str) -> LlavaConfig:
        merge = fields.one_of(str, "mm_patch_merge_type", allowed=["flat", "spatial_unpad"], default="flat")
        aspect = fields.get(str, "image_aspect_ratio", default="square")
        if aspect.startswith("anyres") != (merge == "spatial_unpad"):
            raise fields.error("mm_patch_merge_type", f"is {merge!r} with image_aspect_ratio {aspect!r}, not supported")
        fields.one_of(str, "mm_projector_type", allowed=["mlp2x_gelu"])
        fields.one_of(str, "mm_vision_select_feature", allowed=["patch"], default="patch")
        fields.one_of(bool, "mm_use_im_start_end", allowed=[False], default=False)
        text = text_config(fields, kind, {"sliding_window": 4096} if kind == "mistral" else {})
        return cls(
            text=text,
            vision=VitConfig.from_fields(
                tower_fields(fields),
                images,
                default_kind=_CLIP,
                feature_layer=fields.get(int, "mm_vision_select_layer"),
                drop_class_token=True,
            ),
            tie_word_embeddings=fields.get(bool, "tie_word_embeddings", default=False),
            image_token_id=text.vocab_size,
            projector_act="gelu",
            projector_bias=True,
            newline=merge == "spatial_unpad",
            max_tiles=_max_tiles(fields, "image_aspect_ratio", "square"),
            dtype=fields.get(str, "dtype", "torch_dtype", default=None),
        )


def tower_fields(fields: Fields) -> Fields:
    """The vision config of an authors' checkpoint: its tower's own, or a known one."""
    name = fields.get(str, "mm_vision_tower")
    companion = fields.section("companion_config", optional=True)
    if companion is not None:
        where = f"{name}/config.json"
        return Fields(companion.get(dict, "vision_config", default=companion.values), where)
    known = _TOWERS.get(name.rstrip("/").rpartition("/")[2])
    if known is None:
        raise fields.error("mm_vision_tower", f"is {name!r}, which is neither a folder here nor one of {list(_TOWERS)}")
    return Fields(known, f"config.json: mm_vision_tower {name}")


def _max_tiles(fields: Fields, key: str, default: str) -> int | None:
    """9 of "anyres_max_9"; None of "anyres" and of modes without tiles."""
    aspect = fields.get(str, key, default=default)
    number = aspect.removeprefix("anyres_max_")
    if number != aspect and number.isdigit() and int(number) > 0:
        return int(number)
    if aspect not in ("anyres", "pad", "square"):
        raise fields.error(key, f"is {aspect!r}, which is not supported (supported: anyres, anyres_max_N, pad, square)")
    return None


class Projector(nn.Module):
    """linear_2(act(linear_1 x)): from the tower's width to the decoder's."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.linear_1 = Linear(config.vision.hidden_size, config.hidden_size, bias=config.projector_bias)
        self.linear_2 = Linear(config.hidden_size, config.hidden_size, bias=config.projector_bias)
        self.act = ACTIVATIONS[config.projector_act]

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] -> [..., hidden]."""
        return self.linear_2(self.act(self.linear_1(x)))


class LlavaForConditionalGeneration(EncodesImages, nn.Module):
    """See the contract in `sightline.models`."""

    config_class = LlavaConfig
    static_encoder = True
    uses_mrope = False

    def __init__(self, config: LlavaConfig, group: Group = SOLO) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config.vision)
        self.multi_modal_projector = Projector(config)
        self.image_newline: nn.Parameter | None = None
        if config.newline:
            self.image_newline = nn.Parameter(torch.zeros(config.hidden_size), requires_grad=False)
        self.model = Decoder(config.text, group)
        self.lm_head = None if config.tie_word_embeddings else OutputHead(config.hidden_size, config.vocab_size, group)

    @staticmethod
    def companion(config: Mapping[str, Any]) -> str | None:
        """Folder or hub name of the checkpoint that fills slots which this one leaves empty; config: config.json's."""
        name = config.get("mm_vision_tower")
        return name if isinstance(name, str) and config.get("architectures", [None])[0] in _ORIGINAL else None

    def map_companion_name(self, name: str) -> str | None:
        """Names of a CLIP or SigLIP checkpoint, of which the vision half is read."""
        if not name.startswith("vision_model."):
            return None
        return self._tower_name(name)

    def _tower_name(self, name: str) -> str | None:
        inner = name.removeprefix("vision_model.")
        return f"vision_tower.{inner}" if self.vision_tower.has_slot(inner) else None

    def map_name(self, name: str) -> str | None:
        """Names of 2024 and of transformers 5 (all below `model.`), and the authors'."""
        if name.endswith(".rotary_emb.inv_freq"):
            return None
        for prefix in ("model.vision_tower.vision_tower.", "model.vision_tower.", "vision_tower."):
            if name.startswith(prefix):
                return self._tower_name(name.removeprefix(prefix))
        for prefix, ours in (
            ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
            ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
            ("model.image_newline", "image_newline"),
            ("model.language_model.", "model."),
            ("language_model.model.", "model."),
            ("language_model.lm_head.", "lm_head."),
        ):
            if name.startswith(prefix):
                name = ours + name.removeprefix(prefix)
                break
        if (self.lm_head is None and name == "lm_head.weight") or (not self.config.newline and name == "image_newline"):
            return None
        return name

    @property
    def kv_spec(self) -> KVSpec:
        """What the cache holds for each token."""
        return self.model.kv_spec

    def encoding(self, pixels: Sequence[Tensor], grids: Sequence[Grid]) -> Encoding[list[Tensor]]:
        """pixels: uint8 [1 + tiles, S, S, 3] each, on the device, the square view first; grids: see `Grid`. Returns
        [side^2 + height * (width + 1), hidden] each (height and width as shrunk to `max_tiles`)."""
        if not pixels:
            return []
        features = self.multi_modal_projector((yield from self.vision_tower(torch.cat(list(pixels)))))
        parts = features.split([p.shape[0] for p in pixels])
        return [self._pack(part, grid) for part, grid in zip(parts, grids, strict=True)]

    def _pack(self, features: Tensor, grid: Grid) -> Tensor:
        """features [1 + tiles, side^2, hidden] of one picture -> [tokens, hidden]."""
        rows, height, width = grid
        base, tiles = features[0], features[1:]
        assert bool(rows) == bool(len(tiles)), f"{len(tiles)} tiles do not fit grid {grid}"
        if height == 0:
            return base
        assert self.image_newline is not None
        # [height, width, hidden]
        canvas = base.new_empty(height, 0, base.shape[1])
        if rows:
            side = self.config.vision.side
            canvas = (
                tiles.unflatten(0, (rows, -1)).unflatten(2, (side, side)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
            )
            top, left = (canvas.shape[0] - height) // 2, (canvas.shape[1] - width) // 2
            canvas = self._shrink(canvas[top : top + height, left : left + width])
        newline = self.image_newline.expand(canvas.shape[0], 1, -1)
        return torch.cat((base, torch.cat((canvas, newline), dim=1).flatten(0, 1)))

    def _shrink(self, canvas: Tensor) -> Tensor:
        """canvas [height, width, hidden] -> about as many features as `max_tiles` tiles have, by bilinear sampling."""
        if self.config.max_tiles is None:
            return canvas
        height, width, _ = canvas.shape
        factor = math.sqrt(height * width / (self.config.max_tiles * self.config.vision.side**2))
        if factor <= _SHRINK_ABOVE:
            return canvas
        size = [int(height // factor), int(width // factor)]
        return interpolate(canvas.permute(2, 0, 1)[None], size, mode="bilinear")[0].permute(1, 2, 0)

    def embed(self, input_ids: Tensor, image_rows: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """input_ids int64 [T]; image_rows int64 [N] and features [N, hidden] of the placeholders -> [T, hidden]."""
        if image_rows is not None:
            # the authors' checkpoints have no row for a placeholder, whose embedding is overwritten anyway
            input_ids = input_ids.clamp(max=self.config.vocab_size - 1)
        return place_features(self.model.embed_tokens(input_ids), image_rows, features)

    def forward(self, hidden: Tensor, positions: Tensor, ctx: ForwardContext, rows: Tensor | None = None) -> Tensor:
        """hidden [T, hidden], positions int64 [T] -> [T, hidden], normalised; with rows int64 [S], those alone."""
        return self.model(hidden, positions, ctx, rows)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> [S, vocab]."""
        head = self.model.embed_tokens.logits if self.lm_head is None else self.lm_head
        return head(hidden)
