"""Tiny random checkpoints in the shape of the real families: complete folders, quick on a CPU, and hard on bugs.

Random weights as libraries initialise them hide mistakes: attention is flat and every token alike. These are scaled so
that positions, pictures and each nonlinearity move the answer; `tests/models` proves it by mutations.

    model_dir = tiny.qwen2_vl()                      # cached between runs in .pytest_cache
    model_dir = tiny.qwen2_vl(tied=True, names="v5", config="2024", shards=3)
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".pytest_cache" / "tiny"

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
NUM_TEXT_TOKENS = 320
IDS = {token: NUM_TEXT_TOKENS + i for i, token in enumerate(SPECIAL_TOKENS)}
IMAGE_PAD, VISION_START, VISION_END = IDS["<|image_pad|>"], IDS["<|vision_start|>"], IDS["<|vision_end|>"]
IM_START, IM_END, END_OF_TEXT = IDS["<|im_start|>"], IDS["<|im_end|>"], IDS["<|endoftext|>"]
# As in the releases, the embedding has rows that no token uses.
VOCAB_SIZE = 352
# Fields of a decoder whose heads are as wide as the releases' (128): what fast kernels are made for. Such checkpoints are
# stored in bfloat16, as the releases are, so that float32 arithmetic on them is the truth for bfloat16.
WIDE_HEADS = {"hidden_size": 256, "intermediate_size": 352, "num_attention_heads": 2, "num_key_value_heads": 1}

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}{{- part.text -}}{%- else -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

_TEXT_FOR_MERGES = """What is in this picture? The picture shows a red circle, a blue square and a green triangle.
Describe the image in one sentence. How many shapes are there? There are two of them on the left side of the image.
"""


def qwen2_vl(
    *,
    tied: bool = False,
    names: str = "2024",
    config: str = "v5",
    shards: int = 1,
    dtype: str = "float32",
    max_pixels: int = 28 * 28 * 64,
    seed: int = 0,
    wide: bool = False,
    overrides: dict[str, Any] | None = None,
) -> Path:
    """A folder like Qwen2-VL-Instruct's, of 0.3 M parameters.

    names: tensor names of "2024" or "v5". config: config.json's layout, "2024" (flat) or "v5" (nested). shards: number of
    safetensors files. wide: heads of 128, and of 80 in the tower, in
    bfloat16. overrides: text-config fields, e.g. {"num_hidden_layers": 1}.
    """
    options = dict(locals())

    def make(folder: Path) -> None:
        _make_qwen2_vl(folder, **options)

    return _cached("qwen2_vl", options, make)


def _cached(kind: str, options: dict[str, Any], make: Callable[[Path], None]) -> Path:
    """Make once for each set of options and version of this file; safe when several processes make the same."""
    key = hashlib.sha256(Path(__file__).read_bytes() + json.dumps(options, sort_keys=True).encode()).hexdigest()[:16]
    folder = CACHE / f"{kind}-{key}"
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{kind}-", dir=CACHE))
        try:
            make(work)
            os.rename(work, folder)
        except OSError:
            if not folder.exists():
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def _make_qwen2_vl(
    folder: Path,
    *,
    tied: bool,
    names: str,
    config: str,
    shards: int,
    dtype: str,
    max_pixels: int,
    seed: int,
    wide: bool,
    overrides: dict[str, Any] | None,
) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": IM_END,
        "pad_token_id": END_OF_TEXT,
        **(WIDE_HEADS if wide else {}),
        **(overrides or {}),
    }
    # sections of unequal width and a small theta, so that every axis and frequency counts
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [16, 24, 24] if wide else [2, 3, 3]}
    vision = {
        "depth": 2,
        "embed_dim": 160 if wide else 48,
        "num_heads": 2 if wide else 3,
        "hidden_size": text["hidden_size"],
        "mlp_ratio": 2,
        "hidden_act": "quick_gelu",
    }
    hf_config = Qwen2VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE_PAD,
        video_token_id=IDS["<|video_pad|>"],
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
    )
    dtype = "bfloat16" if wide else dtype
    hf_config.dtype = dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(hf_config).eval()
        _rescale(model)
    model.generation_config._from_model_config = False
    model.generation_config.update(
        bos_token_id=END_OF_TEXT, eos_token_id=[IM_END, END_OF_TEXT], pad_token_id=END_OF_TEXT, do_sample=True,
        temperature=1.0, top_p=1.0, top_k=50,
    )  # fmt: skip
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    if config == "2024":
        _write_json(folder / "config.json", _flat_config(text, rope, vision, tied, dtype))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    if names == "v5":
        tensors = {_v5_name(name): tensor for name, tensor in tensors.items()}
    _save_shards(folder, tensors, shards, save_file)
    _write_json(folder / "preprocessor_config.json", _preprocessor_config(max_pixels))
    _write_tokenizer(folder)


def _rescale(model: Any) -> None:
    """Matrices of deviation 1 / sqrt(fan in), sharper attention, norms and biases away from 1 and 0."""
    import torch

    text = model.model.language_model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                fan_in = parameter[0].numel()
                sharp = 2.0 if ".q_proj." in name or ".k_proj." in name or ".qkv." in name else 1.0
                parameter.normal_(0.0, sharp * fan_in**-0.5)
            elif "norm" in name or ".ln_q." in name:
                parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.2)
            else:
                parameter.normal_(0.0, 0.3)
        text.embed_tokens.weight.normal_(0.0, 2.5 * text.embed_tokens.weight.shape[1] ** -0.5)
        if model.lm_head.weight is not text.embed_tokens.weight:
            model.lm_head.weight.mul_(2.5)


def _flat_config(
    text: dict[str, Any], rope: dict[str, Any], vision: dict[str, Any], tied: bool, dtype: str
) -> dict[str, Any]:
    """config.json as the releases of 2024 have it."""
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": "qwen2_vl",
        **text,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "sliding_window": 32768,
        "use_sliding_window": False,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "transformers_version": "4.41.2",
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "image_token_id": IMAGE_PAD,
        "video_token_id": IDS["<|video_pad|>"],
        "vision_config": {
            **{key: value for key, value in vision.items() if key != "hidden_act"},
            "in_chans": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
    }


def _v5_name(name: str) -> str:
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def _save_shards(folder: Path, tensors: dict[str, Any], shards: int, save_file: Callable[..., None]) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        weight_map.update(dict.fromkeys(part, file))
        save_file(part, folder / file, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _preprocessor_config(max_pixels: int) -> dict[str, Any]:
    return {
        "min_pixels": 56 * 56,
        "max_pixels": max_pixels,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }


def _write_tokenizer(folder: Path) -> None:
    """Byte-level BPE with a few merges; ids of special tokens follow in the order of the releases."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TEXT_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([_TEXT_FOR_MERGES] * 2, trainer)
    assert tokenizer.get_vocab_size() == NUM_TEXT_TOKENS, tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    assert all(tokenizer.token_to_id(token) == i for token, i in IDS.items())
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        str(i): {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        for token, i in IDS.items()
    }  # fmt: skip
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": added,
            "additional_special_tokens": SPECIAL_TOKENS[1:],
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 4096,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    _write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
