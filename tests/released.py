"""Checkpoint folders with the configuration of the releases and no weights, for `--load-format dummy` and for shapes.

    released.write("qwen2-vl-7b", folder)

The tokenizers know bytes and the releases' special tokens under their ids; every other id is a word that nobody says.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
CLIP_L = {
    "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
    "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
}  # fmt: skip
SIGLIP = {
    "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304, "model_type": "siglip_vision_model",
    "num_attention_heads": 16, "num_hidden_layers": 26, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
# Short text configs mean transformers' defaults.
VICUNA = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
MISTRAL = {
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral", "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32064,
}  # fmt: skip
LLAMA_3 = {
    "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "llama", "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "vocab_size": 128320,
}  # fmt: skip
QWEN2 = {
    "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 32768, "model_type": "qwen2",
    "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rope_theta": 1000000.0,
    "vocab_size": 152128, "tie_word_embeddings": False,
}  # fmt: skip
QWEN_SPECIALS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> "
    "<|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
LLAMA_SPECIALS = {
    "<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|finetune_right_pad_id|>": 128004,
    "<|start_header_id|>": 128006, "<|end_header_id|>": 128007, "<|eom_id|>": 128008, "<|eot_id|>": 128009,
    "<|python_tag|>": 128010,
}  # fmt: skip


class Release(NamedTuple):
    """config, preprocessor: contents of the two files. specials: ids of tokens; all smaller ids are bytes or unused words."""

    config: dict[str, Any]
    preprocessor: dict[str, Any]
    specials: dict[str, int]
    bos: str | None
    eos: str


def _qwen_vl(architecture: str, vision: dict[str, Any], **text: Any) -> Release:
    config = {
        "architectures": [architecture], "model_type": "qwen2_vl" if "2_5" not in architecture else "qwen2_5_vl",
        "hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "sliding_window": 32768,
        "use_sliding_window": False, "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
        "vision_end_token_id": 151653, "vision_token_id": 151654, "torch_dtype": "bfloat16", **text,
        "vision_config": {"in_chans": 3, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
                          "temporal_patch_size": 2, **vision},
    }  # fmt: skip
    preprocessor = {
        "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "image_processor_type": "Qwen2VLImageProcessor",
    }  # fmt: skip
    return Release(config, preprocessor, _qwen_specials(), None, "<|im_end|>")


def _qwen_specials(*more: str) -> dict[str, int]:
    return {token: 151643 + i for i, token in enumerate((*QWEN_SPECIALS[:3], *more) if more else QWEN_SPECIALS)}


_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
       "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False}  # fmt: skip
_2B = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
       "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}  # fmt: skip


def _qwen2_vl(text: dict[str, Any]) -> Release:
    vision = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "hidden_size": text["hidden_size"]}
    return _qwen_vl("Qwen2VLForConditionalGeneration", vision, **text)


def _qwen2_5_vl(text: dict[str, Any]) -> Release:
    vision = {
        "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "out_hidden_size": text["hidden_size"], "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
    }  # fmt: skip
    return _qwen_vl("Qwen2_5_VLForConditionalGeneration", vision, **text | {"max_position_embeddings": 128000})


def _llama_3_2() -> Release:
    text = {
        "model_type": "mllama_text_model", "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 40,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
        "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    }  # fmt: skip
    vision = {
        "model_type": "mllama_vision_model", "hidden_size": 1280, "num_hidden_layers": 32, "num_global_layers": 8,
        "attention_heads": 16, "intermediate_size": 5120, "vision_output_dim": 7680, "image_size": 560, "patch_size": 14,
        "max_num_tiles": 4, "intermediate_layers_indices": [3, 7, 15, 23, 30],
        "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
    }  # fmt: skip
    config = {
        "architectures": ["MllamaForConditionalGeneration"], "model_type": "mllama", "image_token_index": 128256,
        "text_config": text, "vision_config": vision, "torch_dtype": "bfloat16",
    }  # fmt: skip
    preprocessor = {
        "do_pad": True, "do_resize": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "max_image_tiles": 4,
        "resample": 2, "size": {"height": 560, "width": 560}, "image_processor_type": "MllamaImageProcessor",
    }  # fmt: skip
    specials = {**LLAMA_SPECIALS, "<|image|>": 128256}
    return Release(config, preprocessor, specials, "<|begin_of_text|>", "<|eot_id|>")


_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_OV_PINPOINTS = [[384 * a, 384 * b] for a in range(1, 7) for b in range(1, 7)]
_CLIP_FILE = {
    "crop_size": {"height": 336, "width": 336}, "do_center_crop": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
    "size": {"shortest_edge": 336},
}  # fmt: skip
_SENTENCE_PIECE = {"<s>": 1, "</s>": 2}


def _llava(family: str, text: dict[str, Any], vision: dict[str, Any], image_token_id: int, **more: Any) -> Release:
    config = {
        "architectures": [f"{family}ForConditionalGeneration"], "text_config": text, "vision_config": vision,
        "model_type": {"Llava": "llava", "LlavaNext": "llava_next", "LlavaOnevision": "llava_onevision"}[family],
        "image_token_index": image_token_id, "torch_dtype": "bfloat16", **more,
    }  # fmt: skip
    if family == "LlavaOnevision":
        file: dict[str, Any] = {
            "do_pad": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 384, "width": 384},
            "image_grid_pinpoints": _OV_PINPOINTS,
        }  # fmt: skip
        return Release(config, file, _qwen_specials("<image>", "<video>"), None, "<|im_end|>")
    file = {**_CLIP_FILE, **({"image_grid_pinpoints": _PINPOINTS} if family == "LlavaNext" else {})}
    if image_token_id > 100_000:
        specials = {**LLAMA_SPECIALS, "<image>": image_token_id}
        return Release(config, file, specials, "<|begin_of_text|>", "<|eot_id|>")
    return Release(config, file, {**_SENTENCE_PIECE, "<image>": image_token_id}, "<s>", "</s>")


def _authors(architecture: str, text: dict[str, Any], tower: str, aspect: str, **more: Any) -> Release:
    config = {
        "architectures": [architecture], "model_type": "llava", "torch_dtype": "bfloat16", **text,
        "mm_vision_tower": tower, "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": False, "image_aspect_ratio": aspect, **more,
    }  # fmt: skip
    if "Qwen" in architecture:
        return Release(config, {}, _qwen_specials(), None, "<|im_end|>")
    return Release(config, {}, _SENTENCE_PIECE, "<s>", "</s>")


_VICUNA_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32000,
}  # fmt: skip

RELEASES: dict[str, Release] = {
    "qwen2-vl-2b": _qwen2_vl(_2B),
    "qwen2-vl-7b": _qwen2_vl(_7B),
    "qwen2.5-vl-7b": _qwen2_5_vl(_7B),
    "llama-3.2-11b-vision": _llama_3_2(),
    "llava-1.5-7b": _llava("Llava", VICUNA, CLIP_L, 32000),
    "llava-next-vicuna-7b": _llava("LlavaNext", VICUNA, CLIP_L, 32000, image_grid_pinpoints=_PINPOINTS),
    "llava-next-mistral-7b": _llava("LlavaNext", MISTRAL, CLIP_L, 32000, image_grid_pinpoints=_PINPOINTS),
    "llava-next-llama3-8b": _llava("LlavaNext", LLAMA_3, CLIP_L, 128256, image_grid_pinpoints=_PINPOINTS),
    "llava-onevision-7b": _llava(
        "LlavaOnevision", QWEN2, SIGLIP, 151646, image_grid_pinpoints=_OV_PINPOINTS,
        vision_feature_layer=-1, vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_9",
    ),
    "llava-1.5-7b, authors'": _authors(
        "LlavaLlamaForCausalLM", _VICUNA_7B, "openai/clip-vit-large-patch14-336", "pad"
    ),
    "llava-onevision-7b, authors'": _authors(
        "LlavaQwenForCausalLM", {**_7B, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0},
        "google/siglip-so400m-patch14-384", "anyres_max_9", mm_patch_merge_type="spatial_unpad",
        image_grid_pinpoints=_OV_PINPOINTS,
    ),
}  # fmt: skip


def write(kind: str, folder: Path) -> None:
    """The release's config.json, preprocessor_config.json, generation_config.json and a tokenizer."""
    release = RELEASES[kind]
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "config.json": release.config,
        "preprocessor_config.json": release.preprocessor,
        "generation_config.json": {"eos_token_id": release.specials[release.eos]},
        "tokenizer_config.json": {"bos_token": release.bos, "eos_token": release.eos},
    }
    for name, content in files.items():
        if content:
            (folder / name).write_text(json.dumps(content))
    (folder / "tokenizer.json").write_text(_tokenizer(tuple(release.specials.items())))


@functools.cache
def _tokenizer(tokens: tuple[tuple[str, int], ...]) -> str:
    """A tokenizer.json with these special tokens. Many releases share one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    specials = dict(tokens)
    taken = set(specials.values())
    words = iter([*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"word{i}" for i in range(max(taken)))])
    vocab = {next(words): i for i in range(max(taken)) if i not in taken}
    tokenizer = Tokenizer(models.BPE(vocab={**vocab, **specials}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    assert all(tokenizer.token_to_id(token) == i for token, i in specials.items())
    return tokenizer.to_str()
