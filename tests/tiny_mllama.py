"""Tiny random checkpoints in the shape of Llama-3.2-Vision-Instruct; see `tests.tiny` for what makes them hard on bugs.

    model_dir = tiny_mllama.mllama()
    model_dir = tiny_mllama.mllama(names="v5", config="2024", empty_tiles="random", shards=3)

The vision tower's tables have zero rows for slots that an aspect ratio does not fill, as in the releases;
empty_tiles="random" gives them values, which the exact shortcut of the tower must notice.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tests import tiny

TILE_SIZE = 56
# (56 / 14)^2 patches and the class token: like the release's 1601 one more than a multiple of 8, so that padding matters.
TOKENS_PER_TILE = 17
SPECIAL_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
    "<|finetune_right_pad_id|>",
    "<|image|>",
]
NUM_TEXT_TOKENS = 320
IDS = {token: NUM_TEXT_TOKENS + i for i, token in enumerate(SPECIAL_TOKENS)}
BOS, END_OF_TEXT, EOT, PAD = (
    IDS[token] for token in ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>")
)
IMAGE = IDS["<|image|>"]
# As in the releases, the picture's token is the first id that the output head lacks; the embedding has 8 rows more.
VOCAB_SIZE = IMAGE

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}{{- part.text -}}{%- else -%}{{- '<|image|>' -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""


def mllama(
    *,
    names: str = "2024",
    config: str = "v5",
    shards: int = 1,
    empty_tiles: str = "zero",
    seed: int = 0,
    wide: bool = False,
    text: dict[str, Any] | None = None,
) -> Path:
    """A folder of 0.5 M parameters.

    names: tensor names of "2024" or "v5". config: how config.json writes the rotary settings, "2024" (`rope_scaling` and
    `rope_theta`) or "v5" (`rope_parameters`). wide: heads of 128, and of 80 in the tower,
    in bfloat16. text: fields of the text config.
    """
    options = {
        "names": names, "config": config, "shards": shards, "empty_tiles": empty_tiles, "seed": seed, "wide": wide,
        "text": text,
        "source": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    }  # fmt: skip

    def make(folder: Path) -> None:
        _make(folder, names, config, shards, empty_tiles, seed, wide, text or {})

    return tiny._cached("mllama", options, make)


def _make(
    folder: Path,
    names: str,
    config: str,
    shards: int,
    empty_tiles: str,
    seed: int,
    wide: bool,
    overrides: dict[str, Any],
) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    rope = {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "cross_attention_layers": [1, 3],
        "bos_token_id": BOS,
        "eos_token_id": [END_OF_TEXT, EOT],
        "pad_token_id": PAD,
        **(tiny.WIDE_HEADS if wide else {}),
        **overrides,
    }
    width = 160 if wide else 48
    vision = {
        "hidden_size": width,
        "intermediate_size": 80,
        "attention_heads": 2 if wide else 3,
        "num_hidden_layers": 4,
        "num_global_layers": 2,
        "image_size": TILE_SIZE,
        "patch_size": 14,
        "intermediate_layers_indices": [1, 2, 3],
        "vision_output_dim": width * 4,
    }
    hf_config = MllamaConfig(
        text_config={**text, "rope_parameters": rope}, vision_config=vision, image_token_index=IMAGE
    )
    hf_config.dtype = "bfloat16" if wide else "float32"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MllamaForConditionalGeneration(hf_config).eval()
        _rescale(model, empty_tiles)
    model.generation_config._from_model_config = False
    model.generation_config.update(
        bos_token_id=BOS, eos_token_id=[END_OF_TEXT, EOT], pad_token_id=PAD, do_sample=True, temperature=0.6, top_p=0.9
    )
    model.to(torch.bfloat16 if wide else torch.float32).save_pretrained(folder)
    if config == "2024":
        _write_2024_config(folder / "config.json", rope)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    if names == "v5":
        tensors = {_v5_name(name): tensor for name, tensor in tensors.items()}
    tiny._save_shards(folder, tensors, shards, save_file)
    tiny._write_json(folder / "preprocessor_config.json", _PREPROCESSOR)
    _write_tokenizer(folder)


def _rescale(model: Any, empty_tiles: str) -> None:
    """Every matrix, gate, norm and table away from values that would hide a mistake."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name and parameter.numel() == 1:
                # both signs, and different for each
                parameter.uniform_(0.5, 1.2).mul_(1.0 if parameter.item() < 0.9 else -1.0)
            elif "positional_embedding" in name or "class_embedding" in name:
                parameter.normal_(0.0, 0.7)
            elif parameter.ndim >= 2:
                sharp = 2.0 if ".q_proj." in name or ".k_proj." in name else 1.0
                parameter.normal_(0.0, sharp * parameter[0].numel() ** -0.5)
            elif "norm" in name:
                parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.2)
            else:
                parameter.normal_(0.0, 0.3)
        embedding = model.model.language_model.embed_tokens.weight
        embedding.normal_(0.0, 2.5 * embedding.shape[1] ** -0.5)
        model.lm_head.weight.mul_(2.5)
        if empty_tiles == "zero":
            _clear_empty_tiles(model)


def _clear_empty_tiles(model: Any) -> None:
    vision = model.model.vision_model
    tables = (
        vision.pre_tile_positional_embedding.embedding.weight,
        vision.post_tile_positional_embedding.embedding.weight,
        vision.gated_positional_embedding.tile_embedding.weight,
    )
    for table in tables:
        for i, (rows, columns) in enumerate(vision.config.supported_aspect_ratios):
            table.view(table.shape[0], vision.config.max_num_tiles, -1)[i + 1, rows * columns :] = 0.0


def _write_2024_config(path: Path, rope: dict[str, Any]) -> None:
    config = json.loads(path.read_text())
    config["torch_dtype"] = config.pop("dtype")
    text = config["text_config"]
    del text["rope_parameters"]
    text["rope_theta"] = rope["rope_theta"]
    text["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    tiny._write_json(path, config)


def _v5_name(name: str) -> str:
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    if name.startswith("language_model.model."):
        return f"model.language_model.{name.removeprefix('language_model.model.')}"
    return f"model.{name}" if name.startswith(("vision_model.", "multi_modal_projector.")) else name


_PREPROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "MllamaImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_image_tiles": 4,
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": TILE_SIZE, "width": TILE_SIZE},
}


def _write_tokenizer(folder: Path) -> None:
    """Byte-level BPE with a few merges, special tokens in the release's order."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TEXT_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([tiny._TEXT_FOR_MERGES] * 2, trainer)
    assert tokenizer.get_vocab_size() == NUM_TEXT_TOKENS, tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    assert all(tokenizer.token_to_id(token) == i for token, i in IDS.items())
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        str(i): {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        for token, i in IDS.items()
    }  # fmt: skip
    settings = {
        "added_tokens_decoder": added,
        "bos_token": "<|begin_of_text|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|eot_id|>",
        "model_max_length": 4096,
        "pad_token": "<|finetune_right_pad_id|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    tiny._write_json(folder / "tokenizer_config.json", settings)
    tiny._write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
