"""Which classes serve which checkpoint: a table of strings that imports nothing.

The key is the first entry of `architectures` in the checkpoint's config.json. `model` is the class in `sightline.models`,
`processor` the class in `sightline.prompt` that owns the family's picture arithmetic (None: text only).
"""

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
    """Import paths of the form "module:Class", and the named chat template used when a checkpoint brings none."""

    name: str
    model: str
    processor: str | None
    chat_template: str


FAMILIES: dict[str, Family] = {
    "Qwen2VLForConditionalGeneration": Family(
        name="Qwen2-VL",
        model="sightline.models.qwen2_vl:Qwen2VLForConditionalGeneration",
        processor="sightline.prompt.qwen2_vl:Qwen2VLProcessor",
        chat_template="qwen2-vl",
    ),
    "Qwen2_5_VLForConditionalGeneration": Family(
        name="Qwen2.5-VL",
        model="sightline.models.qwen2_5_vl:Qwen2_5_VLForConditionalGeneration",
        processor="sightline.prompt.qwen2_vl:Qwen2VLProcessor",
        chat_template="qwen2-vl",
    ),
    "MllamaForConditionalGeneration": Family(
        name="Llama 3.2 Vision",
        model="sightline.models.mllama:MllamaForConditionalGeneration",
        processor="sightline.prompt.mllama:MllamaProcessor",
        chat_template="llama_3_vision",
    ),
    "LlavaForConditionalGeneration": Family(
        name="LLaVA 1.5",
        model="sightline.models.llava:LlavaForConditionalGeneration",
        processor="sightline.prompt.llava:LlavaProcessor",
        chat_template="vicuna_v1.1",
    ),
    "LlavaNextForConditionalGeneration": Family(
        name="LLaVA-NeXT",
        model="sightline.models.llava:LlavaForConditionalGeneration",
        processor="sightline.prompt.llava:LlavaProcessor",
        chat_template="vicuna_v1.1",
    ),
    "LlavaOnevisionForConditionalGeneration": Family(
        name="LLaVA-OneVision",
        model="sightline.models.llava:LlavaForConditionalGeneration",
        processor="sightline.prompt.llava:LlavaProcessor",
        chat_template="chatml-llava",
    ),
    "LlavaLlamaForCausalLM": Family(
        name="LLaVA, authors' layout",
        model="sightline.models.llava:LlavaForConditionalGeneration",
        processor="sightline.prompt.llava:LlavaProcessor",
        chat_template="vicuna_v1.1",
    ),
    "LlavaMistralForCausalLM": Family(
        name="LLaVA, authors' layout",
        model="sightline.models.llava:LlavaForConditionalGeneration",
        processor="sightline.prompt.llava:LlavaProcessor",
        chat_template="vicuna_v1.1",
    ),
    "LlavaQwenForCausalLM": Family(
        name="LLaVA, authors' layout",
        model="sightline.models.llava:LlavaForConditionalGeneration",
        processor="sightline.prompt.llava:LlavaProcessor",
        chat_template="chatml-llava",
    ),
    "LlamaForCausalLM": Family(
        name="Llama",
        model="sightline.models.llama:LlamaForCausalLM",
        processor=None,
        chat_template="llava_llama_3",
    ),
    "MistralForCausalLM": Family(
        name="Mistral",
        model="sightline.models.llama:MistralForCausalLM",
        processor=None,
        chat_template="vicuna_v1.1",
    ),
    "Qwen2ForCausalLM": Family(
        name="Qwen2",
        model="sightline.models.llama:Qwen2ForCausalLM",
        processor=None,
        chat_template="chatml-llava",
    ),
}
