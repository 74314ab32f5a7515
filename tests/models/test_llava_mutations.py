"""Mistakes in the LLaVA family, applied to our side one by one: the equality with transformers must break."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from sightline.models import Encoding, llava, vit
from sightline.prompt.llava import LlavaProcessor
from sightline.types import View
from tests import llava_oracle, tiny_llava
from tests.models.harness import load
from tests.models.test_llava import KINDS, TOLERANCE, difference, prompt, run


def _mutant(model: Any, **changes: Any) -> Any:
    """The model again with other settings and the same weights."""
    vision = {k: v for k, v in changes.items() if hasattr(model.config.vision, k)}
    top = {k: v for k, v in changes.items() if k not in vision}
    config = dataclasses.replace(model.config, **top, vision=dataclasses.replace(model.config.vision, **vision))
    mutant = llava.LlavaForConditionalGeneration(config).eval()
    mutant.load_state_dict(model.state_dict(), strict=False)
    return mutant


CONFIG_MUTATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "gelu for quick_gelu": ("LLaVA 1.5", {"hidden_act": "gelu"}),
    "mean of SigLIP": ("LLaVA 1.5", {"image_mean": (0.5, 0.5, 0.5)}),
    "deviation of SigLIP": ("NeXT, Llama", {"image_std": (0.5, 0.5, 0.5)}),
    "a layer too few": ("NeXT, Llama", {"num_layers": 1}),
    "eps of the tower": ("LLaVA 1.5", {"layer_norm_eps": 1e-2}),
    "gelu for tanh gelu": ("OneVision", {"hidden_act": "quick_gelu"}),
    "mean of CLIP": ("OneVision", {"image_mean": (0.48145466, 0.4578275, 0.40821073)}),
    "no bound on the map": ("OneVision", {"max_tiles": None}),
    "another bound on the map": ("OneVision", {"max_tiles": 4}),
    "no rescaling": ("OneVision", {"rescale_factor": 1.0}),
}


def _pack_with(change: Callable[[Any, Tensor, Any], tuple[Tensor, Any]]) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        original = llava.LlavaForConditionalGeneration._pack

        def pack(self: Any, features: Tensor, grid: Any) -> Tensor:
            return original(self, *change(self, features, grid))

        monkeypatch.setattr(llava.LlavaForConditionalGeneration, "_pack", pack)

    return apply


def _columns_first(self: Any, features: Tensor, grid: Any) -> tuple[Tensor, Any]:
    rows = max(grid[0], 1)
    tiles = features[1:].unflatten(0, (rows, -1)).transpose(0, 1).flatten(0, 1) if grid[0] else features[1:]
    return torch.cat((features[:1], tiles)), grid


def _square_last(self: Any, features: Tensor, grid: Any) -> tuple[Tensor, Any]:
    return features.roll(-1, 0), grid


def _transposed_tiles(self: Any, features: Tensor, grid: Any) -> tuple[Tensor, Any]:
    side = self.config.vision.side
    return features.unflatten(1, (side, side)).transpose(1, 2).flatten(1, 2), grid


def _newline_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    original = llava.LlavaForConditionalGeneration._pack

    def pack(self: Any, features: Tensor, grid: Any) -> Tensor:
        newline = self.image_newline.data.clone()
        self.image_newline.data.zero_()
        packed = original(self, features, grid)
        self.image_newline.data.copy_(newline)
        return packed

    monkeypatch.setattr(llava.LlavaForConditionalGeneration, "_pack", pack)


def _nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llava, "interpolate", lambda x, size, mode: interpolate(x, size, mode="nearest"))


def _antialias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llava, "interpolate", lambda x, size, mode: interpolate(x, size, mode=mode, antialias=True))


def _aligned_corners(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llava, "interpolate", lambda x, size, mode: interpolate(x, size, mode=mode, align_corners=True))


def _no_first_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(self: Any, tiles: Tensor) -> Encoding[Tensor]:
        return (yield from self.encoder(self.embeddings(tiles)))[:, 1:]

    monkeypatch.setattr(vit.VisionTower, "_encode", encode)


def _class_token_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(self: Any, tiles: Tensor) -> Encoding[Tensor]:
        return (yield from self.encoder(self.pre_layrnorm(self.embeddings(tiles))))[:, :-1]

    monkeypatch.setattr(vit.VisionTower, "_encode", encode)


def _channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    original = vit.PatchKernel.forward

    def forward(self: Any, tiles: Tensor) -> Tensor:
        return original(self, tiles.flip(-1))

    monkeypatch.setattr(vit.PatchKernel, "forward", forward)


def _bilinear_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    original = LlavaProcessor.__init__

    def init(self: Any, model_dir: Path) -> None:
        original(self, model_dir)
        self._resample = Image.Resampling.BILINEAR

    monkeypatch.setattr(LlavaProcessor, "__init__", init)


def _corner_of_the_canvas(monkeypatch: pytest.MonkeyPatch) -> None:
    original = LlavaProcessor.views

    def views(self: Any, *args: Any) -> tuple[View, ...]:
        return tuple(msgspec.structs.replace(view, at=(0, 0)) for view in original(self, *args))

    monkeypatch.setattr(LlavaProcessor, "views", views)


def _crop_for_pad(monkeypatch: pytest.MonkeyPatch) -> None:
    original = LlavaProcessor.__init__

    def init(self: Any, model_dir: Path) -> None:
        original(self, model_dir)
        self.square = "crop" if self.square == "pad" else "pad"

    monkeypatch.setattr(LlavaProcessor, "__init__", init)


def _reversed_features(monkeypatch: pytest.MonkeyPatch) -> None:
    original = llava.LlavaForConditionalGeneration.encode_images

    def encode(self: Any, pixels: Any, grids: Any) -> list[Tensor]:
        return original(self, pixels[::-1], grids[::-1])

    monkeypatch.setattr(llava.LlavaForConditionalGeneration, "encode_images", encode)


# Family, prompt, mistake.
CODE_MUTATIONS: dict[str, tuple[str, str, Callable[[pytest.MonkeyPatch], None]]] = {
    "tiles column by column": ("NeXT, Mistral", "one large", _pack_with(_columns_first)),
    "the square view last": ("NeXT, Mistral", "one", _pack_with(_square_last)),
    "rows and columns of features": ("NeXT, Llama", "one", _pack_with(_transposed_tiles)),
    "a newline of zeros": ("NeXT, Llama", "one", _newline_of_zeros),
    "the picture in the canvas's corner": ("NeXT, Llama", "one", _corner_of_the_canvas),
    "bilinear pixels": ("NeXT, Llama", "one", _bilinear_pixels),
    "no norm before the first layer": ("LLaVA 1.5", "one", _no_first_norm),
    "the class token kept": ("LLaVA 1.5", "one", _class_token_kept),
    "BGR": ("LLaVA 1.5", "one", _channels_last),
    "padded, not cropped": ("LLaVA 1.5", "one", _crop_for_pad),
    "cropped, not padded": ("LLaVA 1.5, padded", "one", _crop_for_pad),
    "pictures in reverse order": ("LLaVA 1.5", "interleaved", _reversed_features),
    "nearest for bilinear": ("OneVision", "one large", _nearest),
    "antialias": ("OneVision", "one large", _antialias),
    "aligned corners": ("OneVision", "one large", _aligned_corners),
    "OneVision's newline of zeros": ("OneVision", "two", _newline_of_zeros),
    "OneVision's tiles column by column": ("OneVision", "one large", _pack_with(_columns_first)),
    "OneVision's pictures in reverse order": ("OneVision", "interleaved", _reversed_features),
}


@pytest.mark.parametrize("mutation", CONFIG_MUTATIONS)
def test_settings_matter(mutation: str) -> None:
    kind, changes = CONFIG_MUTATIONS[mutation]
    model_dir = tiny_llava.llava(**KINDS[kind])
    mutant = _mutant(load(model_dir), **changes)
    try:
        found = difference(mutant, model_dir, "one large" if "max_tiles" in changes else "one")
    except IndexError:
        found = float("inf")  # fewer features than placeholders
    assert found > 5 * TOLERANCE


@pytest.mark.parametrize("mutation", CODE_MUTATIONS)
def test_mistakes_show(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, name, mistake = CODE_MUTATIONS[mutation]
    model_dir = tiny_llava.llava(**KINDS[kind])
    model = load(model_dir)
    _, ids = run(model, model_dir, name)
    expected = llava_oracle.logprobs(model_dir, ids, prompt(name)[1])
    mistake(monkeypatch)
    got, _ = run(model, model_dir, name)
    assert (got - expected).abs().max() > 5 * TOLERANCE
