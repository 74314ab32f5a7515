"""The playground as people use it: every function of docs/playground.md."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

from sightline import demo
from tests.servers import ServerProcess

Visit = Callable[..., Any]
LAST = "#parts textarea:last-child"
PHONE = {"viewport": {"width": 390, "height": 780}, "has_touch": True}
SHAPES, WORD = demo.sample_path("shapes.png"), demo.sample_path("word.png")
TWO = "The first image shows a red circle, a blue square and a green triangle. The second image shows the word"


@pytest.fixture
def page(visit: Visit, url: str) -> Any:
    """The bundled model's page, ready; answers are greedy."""
    page = visit(url)
    ready(page)
    set_temperature(page)
    return page


def ready(page: Any) -> None:
    page.wait_for_selector("#send:enabled")


def set_temperature(page: Any) -> None:
    page.click("#open-settings")
    page.fill("#temperature", "0")
    page.click("#open-settings")


def pick(page: Any, *paths: Any, count: int) -> None:
    """Through the file input; waits until the server has counted the tokens of `count` pictures."""
    page.set_input_files("#file", [str(path) for path in paths])
    counted(page, count)


def counted(page: Any, count: int) -> None:
    page.wait_for_function(
        "n => [...document.querySelectorAll('.chip .muted')].filter(e => /token|used/.test(e.textContent)).length === n",
        arg=count,
    )


def ask(page: Any, text: str | None, nth: int = 0) -> str:
    if text is not None:
        page.fill(LAST, text)
    page.press(LAST, "Enter")
    page.locator(".assistant").nth(nth).locator(".copies").wait_for()
    return page.locator(".assistant .text").nth(nth).inner_text()


def noise(width: int, height: int) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_sample_and_its_figures(page: Any) -> None:
    page.click("#samples button >> nth=0")
    counted(page, 1)
    assert page.input_value(LAST) == "What is in this image?"
    assert ask(page, None) == "The image shows a red circle, a blue square and a green triangle."
    facts = page.inner_text(".facts")
    assert re.search(r"\d+ tokens in \(88 for pictures.*\d+ out.*first after .*s.*tokens/s", facts, re.DOTALL), facts
    assert not page.is_visible("#welcome")


def test_several_turns(page: Any) -> None:
    pick(page, SHAPES, count=1)
    ask(page, "What color is the circle?")
    assert ask(page, "And the square?", 1) == "The square is blue."
    page.click("#clear")
    assert page.locator("article").count() == 0
    assert page.is_visible("#welcome")


def test_two_pictures_between_texts(page: Any) -> None:
    """A picture goes where the caret is, can be moved and removed, and the request has the parts in that order."""
    sent: list[Any] = []
    page.on("request", lambda r: sent.append(r.post_data_json) if r.url.endswith("/chat/completions") else None)
    page.fill(LAST, "first then")
    page.evaluate("document.querySelector('#parts textarea').setSelectionRange(6, 6)")
    page.press(LAST, "Shift+Shift")  # a key, so that the page learns of the caret
    pick(page, SHAPES, count=1)
    areas = page.locator("#parts textarea")
    assert [areas.nth(i).input_value() for i in range(areas.count())] == ["first ", "then"]
    page.fill(LAST, "then this")
    page.evaluate("document.querySelector('#parts textarea:last-child').setSelectionRange(9, 9)")
    page.press(LAST, "Shift+Shift")
    pick(page, WORD, demo.sample_path("number.png"), count=3)
    page.click("[aria-label^='Remove picture 3 of 3']")
    page.click("[aria-label^='Move picture 2 of 2'][aria-label$='the start']")
    page.click("[aria-label^='Move picture 2 of 2'][aria-label$='the start']")
    assert [e.inner_text() for e in page.locator(".chip .name").all()] == ["word.png", "shapes.png"]
    page.click("[aria-label^='Move picture 1 of 2'][aria-label$='the end']")
    ask(page, None)
    content = sent[0]["messages"][0]["content"]
    assert [part.get("text") for part in content] == ["first ", None, None, "then this"]
    first = base64.b64decode(content[1]["image_url"]["url"].partition(",")[2])
    assert first == SHAPES.read_bytes()


def test_arrows_where_there_is_something_to_move_past(page: Any) -> None:
    pick(page, SHAPES, count=1)
    assert page.locator(".chip button:visible").count() == 2  # what the model sees, and ×
    page.fill(LAST, "before it")
    page.click("[aria-label^='Move picture 1 of 1'][aria-label$='the end']")
    assert page.locator("#parts > *").evaluate_all("all => all.map((e) => e.className || e.value)") == [
        "before it", "chip", "",
    ]  # fmt: skip


def test_two_pictures_are_told_apart(page: Any) -> None:
    pick(page, SHAPES, WORD, count=2)
    assert ask(page, "Describe the first image, then the second.").startswith(TWO)


@pytest.mark.parametrize("how", ["paste", "drop"])
def test_paste_and_drop(page: Any, how: str) -> None:
    page.evaluate(
        """([how, data]) => {
          const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
          const transfer = new DataTransfer();
          transfer.items.add(new File([bytes], "mine.png", { type: "image/png" }));
          const options = { bubbles: true, cancelable: true };
          const event = how === "paste" ? new ClipboardEvent("paste", { ...options, clipboardData: transfer })
            : new DragEvent("drop", { ...options, dataTransfer: transfer });
          document.querySelector("#composer").dispatchEvent(event);
        }""",
        [how, base64.b64encode(WORD.read_bytes()).decode()],
    )
    counted(page, 1)
    assert "Hello" in ask(page, "What does it say?")


def test_what_the_model_sees(page: Any) -> None:
    pick(page, SHAPES, count=1)
    page.click(".chip .thumb")
    page.wait_for_selector("#seen[open] canvas")
    assert "takes 88 tokens" in page.inner_text("#seen-summary")
    assert page.inner_text("figcaption") == "Resized to 176 × 128: 8 × 11 patches of 16 × 16 pixels"
    pixels = "() => document.querySelector('#seen canvas').toDataURL()"
    with_grid = page.evaluate(pixels)
    page.uncheck("#grid")
    assert page.evaluate(pixels) != with_grid
    page.keyboard.press("Escape")
    assert not page.is_visible("#seen")
    assert page.evaluate("document.activeElement.className") == "thumb"


def test_errors_keep_what_was_written(page: Any, tmp_path: Any) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(SHAPES.read_bytes()[:900])
    pick(page, broken, count=1)
    assert "cannot be used" in page.inner_text(".chip")
    page.fill(LAST, "What is it?")
    page.press(LAST, "Enter")
    page.wait_for_selector("#problem:visible")
    assert "image" in page.inner_text("#problem p").lower()
    page.wait_for_selector("#send:has-text('Send')")
    assert page.input_value(LAST) == "What is it?"
    assert page.locator(".chip").count() == 1
    assert page.locator("article").count() == 0
    page.click("[aria-label^='Remove picture']")
    assert not page.is_visible("#problem")
    large = tmp_path / "large.png"
    large.write_bytes(noise(400, 300))
    pick(page, large, count=1)
    page.wait_for_selector("#problem:visible")
    assert "0.3 MB" in page.inner_text("#problem p")
    page.click("[aria-label^='Remove picture']")
    large.write_bytes(noise(700, 600))
    pick(page, large, count=1)
    page.wait_for_selector("#problem:visible")
    assert re.search("larger than 1 MB|before it had all of it", page.inner_text("#problem p"))
    page.click("[aria-label^='Remove picture']")
    assert page.input_value(LAST) == "What is it?"


def test_settings_are_sent_and_refusals_shown(page: Any) -> None:
    sent: list[Any] = []
    page.on("request", lambda r: sent.append(r.post_data_json) if r.url.endswith("/chat/completions") else None)
    page.click("#open-settings")
    for name, value in {"max-tokens": "3", "seed": "7", "top-p": "0.5", "system": "Answer."}.items():
        page.fill(f"#{name}", value)
    ask(page, "What is in this image?")
    assert "ended by the limit of tokens" in page.inner_text(".facts")
    assert (
        sent[0].items()
        >= {"model": "sightline-tiny", "temperature": 0, "max_tokens": 3, "seed": 7, "top_p": 0.5}.items()
    )
    assert sent[0]["messages"][0] == {"role": "system", "content": "Answer."}
    page.fill("#temperature", "5")
    page.fill(LAST, "again")
    page.press(LAST, "Enter")
    page.wait_for_selector("#problem:visible")
    assert "temperature" in page.inner_text("#problem p")
    assert page.input_value(LAST) == "again"


def snippet(page: Any, name: str) -> str:
    page.click(f".copies >> text={name}")
    page.wait_for_selector(".link:has-text('copied')")
    text = page.evaluate("navigator.clipboard.readText()")
    page.wait_for_selector(".link:has-text('copied')", state="detached")
    return text


def test_copied_code_runs(page: Any) -> None:
    pick(page, SHAPES, WORD, count=2)
    question = "Describe the first image, \"then\" 'the' $(second) \\ `image`\nREQUEST."
    answer = ask(page, question)
    done = subprocess.run(["bash", "-c", snippet(page, "curl")], capture_output=True, text=True, timeout=60)
    chunks = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("data: {")]
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"]) == answer, done.stderr
    code = snippet(page, "Python")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == answer + "\n", done.stderr
    code = snippet(page, "JavaScript")
    assert page.evaluate(f"async () => {{ {code.replace('console.log(answer)', 'return answer')} }}") == answer
    if node := shutil.which("node"):
        done = subprocess.run([node, "--input-type=module"], input=code, capture_output=True, text=True, timeout=60)
        assert done.stdout == answer + "\n", done.stderr


MARKDOWN = [
    ("one\ntwo\n\nthree", "<p>one\ntwo</p><p>three</p>"),
    ("a **b *c* d** `e*f*`", "<p>a <strong>b <em>c</em> d</strong> <code>e*f*</code></p>"),
    ("2 * 3 * 4, snake_case, 5*6", "<p>2 * 3 * 4, snake_case, 5*6</p>"),
    ("## Head\ntext", "<h3>Head</h3><p>text</p>"),
    ("- a\n  - b\n- c", "<ul><li>a<ul><li>b</li></ul></li><li>c</li></ul>"),
    ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
    ("> a\n> b\n---", "<blockquote>a\nb</blockquote><hr>"),
    ("a|b\n-|:-:\n1|**2**", '<div class="table" tabindex="0"><table><thead><tr><th>a</th><th>b</th></tr></thead>'
     "<tbody><tr><td>1</td><td><strong>2</strong></td></tr></tbody></table></div>"),
    ("```python\n# a **b**\n\nc", '<pre tabindex="0"><code># a **b**\n\nc</code></pre>'),
    ("<img src=x onerror=alert(1)>", "<p>&lt;img src=x onerror=alert(1)&gt;</p>"),
    ("[a](javascript:b) ![c](d)", "<p>[a](javascript:b) ![c](d)</p>"),
    ("**unfinished `too", "<p>**unfinished `too</p>"),
    ("", ""),
]  # fmt: skip


def test_markdown_becomes_elements_and_nothing_else_does(page: Any) -> None:
    html = """async (texts) => {
      const { render } = await import("./playground/markdown.js");
      return texts.map((text) => {
        const element = document.createElement("div");
        element.append(...render(text));
        return element.innerHTML;
      });
    }"""
    assert page.evaluate(html, [written for written, _ in MARKDOWN]) == [shown for _, shown in MARKDOWN]


def answered(page: Any, answer: str) -> None:
    """From now on this is what a model says."""
    pieces = [answer[i : i + 7] for i in range(0, len(answer), 7)]
    events = [{"choices": [{"delta": {"content": piece}, "finish_reason": None}]} for piece in pieces]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))


def test_a_formatted_answer(page: Any) -> None:
    """As a larger model would write it; what is copied is what was written."""
    answer = "It says:\n\n- **one**\n- two\n\n```\n" + "long " * 60 + "\n```"
    answered(page, answer)
    ask(page, "What does it say?")
    assert [e.inner_text() for e in page.locator(".assistant .text li").all()] == ["one", "two"]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    audit(page, "a formatted answer")
    assert snippet(page, "answer") == answer


def test_an_answer_that_breaks_off_stays(page: Any) -> None:
    """With what is known of it in sight above the error, however long it is."""
    text = {"choices": [{"delta": {"content": "word\n\n" * 60}, "finish_reason": None}]}
    error = {"error": {"message": "The engine died in mid-stream."}}
    late = """(parts) => {
      const get = window.fetch;
      const body = () => new ReadableStream({
        async start(stream) {
          for (const part of parts) {
            stream.enqueue(new TextEncoder().encode(`data: ${JSON.stringify(part)}\\n\\n`));
            await new Promise((resolve) => setTimeout(resolve, 300));
          }
          stream.close();
        },
      });
      window.fetch = async (path, options) => path.endsWith("/completions") ? new Response(body()) : get(path, options);
    }"""
    page.evaluate(late, [text, error])
    assert ask(page, "go on").split() == ["word"] * 60
    assert page.inner_text("#problem p") == "The engine died in mid-stream."
    assert "broken off" in page.inner_text(".facts")
    page.wait_for_function(
        "document.querySelector('.copies').getBoundingClientRect().bottom <= document.querySelector('#problem').getBoundingClientRect().top"
    )
    assert page.locator(".user").count() == 1


def test_loading_key_stop_and_code_with_a_key(visit: Visit, locked: ServerProcess) -> None:
    page = visit(locked.base_url)
    page.wait_for_selector("#loading:visible")
    assert page.inner_text("#phase")
    page.fill(LAST, "Hello")
    page.wait_for_selector("#key-form:visible", timeout=60_000)
    assert not page.is_visible("#loading")
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    page.wait_for_selector("#key-problem:visible")
    assert "does not accept this key" in page.inner_text("#key-problem")
    page.fill("#key", "secret")
    page.press("#key", "Enter")
    ready(page)
    assert page.input_value(LAST) == "Hello"
    assert page.evaluate("sessionStorage.length + ' ' + localStorage.length + document.cookie") == "1 0"

    # To this, greedily, the random model goes on to the end of its context; sampled, it may end before anybody stops it.
    set_temperature(page)
    page.press(LAST, "Enter")
    page.wait_for_function("() => document.querySelector('.assistant .text')?.textContent.length > 5")
    page.click("#send:has-text('Stop')")
    page.wait_for_selector(".facts:has-text('stopped')")
    headers = {"authorization": "Bearer secret"}
    page.wait_for_timeout(1000)
    info = requests.get(f"{locked.base_url}/server_info", headers=headers, timeout=5).json()
    assert info["requests_in_flight"] == 0
    assert info["calls"]["aborted"] == 1

    page.click("#open-settings")
    page.fill("#max-tokens", "5")
    ask(page, "again", 1)
    code = page.locator(".assistant").nth(1).get_by_text("curl")
    code.click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert "secret" not in copied
    environment = {**os.environ, "OPENAI_API_KEY": "secret"}
    done = subprocess.run(["bash", "-c", copied], capture_output=True, text=True, timeout=60, env=environment)
    assert "data: [DONE]" in done.stdout, done.stdout
    page.reload()
    ready(page)


def test_the_keyboard_is_enough(visit: Visit, url: str) -> None:
    """Every control is reached in the order in which it is seen, and shows that it has the focus."""
    page = visit(url)
    ready(page)
    focus = """() => {
      const e = document.activeElement, s = getComputedStyle(e), form = getComputedStyle(e.closest("form") ?? e);
      const shown = s.outlineStyle !== "none" || form.boxShadow !== "none";
      return `${e.id || e.getAttribute("aria-label") || e.textContent} ${shown}`;
    }"""
    seen = [page.evaluate(focus)]
    for _ in range(9):
        page.keyboard.press("Shift+Tab")
        seen.append(page.evaluate(focus))
    assert seen[0] == "Message true"
    assert seen[6:] == ["What is in this image? true", "open-settings true", "theme true", "Skip to the message true"]
    page.focus(LAST)
    for name in ("add", "send"):
        page.keyboard.press("Tab")
        assert page.evaluate(focus) == f"{name} true"
    page.locator("#samples button").nth(3).focus()
    page.keyboard.press("Enter")
    counted(page, 1)
    page.keyboard.press("Enter")
    page.wait_for_selector(".assistant .copies")
    assert "Hello" in page.inner_text("#announcer")


def audit(page: Any, where: str) -> None:
    """No violation that axe-core knows, contrast included."""
    source = (resources.files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8")
    page.evaluate(source + "; undefined")
    page.wait_for_timeout(300)
    found = page.evaluate("async () => (await axe.run()).violations")
    short = [f"{v['id']}: {n['html'][:120]} {n.get('failureSummary')}" for v in found for n in v["nodes"]]
    assert not short, f"{where}: {short}"


@pytest.mark.parametrize(
    "options",
    [
        {"color_scheme": "light"},
        {"color_scheme": "dark"},
        {**PHONE, "color_scheme": "light"},
        {**PHONE, "color_scheme": "dark"},
    ],
    ids=["light", "dark", "phone", "phone-dark"],
)
def test_accessibility_and_width(visit: Visit, url: str, options: dict, tmp_path: Any) -> None:
    page = visit(url, **options, reduced_motion="reduce")
    ready(page)
    assert page.evaluate("document.documentElement.dataset.theme") == options["color_scheme"]
    audit(page, "welcome")
    page.click("#open-settings")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    pick(page, SHAPES, broken, count=2)
    page.wait_for_selector("#problem:visible")
    audit(page, "settings, pictures and an error")
    page.click("#open-settings")
    page.click("[aria-label^='Remove picture 2']")
    ask(page, "What is in this image?")
    audit(page, "conversation")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.click(".user .thumb")
    page.wait_for_selector("#seen[open] canvas")
    audit(page, "what the model sees")


def test_the_theme_can_be_chosen(page: Any) -> None:
    background = "getComputedStyle(document.documentElement).backgroundColor"
    light = page.evaluate(background)
    page.click("#theme")
    dark = page.evaluate(background)
    assert dark != light
    page.reload()
    ready(page)
    assert page.evaluate(background) == dark
