"""The chat templates that `--chat-template` knows by name, as Jinja; prompts equal SGLang's of the same names.

Content is a string or a list of parts of type text or image; a custom system message replaces the default one.
"""

from __future__ import annotations


def _body(image: str) -> str:
    """A macro that writes a message's content with `image` in place of each picture."""
    return (
        "{%- macro body(content) -%}{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}"
        "{%- if part.type == 'text' -%}{{ part.text }}{%- else -%}{{ '" + image + "' }}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
    )


_ROLES = (
    "{%- for m in messages -%}{%- if m.role not in ['system', 'user', 'assistant'] -%}"
    "{{ raise_exception('messages of role ' + m.role + ' are not supported by this template') }}"
    "{%- endif -%}{%- endfor -%}"
)


def _chatml(image: str) -> str:
    return (
        _body(image) + _ROLES + "{%- if messages[0].role != 'system' -%}"
        "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif -%}"
        "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + body(m.content) + '<|im_end|>\\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    )


_VISION_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


def _llama_3(image: str) -> str:
    return (
        _body(image + "\\n") + _ROLES + "{{ bos_token }}{%- macro turn(role, text) -%}"
        "{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + (text | trim) + '<|eot_id|>' }}{%- endmacro -%}"
        "{%- if messages[0].role != 'system' -%}{{ turn('system', '" + _VISION_SYSTEM + "') }}{%- endif -%}"
        "{%- for m in messages -%}{{ turn(m.role, body(m.content)) }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"
    )


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user\\'s questions."
)

_VICUNA = (
    _body("<image>\\n")
    + _ROLES
    + "{{ bos_token }}{%- if messages[0].role == 'system' -%}{{ body(messages[0].content) + ' ' }}{%- else -%}{{ '"
    + _VICUNA_SYSTEM
    + " ' }}{%- endif -%}{%- for m in messages -%}{%- if m.role == 'user' -%}{{ 'USER: ' + body(m.content) + ' ' }}"
    "{%- elif m.role == 'assistant' -%}{{ 'ASSISTANT: ' + body(m.content) + eos_token }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)

NAMED_TEMPLATES: dict[str, str] = {
    "qwen2-vl": _chatml("<|vision_start|><|image_pad|><|vision_end|>"),
    "chatml-llava": _chatml("<image>\\n"),
    "llama_3_vision": _llama_3("<|image|>"),
    "llava_llama_3": _llama_3("<image>"),
    "vicuna_v1.1": _VICUNA,
}
