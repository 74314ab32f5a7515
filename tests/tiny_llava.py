"""Tiny random checkpoints in the shape of the LLaVA family and of plain decoders; see `tests.tiny` for what makes them hard.

    model_dir = tiny_llava.llava("next", text="mistral", names="v5")
    model_dir = tiny_llava.llava("onevision", layout="original", tower="beside")
    model_dir = tiny_llava.text("llama", tied=True)

layout="original" writes the same weights as the authors do (`LlavaLlamaForCausalLM` and its like): the decoder's keys at the
top of config.json, other names, no `<image>` in the tokenizer; with tower="beside" the tower is a folder of its own.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tests import tiny

# id of the placeholder: an added token in transformers' layout, one beyond the vocabulary in the authors'
IMAGE, ORIGINAL_IMAGE = tiny.IMAGE_PAD, tiny.VOCAB_SIZE
PATCH = 14
# 4 x 4 patches in each; SigLIP's releases too have pixels beyond the last whole patch
CLIP_SIZE, SIGLIP_SIZE = 56, 60
ARCHITECTURES = {
    "llava": "LlavaForConditionalGeneration",
    "next": "LlavaNextForConditionalGeneration",
    "onevision": "LlavaOnevisionForConditionalGeneration",
}
TEXT_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
CHAT_TEMPLATE = tiny.CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>")


def llava(
    kind: str = "next",
    *,
    text: str = "llama",
    names: str = "2024",
    config: str = "v5",
    layout: str = "hf",
    tower: str = "inside",
    tied: bool = False,
    pad: bool = False,
    seed: int = 0,
    wide: bool = False,
) -> Path:
    """kind: a key of ARCHITECTURES. config: "2024" writes the rotary base and the type as files of that year. pad: LLaVA 1.5
    pads pictures to squares instead of cropping them. wide: heads of 128, and of 64 (CLIP) or 72 (SigLIP) in the tower,
    in bfloat16."""
    options = {**locals(), "source": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}

    def make(folder: Path) -> None:
        _make_llava(folder, kind, text, names, config, layout, tower, tied, pad, seed, wide)

    return tiny._cached("llava", options, make)


def text(
    kind: str = "llama", *, tied: bool = False, wide: bool = False, overrides: dict[str, Any] | None = None
) -> Path:
    """A plain decoder of TEXT_CLASSES."""
    options = {**locals(), "source": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}

    def make(folder: Path) -> None:
        import torch
        import transformers

        name = TEXT_CLASSES[kind]
        config = getattr(transformers, f"{name}Config")(**text_config(kind, wide), tie_word_embeddings=tied)
        for key, value in (overrides or {}).items():
            setattr(config, key, value)
        config.dtype = "bfloat16" if wide else "float32"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
            _rescale(model, model.model)
        model.to(torch.bfloat16 if wide else torch.float32).save_pretrained(folder)
        tiny._write_tokenizer(folder)

    return tiny._cached("text", options, make)


def text_config(kind: str, wide: bool = False) -> dict[str, Any]:
    """Fields of the decoder."""
    fields: dict[str, Any] = {
        "vocab_size": tiny.VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": tiny.END_OF_TEXT,
        "eos_token_id": tiny.IM_END,
        "pad_token_id": tiny.END_OF_TEXT,
        # a small theta, so that every frequency counts
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        **(tiny.WIDE_HEADS if wide else {}),
    }
    return fields | {"sliding_window": None} if kind == "mistral" else fields


def vision_config(kind: str, wide: bool = False) -> dict[str, Any]:
    """Fields of the tower: the features are those behind two layers in all kinds."""
    clip = kind != "onevision"
    return {
        "model_type": "clip_vision_model" if clip else "siglip_vision_model",
        "hidden_size": (128 if clip else 144) if wide else 48,
        "intermediate_size": 80,
        "num_attention_heads": 2 if wide else 3,
        "num_hidden_layers": 3 if clip else 2,
        "image_size": CLIP_SIZE if clip else SIGLIP_SIZE,
        "patch_size": PATCH,
        "hidden_act": "quick_gelu" if clip else "gelu_pytorch_tanh",
        **({} if clip else {"vision_use_head": False}),
    }


def pinpoints(kind: str) -> list[list[int]]:
    """(height, width) of the canvases, in the order of the releases."""
    if kind == "next":
        return [[CLIP_SIZE * h, CLIP_SIZE * w] for h, w in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    return [[SIGLIP_SIZE * h, SIGLIP_SIZE * w] for h in range(1, 7) for w in range(1, 7)]


def _rescale(model: Any, text: Any) -> None:
    """As `tiny._rescale`."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                sharp = 2.0 if ".q_proj." in name or ".k_proj." in name else 1.0
                parameter.normal_(0.0, sharp * parameter[0].numel() ** -0.5)
            elif "norm" in name:
                parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.2)
            else:
                parameter.normal_(0.0, 0.3)
        text.embed_tokens.weight.normal_(0.0, 2.5 * text.embed_tokens.weight.shape[1] ** -0.5)
        if model.lm_head.weight is not text.embed_tokens.weight:
            model.lm_head.weight.mul_(2.5)


def _make_llava(
    folder: Path,
    kind: str,
    text: str,
    names: str,
    config: str,
    layout: str,
    tower: str,
    tied: bool,
    pad: bool,
    seed: int,
    wide: bool,
) -> None:
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    extra: dict[str, Any] = {}
    if kind != "llava":
        extra["image_grid_pinpoints"] = pinpoints(kind)
    architecture = ARCHITECTURES[kind]
    hf_config = getattr(transformers, architecture.replace("ForConditionalGeneration", "Config"))(
        text_config={"model_type": text, **text_config(text, wide), "tie_word_embeddings": tied},
        vision_config=vision_config(kind, wide),
        image_token_index=IMAGE,
        **extra,
    )
    hf_config.dtype = "bfloat16" if wide else "float32"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, architecture)(hf_config).eval()
        _rescale(model, model.model.language_model)
    model.generation_config._from_model_config = False
    model.generation_config.update(eos_token_id=[tiny.IM_END, tiny.END_OF_TEXT], pad_token_id=tiny.END_OF_TEXT)
    model.to(torch.bfloat16 if wide else torch.float32).save_pretrained(folder)
    # transformers 5 writes the names of 2024, but for this part of them
    tensors = {
        name if "vision_model." in name else name.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    (folder / "model.safetensors").unlink()
    tiny._write_json(folder / "preprocessor_config.json", preprocessor_config(kind, pad))
    if config == "2024":
        _write_2024_config(folder, text)
    if layout == "original":
        tensors = _to_original(folder, tensors, kind, text, tower, tied, pad, wide)
    elif names == "v5":
        tensors = {_v5_name(name): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tiny._write_tokenizer(folder)
    _name_placeholder(folder, "<image>" if layout == "hf" else "<|unused|>")


def preprocessor_config(kind: str, pad: bool) -> dict[str, Any]:
    """As the releases have it."""
    if kind == "onevision":
        return {
            "do_pad": True,
            "image_grid_pinpoints": pinpoints(kind),
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": {"height": SIGLIP_SIZE, "width": SIGLIP_SIZE},
        }
    file: dict[str, Any] = {
        "crop_size": {"height": CLIP_SIZE, "width": CLIP_SIZE},
        "do_center_crop": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "size": {"shortest_edge": CLIP_SIZE},
    }
    if kind == "next":
        return {**file, "image_grid_pinpoints": pinpoints(kind), "image_processor_type": "LlavaNextImageProcessor"}
    return {**file, "do_pad": pad, "image_processor_type": "LlavaImageProcessor"}


def _write_2024_config(folder: Path, text: str) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    part = config["text_config"]
    part["rope_theta"] = part.pop("rope_parameters")["rope_theta"]
    part.pop("dtype", None)
    config["torch_dtype"] = config.pop("dtype", "float32")
    config.setdefault("image_token_index", config.pop("image_token_id", IMAGE))
    tiny._write_json(path, config)


def _v5_name(name: str) -> str:
    """From the names of 2024."""
    for old, new in (
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.vision_model.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
        ("image_newline", "model.image_newline"),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise ValueError(name)


def _to_original(
    folder: Path, tensors: dict[str, Any], kind: str, text: str, tower: str, tied: bool, pad: bool, wide: bool
) -> dict[str, Any]:
    """Rewrite config.json, drop preprocessor_config.json; returns the tensors under the authors' names."""
    from safetensors.torch import save_file

    (folder / "preprocessor_config.json").unlink()
    fields = text_config(text, wide)
    theta = fields.pop("rope_parameters")["rope_theta"]
    vision = vision_config(kind, wide)
    name = "clip-tiny" if kind != "onevision" else "siglip-tiny"
    aspect = {"llava": "pad" if pad else None, "next": "anyres", "onevision": "anyres_max_9"}[kind]
    points: Any = [[w, h] for h, w in pinpoints("next")] if kind == "next" else "(1x1),...,(6x6)"
    tiny._write_json(
        folder / "config.json",
        {
            "architectures": [
                {"llama": "LlavaLlama", "mistral": "LlavaMistral", "qwen2": "LlavaQwen"}[text] + "ForCausalLM"
            ],
            "model_type": "llava",
            **fields,
            "rope_theta": theta,
            "tie_word_embeddings": tied,
            "torch_dtype": "float32",
            "mm_vision_tower": f"somebody/{name}",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_projector_type": "mlp2x_gelu",
            "mm_patch_merge_type": "flat" if kind == "llava" else "spatial_unpad",
            "mm_use_im_start_end": False,
            "mm_hidden_size": vision["hidden_size"],
            "image_aspect_ratio": aspect,
            **({} if kind == "llava" else {"image_grid_pinpoints": points}),
        },
    )
    beside = folder / name
    beside.mkdir()
    # the release's tower has the layer that LLaVA leaves out
    vision["num_hidden_layers"] = 3
    tiny._write_json(beside / "config.json", {"model_type": name.partition("-")[0], "vision_config": vision})
    renamed, towers = {}, {}
    for old, tensor in tensors.items():
        if old.startswith("vision_tower."):
            towers[old.removeprefix("vision_tower.")] = tensor
        else:
            new = old.replace("language_model.model.", "model.").replace("language_model.lm_head.", "lm_head.")
            new = new.replace("multi_modal_projector.linear_1.", "model.mm_projector.0.")
            new = new.replace("multi_modal_projector.linear_2.", "model.mm_projector.2.")
            renamed["model.image_newline" if new == "image_newline" else new] = tensor
    if tower == "beside":
        text_half = next(iter(towers.values())).clone()
        save_file({**towers, "text_model.final_layer_norm.weight": text_half}, beside / "model.safetensors")
    else:
        renamed |= {f"model.vision_tower.vision_tower.{n}": tensor for n, tensor in towers.items()}
    return renamed


def _name_placeholder(folder: Path, placeholder: str) -> None:
    """The token that is `<|image_pad|>` in `tiny` gets another name; without `<image>` there is no chat template either."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / name
        path.write_text(path.read_text().replace("<|image_pad|>", placeholder))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.json").unlink()
    config.pop("chat_template")
    if placeholder == "<image>":
        config["chat_template"] = CHAT_TEMPLATE
    tiny._write_json(folder / "tokenizer_config.json", config)
