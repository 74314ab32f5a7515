"""Prompts as text and as ids: the named templates, the sandbox, and text that must stay text."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.errors import CheckpointError, RequestError
from sightline.prompt.chat_template import ChatTemplate, Rendered, Shield, load_source
from sightline.prompt.named_templates import NAMED_TEMPLATES
from sightline.prompt.tokenizer import Tokenizer
from tests import tiny

IMAGE = {"type": "image"}
T = "What’s in this image?"
SYS = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
VSYS = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions."
)


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def render(name: str, messages: list[dict[str, Any]], **options: Any) -> str:
    return ChatTemplate(NAMED_TEMPLATES[name], Shield([]), eos_token="</s>").render(messages, **options).text


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": parts[0] if len(parts) == 1 and isinstance(parts[0], str) else list(parts)}


def llama(role: str, body: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{body}<|eot_id|>"


LLAMA_HEAD = "<|start_header_id|>assistant<|end_header_id|>\n\n"
CHATML_SYS = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
CHATML_HEAD = "<|im_start|>assistant\n"
QWEN = "<|vision_start|><|image_pad|><|vision_end|>"

ONE = [user(text(T), IMAGE)]
TWO = [user(text("First:"), IMAGE, text("second:"), IMAGE, text("compare."))]
TURNS = [user("a"), {"role": "assistant", "content": "b"}, user("c")]

GOLDEN = [
    ("llama_3_vision", ONE, llama("system", SYS) + llama("user", T + "<|image|>") + LLAMA_HEAD),
    ("llama_3_vision", TWO,
     llama("system", SYS) + llama("user", "First:<|image|>\nsecond:<|image|>\ncompare.") + LLAMA_HEAD),
    ("llama_3_vision", TURNS,
     llama("system", SYS) + llama("user", "a") + llama("assistant", "b") + llama("user", "c") + LLAMA_HEAD),
    ("llama_3_vision", [user("  padded \n")], llama("system", SYS) + llama("user", "padded") + LLAMA_HEAD),
    ("llava_llama_3", ONE, llama("system", SYS) + llama("user", T + "<image>") + LLAMA_HEAD),
    ("llava_llama_3", TWO, llama("system", SYS) + llama("user", "First:<image>\nsecond:<image>\ncompare.") + LLAMA_HEAD),
    ("llava_llama_3", TURNS,
     llama("system", SYS) + llama("user", "a") + llama("assistant", "b") + llama("user", "c") + LLAMA_HEAD),
    ("qwen2-vl", ONE, f"{CHATML_SYS}<|im_start|>user\n{T}{QWEN}<|im_end|>\n{CHATML_HEAD}"),
    ("qwen2-vl", TWO, f"{CHATML_SYS}<|im_start|>user\nFirst:{QWEN}second:{QWEN}compare.<|im_end|>\n{CHATML_HEAD}"),
    ("qwen2-vl", TURNS, f"{CHATML_SYS}<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
     f"<|im_start|>user\nc<|im_end|>\n{CHATML_HEAD}"),
    ("chatml-llava", TURNS, f"{CHATML_SYS}<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
     f"<|im_start|>user\nc<|im_end|>\n{CHATML_HEAD}"),
    ("chatml-llava", ONE, f"{CHATML_SYS}<|im_start|>user\n{T}<image>\n<|im_end|>\n{CHATML_HEAD}"),
    ("chatml-llava", TWO,
     f"{CHATML_SYS}<|im_start|>user\nFirst:<image>\nsecond:<image>\ncompare.<|im_end|>\n{CHATML_HEAD}"),
    ("vicuna_v1.1", ONE, f"{VSYS} USER: {T}<image>\n ASSISTANT:"),
    ("vicuna_v1.1", TWO, f"{VSYS} USER: First:<image>\nsecond:<image>\ncompare. ASSISTANT:"),
    ("vicuna_v1.1", TURNS, f"{VSYS} USER: a ASSISTANT: b</s>USER: c ASSISTANT:"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "messages", "expected"), GOLDEN)
def test_named_templates(name: str, messages: list[dict[str, Any]], expected: str) -> None:
    assert render(name, messages) == expected


# What a prompt begins with: by default, and with a system message "Be brief."
HEADS = {
    "llama_3_vision": (llama("system", SYS), llama("system", "Be brief.")),
    "llava_llama_3": (llama("system", SYS), llama("system", "Be brief.")),
    "qwen2-vl": (CHATML_SYS, "<|im_start|>system\nBe brief.<|im_end|>\n"),
    "chatml-llava": (CHATML_SYS, "<|im_start|>system\nBe brief.<|im_end|>\n"),
    "vicuna_v1.1": (f"{VSYS} ", "Be brief. "),
}


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize(("name", "messages", "expected"), GOLDEN)
def test_named_templates_with_a_system_message(
    name: str, messages: list[dict[str, Any]], expected: str, role: str
) -> None:
    default, brief = HEADS[name]
    assert expected.startswith(default)
    assert render(name, [{"role": role, "content": "Be brief."}, *messages]) == brief + expected.removeprefix(default)


def test_every_named_template_has_all_golden_prompts() -> None:
    assert {(name, id(messages)) for name, messages, _ in GOLDEN} >= {
        (name, id(messages)) for name in NAMED_TEMPLATES for messages in (ONE, TWO, TURNS)
    }


# -- tools -------------------------------------------------------------------------------------------------------------

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": {"city": "Köln", "days": 2}}}
WITH_TOOLS = [
    user("Rain?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "no"},
]
CHATML_TOOLS = """\
<|im_start|>system
You are a helpful assistant.

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
<|im_start|>user
Rain?<|im_end|>
<|im_start|>assistant
<tool_call>
{"name": "weather", "arguments": {"city": "Köln", "days": 2}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
no
</tool_response><|im_end|>
<|im_start|>assistant
"""


def test_chatml_writes_tools_as_qwen_2_5_does() -> None:
    for name in ("qwen2-vl", "chatml-llava"):
        assert render(name, WITH_TOOLS, tools=[WEATHER]) == CHATML_TOOLS
    said = [WITH_TOOLS[0], {**WITH_TOOLS[1], "content": "I look."}, WITH_TOOLS[2], WITH_TOOLS[2]]
    assert render("qwen2-vl", said).endswith(
        '<|im_start|>assistant\nI look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "days": 2}}\n'
        "</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\nno\n</tool_response>\n<tool_response>\nno\n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_llama_3_writes_tools_as_llama_3_1_does() -> None:
    rendered = render("llama_3_vision", WITH_TOOLS, tools=[WEATHER])
    assert '"parameters": dictionary of argument name and its value}' in rendered
    assert json.dumps(WEATHER, indent=4) + "\n\n" + SYS + "<|eot_id|>" in rendered
    assert rendered.endswith(
        llama("user", "Rain?")
        + llama("assistant", '{"name": "weather", "parameters": {"city": "Köln", "days": 2}}')
        + llama("ipython", "no")
        + LLAMA_HEAD
    )
    with pytest.raises(RequestError, match="one call"):
        render("llama_3_vision", [user("a"), {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}])


@pytest.mark.parametrize(
    ("messages", "tools", "param"),
    [
        ([user("a")], [WEATHER], "tools"),
        (WITH_TOOLS[:2], None, "messages[1].tool_calls"),
        ([user("a"), WITH_TOOLS[2]], None, "messages[1].role"),
    ],
)
def test_a_template_without_a_place_for_tools_says_so(messages: Any, tools: Any, param: str) -> None:
    with pytest.raises(RequestError, match="no place") as caught:
        render("vicuna_v1.1", messages, tools=tools)
    assert caught.value.param == param


def test_a_late_system_message_is_not_lost() -> None:
    with pytest.raises(RequestError, match="must come first"):
        render("vicuna_v1.1", [user("a"), {"role": "system", "content": "b"}])
    assert "late" in render("qwen2-vl", [user("a"), {"role": "system", "content": "late"}])


# -- the end of a prompt -----------------------------------------------------------------------------------------------


def test_generation_prompt_and_continuation() -> None:
    messages = [user("a"), {"role": "assistant", "content": "The answer is"}]
    assert render("qwen2-vl", messages, add_generation_prompt=False).endswith("The answer is<|im_end|>\n")
    assert render("qwen2-vl", messages, continue_final_message=True).endswith("<|im_start|>assistant\nThe answer is")


@pytest.mark.parametrize("name", sorted(NAMED_TEMPLATES))
# "end" and "i" are in the token that follows, the mark of the prompt's end is an ordinary character to clients
@pytest.mark.parametrize(
    "said", ["end", "i", "The answer is ", "a\n\n", "\ufdef", [{"type": "text", "text": "in parts"}]]
)
def test_continuation_ends_right_behind_the_message(name: str, said: Any) -> None:
    rendered = render(name, [user("a"), {"role": "assistant", "content": said}], continue_final_message=True)
    text = (said if isinstance(said, str) else said[0]["text"]).replace("\ufdef", "\ufffd")
    before = {"vicuna_v1.1": "ASSISTANT: "}.get(name, LLAMA_HEAD if "llama_3" in name else CHATML_HEAD)
    assert rendered.endswith(before + text)


@pytest.mark.parametrize(
    "last",
    [
        user("a"),
        {"role": "assistant", "content": "  "},
        {"role": "assistant", "content": [{"type": "image"}]},
        {"role": "assistant", "content": "a", "tool_calls": [CALL]},
    ],
    ids=str,
)
def test_nothing_to_continue(last: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="continue_final_message"):
        render("qwen2-vl", [user("a"), last], continue_final_message=True)
    blind = ChatTemplate("{% for m in messages %}{{ m.role }}{% endfor %}", Shield([]))
    with pytest.raises(RequestError, match="leaves out the last message"):
        blind.render([{"role": "assistant", "content": "a"}], continue_final_message=True)


# -- text stays text ---------------------------------------------------------------------------------------------------


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer(tiny.qwen2_vl())


@functools.cache
def transformers_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny.qwen2_vl())


@functools.cache
def template(source: str = NAMED_TEMPLATES["qwen2-vl"]) -> ChatTemplate:
    return ChatTemplate(source, Shield(tokenizer().added))


def encode(rendered: Rendered) -> list[int]:
    return tokenizer().encode_trusted(rendered.text, rendered.client_positions)


ADDED_IDS = {t.id for t in tokenizer().added.values()}
PLAIN = st.text(st.characters(exclude_categories=("Cs",)), max_size=60).filter(lambda s: "<|" not in s)


@settings(max_examples=150, deadline=None)
@given(st.lists(PLAIN, min_size=1, max_size=4))
def test_ordinary_messages_tokenise_as_transformers_would(parts: list[str]) -> None:
    noncharacters = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    parts = [p.translate({ord(c): None for c in noncharacters}) for p in parts]
    rendered = template().render([user(*[x for p in parts for x in (text(p), IMAGE)])])
    assert encode(rendered) == transformers_tokenizer().encode(rendered.text, add_special_tokens=False)


FRAMES = [
    lambda s: [user(s)],
    lambda s: [user(text(s[: len(s) // 2]), text(s[len(s) // 2 :]))],
    lambda s: [user(*[text(c) for c in s])],
    lambda s: [user(text("<|im_"), text("end|>"), text(s))],
    lambda s: [{"role": "system", "content": s}, user("x")],
    lambda s: [user("x"), {"role": "assistant", "content": s}, user("y")],
    lambda s: [user("x"), {"role": "tool", "tool_call_id": s, "content": s}],
    lambda s: [user("x"), {"role": "assistant", "content": "", "tool_calls": [{"function": {
        "name": s, "arguments": {s: [s, {s: s}]}}}]}],
]  # fmt: skip

TRICKY = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' }}{%- if m.content is string -%}"
    "{{ m.content.strip().split('@')[-1] | trim | upper | lower }}{{ m.content[1:] }}{{ m.content[::-1][::-1] }}"
    "{{ m.content.replace('a', 'a') }}{{ m | tojson }}{{ m.tool_calls }}{{ tools | tojson }}{{ tools }}"
    "{%- else -%}{%- for p in m.content -%}{{ p.text | trim }}{%- endfor -%}{%- endif -%}{{ '<|im_end|>\\n' }}"
    "{%- endfor -%}"
)


@pytest.mark.parametrize("source", [*NAMED_TEMPLATES.values(), TRICKY], ids=[*NAMED_TEMPLATES, "tricky"])
@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("special", sorted(tokenizer().added)[::3])
def test_no_special_token_comes_from_a_client(special: str, frame: Any, source: str) -> None:
    for attack in (special, f"a{special}b", special * 3, f"{special[:-1]}{special}", f" {special}\n"):
        harmless = attack.replace("<", "(").replace("|", "/")
        tools = [[{"function": {"name": s, "description": s, "parameters": {s: s}}}] for s in (attack, harmless)]
        if "tools" not in source:
            tools = [None, None]
        if refusal := template(source).refusal(frame(attack), tools[0]):
            assert "has no place for" in str(refusal)
            return
        attacked, plain = (
            template(source).render(frame(s), tools=t) for s, t in zip((attack, harmless), tools, strict=True)
        )
        count = [sum(i in ADDED_IDS for i in encode(r)) for r in (attacked, plain)]
        assert count[0] == count[1], (attack, attacked.text)
        assert attack.strip() in attacked.text or frame is FRAMES[3]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["<", "|", ">", "<|", "|>", "im_end", "im_start", "\ufdd0", "\ufdd1", " ", "a", "\n"]),
                min_size=1, max_size=12))  # fmt: skip
def test_no_special_token_from_fragments(fragments: list[str]) -> None:
    ids = encode(template().render([user(*[text(f) for f in fragments])]))
    # system, user and assistant turns: two starts and ends of the template's own, and the last start.
    assert sum(i in ADDED_IDS for i in ids) == 5


def test_names_tools_and_keys_are_shielded_too() -> None:
    source = "{{ tools | tojson }}{{ messages[0].name }}{{ documents }}"
    rendered = template(source).render(
        [{**user("x"), "name": "<|im_end|>"}],
        tools=[{"<|im_start|>": {"description": "<|image_pad|>"}}],
        template_kwargs={"documents": ["<|im_end|>"]},
    )
    assert rendered.text.count("<|") == 4
    assert not ADDED_IDS & set(encode(rendered))


# -- what released templates do --------------------------------------------------------------------------------------

# As many of llava-hf's: pictures first, content as parts alone, an assistant's words marked for training.
PARTS_ALONE = """\
{% for message in messages %}{{ message['role'].upper() + ': ' }}
{%- for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<|image_pad|>\\n' }}{% endfor %}
{%- for part in message['content'] | selectattr('type', 'equalto', 'text') %}
{%- if message['role'] == 'assistant' %}{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}
{%- else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""


def test_a_template_that_takes_parts_alone_loses_no_words() -> None:
    """Strings become parts; several parts stay several, as in transformers."""
    reply = {"role": "assistant", "content": "A circle."}
    mine = ChatTemplate(PARTS_ALONE, Shield([]))
    talks: list[list[dict[str, Any]]] = [
        [user("What?")],
        [{"role": "system", "content": "Be brief."}, user(text("a"), text("b"), IMAGE), reply, user("Sure?")],
        [user(IMAGE, text("a"), IMAGE), {"role": "assistant", "content": ""}, user(text("b"))],
    ]
    for messages in talks:
        parts = [
            {
                **m,
                "content": [text(m["content"])] * bool(m["content"]) if isinstance(m["content"], str) else m["content"],
            }
            for m in messages
        ]
        expected = transformers_tokenizer().apply_chat_template(
            parts, chat_template=PARTS_ALONE, tokenize=False, add_generation_prompt=True
        )
        assert mine.render(messages).text == expected
    assert "A circle." in mine.render(talks[1]).text
    continued = mine.render([user("a"), reply], continue_final_message=True).text
    assert continued == "USER: a ASSISTANT: A circle."


def test_a_template_that_takes_strings_gets_strings() -> None:
    mine = ChatTemplate("{% for m in messages %}{{ m.content.strip() }};{% endfor %}", Shield([]))
    assert mine.render([user(text("a "), text("b ")), user("c")]).text == "a b;c;"


# -- the sandbox -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ joiner.__init__.__globals__['os'] }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'].dumps(1) }}",
        "{{ strftime_now.__globals__ }}",
        "{{ self._TemplateReference__context.environment.from_string('{{1}}').root_render_func }}",
        "{% set x = messages.append(1) %}{{ messages | length }}",
        "{{ '%s' | format(messages.__class__) }}{{ '{0.__class__}'.format(messages) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.popen('id') }}",
        "{{ request.application.__globals__ }}",
        "{{ ''|attr('__class__')|attr('__mro__') }}",
    ],
)
def test_sandbox(payload: str) -> None:
    try:
        out = ChatTemplate(payload, Shield([])).render([user("x")]).text
    except (RequestError, CheckpointError):
        return
    assert "uid=" not in out
    assert "<class" not in out
    assert "root:" not in out


def test_output_is_limited() -> None:
    with pytest.raises(RequestError):
        ChatTemplate("{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
                     Shield([])).render([user("x")])  # fmt: skip


def test_template_refusals_are_the_clients_error() -> None:
    with pytest.raises(RequestError, match="only one turn"):
        ChatTemplate("{{ raise_exception('only one turn') }}", Shield([])).render([user("x")])
    with pytest.raises(CheckpointError, match="compile"):
        ChatTemplate("{% if %}", Shield([]))
    with pytest.raises(RequestError, match="not allowed"):
        template().render([user("x")], template_kwargs={"tokenize": True})


# -- where templates come from -----------------------------------------------------------------------------------------


def test_sources_in_order(tmp_path: Path) -> None:
    assert load_source(tmp_path, None, "qwen2-vl") == (NAMED_TEMPLATES["qwen2-vl"], True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "T"}))
    assert load_source(tmp_path, None, "qwen2-vl") == ("T", False)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "tool_use", "template": "X"}, {"name": "default", "template": "D"}]})
    )
    assert load_source(tmp_path, None, "qwen2-vl") == ("D", False)
    assert load_source(tmp_path, None, "qwen2-vl", "tool_use") == ("X", False)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("U")
    assert load_source(tmp_path, None, "qwen2-vl", "tool_use") == ("U", False)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "J"}))
    assert load_source(tmp_path, None, "qwen2-vl") == ("J", False)
    (tmp_path / "chat_template.jinja").write_text("F")
    assert load_source(tmp_path, None, "qwen2-vl") == ("F", False)
    assert load_source(tmp_path, "vicuna_v1.1", "qwen2-vl")[0] == NAMED_TEMPLATES["vicuna_v1.1"]
    mine = tmp_path / "mine.jinja"
    mine.write_text("\nmine\n")
    assert load_source(tmp_path, str(mine), "qwen2-vl") == ("mine", False)
    with pytest.raises(CheckpointError, match="llama_3_vision"):
        load_source(tmp_path, "llama_4_vision", "qwen2-vl")


def test_sglangs_json_form(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    spec = {"name": "x", "system": "SYS", "user": "USR", "assistant": "AST", "sep_style": "CHATML", "stop_str": "</s>",
            "system_message": "be kind", "sep": "</s>"}  # fmt: skip
    path.write_text(json.dumps(spec))
    source, _ = load_source(tmp_path, str(path), "qwen2-vl")
    out = ChatTemplate(source, Shield([])).render([user(text("hi"), IMAGE)]).text
    assert out == "SYS\nbe kind</s>\nUSR\nhi<image>\n</s>\nAST\n"
    path.write_text(json.dumps({"user": "U"}))
    with pytest.raises(CheckpointError, match="system"):
        load_source(tmp_path, str(path), "qwen2-vl")
