"""The chat templates that `--chat-template` knows by name, as Jinja; prompts equal SGLang's of the same names.

Content is a string or a list of parts of type text or image; a custom system message replaces the default one. Tools, which
SGLang's leave out, are written as Qwen2.5 (chatml) and Llama 3.1 (llama_3) read them.
"""

from __future__ import annotations

_BODY = """\
{%- macro body(content) -%}
  {%- if content is string -%}{{ content }}
  {%- else -%}
    {%- for part in content -%}{{ part.text if part.type == 'text' else IMAGE }}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
"""

_CHATML = r"""
{{ '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' -%}{{ body(messages[0].content) }}{%- else -%}
  {{ 'You are a helpful assistant.' }}
{%- endif -%}
{%- if tools -%}
  {{ '\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
  {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
  {%- for tool in tools -%}{{ '\n' + (tool | tojson) }}{%- endfor -%}
  {{ '\n</tools>\n\nFor each function call, return a json object with function name and arguments within ' }}
  {{- '<tool_call></tool_call> XML tags:\n<tool_call>\n' }}
  {{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' }}
{%- endif -%}
{{ '<|im_end|>\n' }}
{%- for m in messages -%}
  {%- if m.role == 'tool' -%}
    {#- results that follow each other share a turn -#}
    {%- if loop.first or loop.previtem.role != 'tool' -%}{{ '<|im_start|>user' }}{%- endif -%}
    {{ '\n<tool_response>\n' + body(m.content) + '\n</tool_response>' }}
    {%- if loop.last or loop.nextitem.role != 'tool' -%}{{ '<|im_end|>\n' }}{%- endif -%}
  {%- elif m.tool_calls -%}
    {{ '<|im_start|>assistant' + ('\n' + body(m.content) if m.content else '') }}
    {%- for call in m.tool_calls -%}
      {{ '\n<tool_call>\n{"name": ' + (call.function.name | tojson) }}
      {{- ', "arguments": ' + (call.function.arguments | tojson) + '}\n</tool_call>' }}
    {%- endfor -%}
    {{ '<|im_end|>\n' }}
  {%- elif not (loop.first and m.role == 'system') -%}
    {{ '<|im_start|>' + m.role + '\n' + body(m.content) + '<|im_end|>\n' }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""

_LLAMA_3 = r"""
{%- macro turn(role, text) -%}
  {{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' + (text | trim) + '<|eot_id|>' }}
{%- endmacro -%}
{%- macro functions() -%}
  {%- if tools -%}
    {{ 'Environment: ipython\n\nYou have access to the following functions. To call a function, please respond with JSON for ' }}
    {{- 'a function call. Respond in the format {"name": function name, "parameters": dictionary of argument name and ' }}
    {{- 'its value}. Do not use variables.\n\n' }}
    {%- for tool in tools -%}{{ (tool | tojson(indent=4)) + '\n\n' }}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{{ bos_token }}
{%- if messages[0].role != 'system' -%}
  {{ turn('system', functions() + 'You are a helpful language and vision assistant. You are able to understand the visual '
     'content that the user provides, and assist the user with a variety of tasks using natural language.') }}
{%- endif -%}
{%- for m in messages -%}
  {%- if m.role == 'tool' -%}{{ turn('ipython', body(m.content)) }}
  {%- elif m.tool_calls -%}
    {%- if m.tool_calls | length > 1 -%}{{ raise_exception('one call of a tool at a time') }}{%- endif -%}
    {%- set call = m.tool_calls[0].function -%}
    {{ turn('assistant', '{"name": ' + (call.name | tojson) + ', "parameters": ' + (call.arguments | tojson) + '}') }}
  {%- else -%}
    {{ turn(m.role, (functions() if loop.first and m.role == 'system' else '') + body(m.content)) }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}
"""

_VICUNA = r"""
{{ bos_token }}
{%- if messages[0].role == 'system' -%}{{ body(messages[0].content) + ' ' }}{%- else -%}
  {{ 'A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and '
     "polite answers to the user's questions. " }}
{%- endif -%}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}{{ 'USER: ' + body(m.content) + ' ' }}
  {%- elif m.role == 'assistant' -%}{{ 'ASSISTANT: ' + body(m.content) + eos_token }}
  {%- elif not loop.first -%}{{ raise_exception('a system message must come first') }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""


def _template(turns: str, image: str) -> str:
    return _BODY.replace("IMAGE", image) + turns


NAMED_TEMPLATES: dict[str, str] = {
    "qwen2-vl": _template(_CHATML, "'<|vision_start|><|image_pad|><|vision_end|>'"),
    "chatml-llava": _template(_CHATML, r"'<image>\n'"),
    "llama_3_vision": _template(_LLAMA_3, r"'<|image|>\n'"),
    "llava_llama_3": _template(_LLAMA_3, r"'<image>\n'"),
    "vicuna_v1.1": _template(_VICUNA, r"'<image>\n'"),
}
