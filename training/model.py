"""A dense Qwen2-VL for training: the 2024 checkpoint names, static shapes, no cache.

Every batch holds pictures of one size per slot (one or two slots), so nothing is ragged: picture features are put into
the embeddings of the image tokens by their running number, and M-RoPE positions come from cumulative sums. The patch
kernel is trained folded over its two (equal) frames. `export` writes what transformers' Qwen2VL loads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
MIN_PIXELS, MAX_PIXELS = 96 * 96, 160 * 160


@dataclass(frozen=True, slots=True)
class Config:
    vocab_size: int
    image_token_id: int
    hidden: int = 192
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    intermediate: int = 512
    rope_theta: float = 100.0
    mrope_section: tuple[int, int, int] = (2, 6, 8)
    vision_dim: int = 192
    vision_depth: int = 5
    vision_heads: int = 6
    patch: int = 8
    merge: int = 2


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half of x [b, heads, n, d]; cos and sin broadcast over [.., n, d / 2]."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class VisionAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.proj(y.transpose(1, 2).reshape(b, n, d))


class VisionMlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class VisionBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, 1e-6), nn.LayerNorm(dim, 1e-6)
        self.attn, self.mlp = VisionAttention(dim, heads), VisionMlp(dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    def __init__(self, dim: int, out: int, cells: int) -> None:
        super().__init__()
        self.ln_q = nn.LayerNorm(dim, 1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim * cells, dim * cells), nn.GELU(), nn.Linear(dim * cells, out))

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        width = self.mlp[0].in_features
        return self.mlp(self.ln_q(x).view(b, n * d // width, width))


class Vision(nn.Module):
    """Pictures [b, 3, h, w] in 0..1 -> features [b, h * w / 256, hidden]."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Linear(3 * c.patch**2, c.vision_dim, bias=False)
        self.blocks = nn.ModuleList(VisionBlock(c.vision_dim, c.vision_heads) for _ in range(c.vision_depth))
        self.merger = Merger(c.vision_dim, c.hidden, c.merge**2)

    def patches(self, img: Tensor) -> Tensor:
        """[b, n, 3 * 8 * 8] in merge-block order (gh / 2, gw / 2, 2, 2)."""
        b, _, h, w = img.shape
        mean, std = (torch.tensor(v, device=img.device).view(3, 1, 1) for v in (MEAN, STD))
        p, m = self.c.patch, self.c.merge
        x = ((img - mean) / std).view(b, 3, h // p // m, m, p, w // p // m, m, p)
        return x.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(b, -1, 3 * p * p)

    def angles(self, h: int, w: int, device: torch.device) -> tuple[Tensor, Tensor]:
        p, m, half = self.c.patch, self.c.merge, self.c.vision_dim // self.c.vision_heads // 2
        y, x = torch.meshgrid(torch.arange(h // p, device=device), torch.arange(w // p, device=device), indexing="ij")
        order = [v.view(h // p // m, m, w // p // m, m).permute(0, 2, 1, 3).flatten() for v in (y, x)]
        inv = 1 / 10000 ** (torch.arange(0, half, 2, device=device).float() / half)
        angle = torch.cat([v[:, None] * inv for v in order], -1)
        return angle.cos(), angle.sin()

    def forward(self, img: Tensor) -> Tensor:
        cos, sin = self.angles(*img.shape[2:], img.device)
        x = self.patch_embed.proj(self.patches(img))
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.merger(x)


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6) * self.weight).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.heads, self.kv = c.heads, c.kv_heads
        d = c.hidden // c.heads
        self.q_proj = nn.Linear(c.hidden, c.heads * d)
        self.k_proj, self.v_proj = nn.Linear(c.hidden, c.kv_heads * d), nn.Linear(c.hidden, c.kv_heads * d)
        self.o_proj = nn.Linear(c.heads * d, c.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = (p(x).view(b, n, h, d // self.heads).transpose(1, 2)
                   for p, h in ((self.q_proj, self.heads), (self.k_proj, self.kv), (self.v_proj, self.kv)))  # fmt: skip
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(self.heads // self.kv, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(c.hidden, c.intermediate, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(c.intermediate, c.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(c.hidden), RMSNorm(c.hidden)
        self.self_attn, self.mlp = Attention(c), Mlp(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


def positions(is_image: Tensor, grids: list[tuple[int, int]]) -> Tensor:
    """M-RoPE positions [3, b, n] of ids whose image tokens are marked; grids are merged (rows, columns) per slot."""
    device = is_image.device
    rows = torch.cat([torch.arange(h, device=device).repeat_interleave(w) for h, w in grids])
    columns = torch.cat([torch.arange(w, device=device).repeat(h) for h, w in grids])
    number = is_image.long().cumsum(1)  # image tokens up to and including this one
    base = (~is_image).long().cumsum(1) - (~is_image).long()  # text tokens before this one
    end = 0
    for h, w in grids:
        end += h * w
        base = base + torch.where(is_image, number > end, number >= end) * max(h, w)
    index = (number - 1).clamp(0, len(rows) - 1)
    return torch.stack([base, base + rows[index] * is_image, base + columns[index] * is_image])


class Model(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.visual = Vision(c)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c.vocab_size, c.hidden)
        self.model.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.model.norm = RMSNorm(c.hidden)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight", "fc2.weight", "attn.proj.weight"))
                nn.init.normal_(p, std=0.02 if "embed" in name else 0.6 / p.shape[1] ** 0.5 * (0.4 if last else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, ids: Tensor, images: list[Tensor]) -> Tensor:
        """ids [b, n] and one picture batch [b, 3, h, w] per slot -> hidden states [b, n, hidden]."""
        cell = self.c.patch * self.c.merge
        grids = [(i.shape[2] // cell, i.shape[3] // cell) for i in images]
        return self.decode(ids, torch.cat([self.visual(img) for img in images], 1), grids)

    def decode(self, ids: Tensor, features: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        """The language half: features [b, tokens of all slots, hidden] and the merged grid of each slot."""
        c = self.c
        is_image = ids == c.image_token_id
        count = features.shape[1]
        spread = torch.arange(ids.shape[1], device=ids.device) % count  # text rows gather anything, without a hot spot
        index = torch.where(is_image, is_image.long().cumsum(1) - 1, spread).clamp(max=count - 1)
        found = features.gather(1, index[..., None].expand(-1, -1, c.hidden))
        x = torch.where(is_image[..., None], found, self.model.embed_tokens(ids).to(found.dtype))
        half = c.hidden // c.heads // 2
        inv = 1 / c.rope_theta ** (torch.arange(half, device=ids.device).float() / half)
        axis = torch.repeat_interleave(torch.arange(3), torch.tensor(c.mrope_section)).to(ids.device)
        angle = (positions(is_image, grids).float()[axis] * inv[:, None, None]).permute(1, 2, 0)[:, None]
        cos, sin = angle.cos(), angle.sin()
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.embed_tokens.weight.to(hidden.dtype))


def imported(folder: Path) -> dict[str, Tensor]:
    """The state of `Model` from an exported folder, in float32."""
    state = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
    name = "visual.patch_embed.proj.weight"
    state[name] = state[name].sum(2).flatten(1)
    return state


def hf_config(c: Config, ids: dict[str, int]) -> dict[str, object]:
    """config.json in the layout of the 2024 Qwen2-VL releases."""
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|image_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": c.hidden,
        "initializer_range": 0.02,
        "intermediate_size": c.intermediate,
        "max_position_embeddings": 4096,
        "max_window_layers": c.layers,
        "model_type": "qwen2_vl",
        "num_attention_heads": c.heads,
        "num_hidden_layers": c.layers,
        "num_key_value_heads": c.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": c.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(c.mrope_section)},
        "sliding_window": 4096,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": c.vocab_size,
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": c.vision_depth,
            "embed_dim": c.vision_dim,
            "mlp_ratio": 4,
            "num_heads": c.vision_heads,
            "hidden_act": "quick_gelu",
            "in_chans": 3,
            "in_channels": 3,
            "hidden_size": c.hidden,
            "patch_size": c.patch,
            "spatial_merge_size": c.merge,
            "spatial_patch_size": c.patch,
            "temporal_patch_size": 2,
        },
    }


def export(
    state: dict[str, Tensor], c: Config, ids: dict[str, int], folder: Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Weights and JSON files of a Hugging Face folder; the tokenizer is saved by tokenizer.py."""
    folder.mkdir(parents=True, exist_ok=True)
    out = {k: v.detach().to("cpu", dtype).contiguous() for k, v in state.items()}
    folded = out["visual.patch_embed.proj.weight"].view(c.vision_dim, 3, 1, c.patch, c.patch)
    out["visual.patch_embed.proj.weight"] = (folded / 2).expand(-1, -1, 2, -1, -1).contiguous()
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    files = {
        "config.json": hf_config(c, ids),
        "generation_config.json": {
            "bos_token_id": ids["<|endoftext|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "do_sample": False,
        },
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
            "min_pixels": MIN_PIXELS,
            "max_pixels": MAX_PIXELS,
            "patch_size": c.patch,
            "temporal_patch_size": 2,
            "merge_size": c.merge,
            "image_mean": list(MEAN),
            "image_std": list(STD),
        },
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
