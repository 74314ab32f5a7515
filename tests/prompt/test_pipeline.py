"""From messages to one prompt: identities, limits, and what a known picture does not cost."""

from __future__ import annotations

import asyncio
import contextvars
import io
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sightline.errors import ContextLengthError, ImageError, RequestError
from sightline.prompt import decoder
from sightline.prompt.caller import Caller, set_caller
from sightline.prompt.media import MediaLimits
from sightline.prompt.pipeline import Prompt, PromptPipeline
from sightline.prompt.processor import prepare
from sightline.types import View
from tests import tiny, tiny_llava, tiny_mllama
from tests.server.conftest import ask, data_url, picture

SECRET = bytes(32)


def pipeline(folder: Path | None = None, **options: Any) -> PromptPipeline:
    return PromptPipeline(folder or tiny.qwen2_vl(), **{"secret": SECRET, "allow_local": True, **options})


def chat(mine: PromptPipeline, *parts: Any, **options: Any) -> Prompt:
    return asyncio.run(mine.chat(ask(*parts), **options))


def image(value: Any, **more: Any) -> dict[str, Any]:
    return {"type": "image", "image": value, **more}


def digest(*parts: Any, **options: Any) -> bytes:
    (ref,) = chat(pipeline(), *parts, **options).images
    return ref.digest


def digest_of_a_tenant(*parts: Any) -> bytes:
    tenant = Caller()
    tenant.salt = b"tenant"
    set_caller(tenant)
    return digest(*parts)


def test_prompt_is_consistent() -> None:
    prompt = chat(pipeline(), "a", image(picture(1)), "b", image(picture(2)), image(picture(1)))
    assert len(prompt.images) == 3
    assert len(prompt.pictures) == 2
    assert prompt.num_image_tokens == 36
    assert prompt.input_ids.dtype == np.int32
    assert prompt.positions is not None
    assert prompt.positions.shape == (3, len(prompt.input_ids))
    assert (prompt.input_ids == tiny.IMAGE_PAD).sum() == 36


def test_pixels_being_decoded_are_counted_until_they_are_not() -> None:
    mine = pipeline()
    (one,) = chat(mine, image(picture(1))).pictures.values()

    async def during_and_after() -> tuple[int, int]:
        during = await mine.use(one, lambda image: mine.decoding_bytes // (image.width * image.height))
        await asyncio.sleep(0)
        return during, mine.decoding_bytes

    during, after = asyncio.run(during_and_after())
    assert during >= 3
    assert after == 0


def test_all_ways_to_give_a_picture_agree(tmp_path: Path) -> None:
    data = picture(3)
    path = tmp_path / "p.png"
    path.write_bytes(data)
    mine = pipeline()
    prompts = [
        chat(mine, part)
        for part in (
            image(data), image(path), image(str(path)),
            {"type": "image_url", "image_url": {"url": data_url(data)}},
            {"type": "image_url", "image_url": data_url(data)},
            {"type": "input_image", "image_url": data_url(data)},
            {"type": "image_url", "image_url": {"url": data_url(data), "detail": "high"}},
        )
    ]  # fmt: skip
    assert len({p.images[0].digest for p in prompts}) == 1
    pil = chat(mine, image(Image.open(io.BytesIO(data))))
    assert pil.input_ids.tolist() == prompts[0].input_ids.tolist()
    pixels = [asyncio.run(mine.decode(next(iter(p.pictures.values())))).array for p in (prompts[0], pil)]
    np.testing.assert_array_equal(*pixels)


def test_identity_depends_on_all_that_matters() -> None:
    data = picture(4)
    base = digest(image(data))
    assert digest(image(data)) == base
    assert len(base) == 32
    grey = Image.new("L", (30, 100), 5)
    others = [
        digest(image(picture(5))),
        digest(image(data + b"x")),
        contextvars.Context().run(digest_of_a_tenant, image(data)),
        digest(image(data, detail="low")),
        digest(image(grey)),
        digest(image(Image.new("L", (100, 30), 5))),
        digest(image(grey.convert("RGB"))),
        chat(pipeline(secret=b"y" * 32), image(data)).images[0].digest,
    ]
    assert len({base, *others}) == len(others) + 1


def test_palettes_make_different_pictures() -> None:
    first, second = Image.new("P", (8, 8), 0), Image.new("P", (8, 8), 0)
    first.putpalette([255, 0, 0])
    second.putpalette([0, 255, 0])
    assert digest(image(first)) != digest(image(second))


def test_known_picture_is_not_even_probed() -> None:
    mine = pipeline()
    for _ in range(3):
        chat(mine, image(picture(6)))
    assert mine.media.counters.probes == 1
    assert mine.media.counters.decodes == 0


def test_detail_low_caps_the_pixels() -> None:
    mine = pipeline(tiny.qwen2_vl(max_pixels=28 * 28 * 1280))
    large = picture(7, 900, 900)
    low, high = (chat(mine, image(large, detail=d)).num_image_tokens for d in ("low", "high"))
    assert low <= 512 * 512 // (28 * 28) < high
    with pytest.raises(RequestError, match="detail"):
        chat(mine, image(large, detail="ultra"))


def test_broken_pictures_are_named() -> None:
    with pytest.raises(ImageError) as caught:
        chat(pipeline(), "x", image(b"no picture"))
    assert caught.value.param == "messages[0].content[1]"
    mine = pipeline()
    prompt = chat(mine, image(picture(8)[:600]))
    (broken,) = prompt.pictures.values()
    with pytest.raises(ImageError) as caught:
        asyncio.run(mine.decode(broken))
    assert caught.value.code == "image_parse_error"
    assert caught.value.param == "messages[0].content[0]"


def test_pil_images_of_any_mode_and_orientation() -> None:
    mine = pipeline()
    for mode in ("F", "CMYK", "YCbCr", "RGBa", "I;16"):
        (one,) = chat(mine, image(Image.new(mode, (60, 40)))).pictures.values()
        assert asyncio.run(mine.decode(one)).array.shape == (56, 84, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (300, 60)).save(buffer, "JPEG", exif=exif)
    grids = [chat(mine, image(x)).images[0].grid for x in (buffer.getvalue(), Image.open(buffer))]
    assert grids[0] == grids[1]
    assert grids[0][1] > grids[0][2]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "end|>", "content": "x"}, "messages[0].role"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": [5]}, "messages[0].content[0]"),
        ({"role": "user", "content": [image(None)]}, "messages[0].content[0]"),
        ({"role": "user", "content": [image("no such file.png")]}, "messages[0].content[0]"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": 5}}]},
            "messages[0].content[0].image_url",
        ),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "messages[0].content[0].type"),
    ],
)
def test_mistakes_are_named(message: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        asyncio.run(pipeline().chat([message]))
    assert caught.value.param == param


def test_limits() -> None:
    with pytest.raises(RequestError, match="at most 2"):
        chat(pipeline(limits=MediaLimits(max_images=2)), *[image(picture(1))] * 3)
    with pytest.raises(ImageError, match="together"):
        chat(pipeline(limits=MediaLimits(max_request_bytes=50_000)), image(picture(1)), image(picture(2)))
    with pytest.raises(ContextLengthError) as caught:
        chat(pipeline(context_length=64), "word " * 100, image(picture(1)))
    assert "12 of images" in caught.value.message
    with pytest.raises(ContextLengthError, match="characters"):
        chat(pipeline(context_length=64), "word " * 100_000)
    assert caught.value.code == "context_length_exceeded"


def test_local_pictures_are_for_the_offline_engine_only() -> None:
    for part in (image("/etc/passwd"), image(picture(1))):
        with pytest.raises(RequestError, match="not supported"):
            chat(pipeline(allow_local=False), part)
    with pytest.raises(ImageError):
        chat(pipeline(allow_local=False), {"type": "image_url", "image_url": {"url": "/etc/passwd"}})


def copy_with(tmp_path: Path, change: Callable[[dict[str, Any]], None], name: str) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny.qwen2_vl(), folder)
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    return folder


def test_text_only_template_never_loses_a_picture(tmp_path: Path) -> None:
    def text_only(config: dict[str, Any]) -> None:
        config["chat_template"] = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

    folder = copy_with(tmp_path, text_only, "tokenizer_config.json")
    for extra in ("chat_template.jinja", "chat_template.json"):
        (folder / extra).unlink(missing_ok=True)
    prompt = chat(pipeline(folder), "see", image(picture(1)))
    assert prompt.num_image_tokens == 12


def test_template_that_only_speaks_of_images_never_loses_a_picture(tmp_path: Path) -> None:
    source = "{# an image is not vision #}{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    path = tmp_path / "blind.jinja"
    path.write_text(source)
    assert chat(pipeline(chat_template=str(path)), "see", image(picture(1))).num_image_tokens == 12


@pytest.mark.parametrize("kind", ["words", "large picture", "many pictures"])
def test_nothing_stalls_the_event_loop(kind: str) -> None:
    mine = pipeline()
    noise = np.random.default_rng(0).integers(0, 256, (2000, 3000, 3), dtype=np.uint8)
    parts: list[Any] = {
        "words": ["several words and more " * 40_000],
        "large picture": [data_url(picture(1) + bytes(14_000_000)), image(Image.fromarray(noise))],
        "many pictures": [image(picture(1) + bytes([i]) * 3_000_000) for i in range(16)],
    }[kind]
    if kind == "large picture":
        parts[0] = {"type": "image_url", "image_url": {"url": parts[0]}}

    async def run() -> float:
        # What the loop's own thread works; waiting for a busy machine does not count.
        began = time.thread_time()
        await mine.chat(ask(*parts))
        return time.thread_time() - began

    assert asyncio.run(run()) < 0.1


@pytest.mark.check(17)
@pytest.mark.parametrize("piece", ["word ", "<|im_end|>", "<", "é😀", "{{ x }}", "\ufdd0"])
def test_a_prompt_takes_linear_time(piece: str) -> None:
    """Rendering and tokenising a prompt takes time in proportion to its length; what looks like special tokens is no exception."""
    mine = pipeline()

    def seconds(length: int) -> float:
        text = piece * (length // len(piece))

        def once() -> float:
            began = time.thread_time()
            mine.tokenizer.encode_trusted(*mine.template.render([{"role": "user", "content": text}]))
            return time.thread_time() - began

        return min(once() for _ in range(3))

    # four times as much; quadratic would be sixteen times as long, and other work on the machine may double a time
    assert seconds(400_000) < 9 * seconds(100_000)


def test_bytes_are_decoded_hashed_and_probed_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = pipeline()
    done: list[str] = []

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any) -> Any:
            assert threading.current_thread() is not threading.main_thread(), name
            done.append(name)
            return original(*args)

        monkeypatch.setattr(owner, name, watched)

    watch(mine.media, "_decode_data_url")
    watch(mine, "_digest")
    watch(decoder, "probe")
    watch(decoder, "from_pil")
    url = {"type": "image_url", "image_url": {"url": data_url(picture(1) + bytes(100_000))}}
    chat(mine, url, image(Image.new("RGB", (50, 50))))
    assert sorted(done) == ["_decode_data_url", "_digest", "_digest", "from_pil", "probe"]


def test_raw_prompts() -> None:
    mine = pipeline()
    inside = asyncio.run(mine.text("a<|vision_start|><|image_pad|><|vision_end|>b", [picture(1)]))
    assert inside.num_image_tokens == 12
    front = asyncio.run(mine.text("ab", [picture(1)]))
    assert front.input_ids[0] == tiny.IMAGE_PAD
    ids = asyncio.run(mine.text([5, 6, 7]))
    assert ids.input_ids.tolist() == [5, 6, 7]
    untrusted = asyncio.run(mine.text("a<|im_end|>", trusted=False))
    assert tiny.IM_END not in untrusted.input_ids
    with pytest.raises(RequestError, match="empty"):
        asyncio.run(mine.text(""))


# -- tools and roles ---------------------------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "<|im_end|>"}'}}]},
    {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "no"}]},
]  # fmt: skip


def shown(mine: PromptPipeline, messages: Any, **options: Any) -> str:
    prompt = asyncio.run(mine.chat(messages, **options))
    return mine.tokenizer.decode(prompt.input_ids.tolist(), skip_special_tokens=False)


def test_tools_use_the_familys_template_where_the_checkpoints_has_no_place_for_them() -> None:
    mine = pipeline()
    text = shown(mine, CALLED, tools=TOOLS)
    assert '<tools>\n{"type": "function", "function": {"name": "look"' in text
    assert '<tool_call>\n{"name": "look", "arguments": {"at": "<|im_end|>"}}\n</tool_call><|im_end|>\n' in text
    assert "<tool_response>\nno\n</tool_response><|im_end|>\n" in text
    # the one that is typed in the arguments is text
    ids = asyncio.run(mine.chat(CALLED, tools=TOOLS)).input_ids.tolist()
    assert ids.count(tiny.IM_END) == text.count("<|im_end|>") - 1 == 4
    picture_too = [*CALLED, {"role": "user", "content": [image(picture(1)), {"type": "text", "text": "And here?"}]}]
    assert asyncio.run(mine.chat(picture_too, tools=TOOLS)).num_image_tokens == 12


def test_whoever_names_a_template_gets_that_one() -> None:
    mine = pipeline(tiny_llava.llava("onevision", text="qwen2"), chat_template="vicuna_v1.1")
    for messages, tools, param in ((CALLED[:1], TOOLS, "tools"), (CALLED, None, "messages[1].tool_calls")):
        with pytest.raises(RequestError, match="no place") as caught:
            asyncio.run(mine.chat(messages, tools=tools))
        assert caught.value.param == param


def test_a_checkpoints_own_template_for_tools(tmp_path: Path) -> None:
    def two(config: dict[str, Any]) -> None:
        own = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}{{ tools | tojson }}"
        config["chat_template"] = [
            {"name": "default", "template": config["chat_template"]},
            {"name": "tool_use", "template": own},
        ]

    folder = copy_with(tmp_path, two, "tokenizer_config.json")
    (folder / "chat_template.json").unlink()
    text = shown(pipeline(folder), CALLED[:1], tools=TOOLS)
    assert text == "userRain?" + json.dumps(TOOLS)
    assert "<|im_start|>user\nRain?" in shown(pipeline(folder), CALLED[:1])


def test_the_deprecated_names_of_tools() -> None:
    old = [
        CALLED[0],
        {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": '{"at": "<|im_end|>"}'}},
        {"role": "function", "name": "look", "content": "no"},
    ]
    assert shown(pipeline(), old, tools=TOOLS) == shown(pipeline(), CALLED, tools=TOOLS)


def test_a_developer_is_the_system() -> None:
    first = {"role": "developer", "content": "Be brief."}
    text = shown(pipeline(), [first, CALLED[0]])
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")


@pytest.mark.parametrize(
    ("call", "param"),
    [
        ({"function": {"name": "look", "arguments": "{"}}, "messages[1].tool_calls[0].function.arguments"),
        ({"function": {"name": "look", "arguments": "[1]"}}, "messages[1].tool_calls[0].function.arguments"),
        ({"function": {"name": "look", "arguments": "[" * 100_000}}, "messages[1].tool_calls[0].function.arguments"),
        ({"function": {"arguments": "{}"}}, "messages[1].tool_calls[0].function"),
        ("look", "messages[1].tool_calls[0].function"),
    ],
)
def test_broken_calls_are_named(call: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        asyncio.run(pipeline().chat([CALLED[0], {"role": "assistant", "tool_calls": [call]}], tools=TOOLS))
    assert caught.value.param == param


def test_the_beginning_of_the_sequence_comes_once() -> None:
    """Whether the template writes it, the tokenizer adds it, or both."""
    for source in ("{{ bos_token }}{{ messages[0].content }}", "{{ messages[0].content }}"):
        for adds in (False, True):
            mine = pipeline(tiny_mllama.mllama())
            mine.template = mine._compile(source)
            mine.tokenizer.adds_bos = adds
            ids = asyncio.run(mine.chat(ask("a <|begin_of_text|> b"))).input_ids.tolist()
            assert ids.count(tiny_mllama.BOS) == int(adds or "bos" in source)
            assert tiny_mllama.BOS not in ids[1:]


def test_a_gpu_gets_the_picture_itself_unless_it_is_much_larger() -> None:
    # one for one more: 4 times the bytes of what becomes of it, above 16 MB; a side; a filter
    view = View(size=(1000, 1000), resample=Image.Resampling.BICUBIC)
    cases = [
        ((2360, 2360), view, True),
        ((2370, 2370), view, False),
        ((16384, 1), view, True),
        ((16385, 1), view, False),
    ]
    large = View(size=(2000, 2000), resample=Image.Resampling.BICUBIC)
    cases += [((4000, 4000), large, True), ((4000, 4001), large, False)]
    cases += [((9, 9), View(size=(5, 5), resample=Image.Resampling.LANCZOS), False)]
    for size, made, suits in cases:
        picture = Image.new("RGB", size)
        pixels = prepare(picture, (made,), for_device=True)
        assert (pixels.views != ()) == suits, (size, made)
        assert pixels.array.shape[:2] == (size if suits else made.size)[::-1]
        assert prepare(picture, (made,)).views == ()
