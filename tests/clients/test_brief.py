"""The requests that started the project, against the bundled model: curl, requests and the OpenAI client, and true answers."""

from __future__ import annotations

import base64
import http.server
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest
import requests
from PIL import Image, ImageDraw

from sightline.demo import model_path
from sightline.utils import launch_server_cmd, terminate_process, wait_for_server
from tests.clients.brief_page import CELLS

MODEL = "sightline-tiny"
QUESTION = "What’s in this image?"
RED, BLUE, GREEN = (220, 30, 30), (40, 70, 220), (40, 160, 60)


def draw(*shapes: tuple[str, tuple[int, int, int], tuple[int, int, int, int]]) -> Image.Image:
    image = Image.new("RGB", (160, 128), (236, 236, 232))
    pen = ImageDraw.Draw(image)
    for kind, colour, box in shapes:
        (pen.ellipse if kind == "circle" else pen.rectangle)(box, fill=colour)
    return image


FIRST = draw(("circle", RED, (20, 30, 70, 80)), ("square", BLUE, (100, 60, 140, 100)))
SECOND = draw(("square", GREEN, (55, 40, 105, 90)))


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def data_url(image: Image.Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(encode(image)).decode()}"


def body(url: str) -> dict:
    """The body of the brief's page."""
    parts = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": url}}]
    return {"model": MODEL, "messages": [{"role": "user", "content": parts}], "max_tokens": 300}


def is_first(text: str) -> bool:
    return "red circle" in text and "blue square" in text


def test_curl_without_a_content_type(server: str) -> None:
    out = subprocess.run(
        ["curl", "-s", f"{server}/v1/chat/completions", "-d", "@-"],
        input=json.dumps(body(data_url(FIRST)), ensure_ascii=False).encode(),
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert is_first(json.loads(out.stdout)["choices"][0]["message"]["content"])


def test_requests(server: str) -> None:
    response = requests.post(f"{server}/v1/chat/completions", json=body(data_url(FIRST)), timeout=60)
    assert is_first(response.json()["choices"][0]["message"]["content"])


@pytest.fixture
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="None", max_retries=0)


def test_openai_client(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**body(data_url(FIRST)))
    assert is_first(answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens == answer.usage.total_tokens - answer.usage.completion_tokens
    assert answer._request_id


def test_two_pictures_streamed_and_not(client: openai.OpenAI) -> None:
    text = (
        "I have two very different images. They are not related at all. "
        "Please describe the first image in one sentence, and then describe the second image in another sentence."
    )
    images = [{"type": "image_url", "image_url": {"url": data_url(i)}} for i in (FIRST, SECOND)]
    messages = [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]
    whole = (
        client.chat.completions.create(model=MODEL, messages=messages, temperature=0).choices[0].message.content or ""
    )
    first, _, second = whole.partition(".")
    assert is_first(first)
    assert "green square" in second
    with client.chat.completions.create(model=MODEL, messages=messages, temperature=0, stream=True) as stream:
        assert "".join(c.choices[0].delta.content or "" for c in stream) == whole


def test_order_of_pictures_matters(client: openai.OpenAI) -> None:
    def ask(*images: Image.Image) -> str:
        parts = [{"type": "image_url", "image_url": {"url": data_url(i)}} for i in images]
        text = {"type": "text", "text": "Describe the first image, then the second."}
        messages = [{"role": "user", "content": [*parts, text]}]
        return (
            client.chat.completions.create(model=MODEL, messages=messages, temperature=0).choices[0].message.content
            or ""
        )

    one, other = ask(FIRST, SECOND), ask(SECOND, FIRST)
    assert one.index("red circle") < one.index("green square")
    assert other.index("green square") < other.index("red circle")


def test_repeated_picture_is_cached(client: openai.OpenAI, server: str) -> None:
    client.chat.completions.create(**body(data_url(SECOND)))
    before = requests.get(f"{server}/server_info", timeout=10).json()
    answer = client.chat.completions.create(**body(data_url(SECOND)))
    after = requests.get(f"{server}/server_info", timeout=10).json()
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens - (answer.usage.prompt_tokens_details.cached_tokens or 0) <= 16
    assert before["media"] == after["media"]
    assert before["engine"]["images_encoded"] == after["engine"]["images_encoded"]


def test_conversation_goes_on(client: openai.OpenAI) -> None:
    question = [{"type": "image_url", "image_url": {"url": data_url(FIRST)}}, {"type": "text", "text": QUESTION}]
    messages: list = [{"role": "user", "content": question}]
    first = client.chat.completions.create(model=MODEL, messages=messages, temperature=0).choices[0].message.content
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "What color is the square?"}]
    second = client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
    assert "blue" in (second.choices[0].message.content or "")
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) > 64


def test_errors_are_the_clients_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(**body("data:image/png;base64,aGVsbG8="))
    assert bad.value.code == "invalid_image_format"
    assert bad.value.param == "messages[0].content[1].image_url"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.PermissionDeniedError):
        client.chat.completions.create(**body("http://127.0.0.1:1/x.png"))


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == MODEL
    extra = model.model_extra or {}
    assert extra["demo"] is True
    assert "demonstration" in extra["description"]
    assert extra["architecture"]["input_modalities"] == ["text", "image"]


EXAMPLE = "/sgl-project/sglang/blob/main/test/lang/example_image.png?raw=true"
LOGO = "/sgl-project/sglang/main/assets/logo.png"


@pytest.fixture
def picture_host() -> Iterator[str]:
    """Serves the page's two pictures: the first behind a redirect, as its own host does."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == EXAMPLE:
                self.send_response(302)
                self.send_header("Location", "/raw/example_image.png")
                self.end_headers()
                return
            data = encode(SECOND if self.path == LOGO else FIRST)
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            return

    host = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=host.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{host.server_port}"
    host.shutdown()


def test_the_page_runs_cell_by_cell(picture_host: str, tmp_path: Path) -> None:
    """Its flags, helpers and requests, in a process of its own; pictures may come from loopback by environment."""
    names = {"MODEL": str(model_path()), "EXAMPLE": picture_host + EXAMPLE, "LOGO": picture_host + LOGO}
    script = ""
    for number, cell in enumerate(CELLS, 1):
        for name, value in names.items():
            cell = cell.replace(name, value)
        script += f"{cell}\nprint('== end of cell {number}', flush=True)\n"
    script += "print(vision_process.returncode)\n"
    file = tmp_path / "page.py"
    file.write_text(script, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(file)],
        env={**os.environ, "SIGHTLINE_ALLOW_PRIVATE_MEDIA": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    start, curl, with_requests, with_openai, two_pictures, _, exit_code = re.split(r"== end of cell \d\n", done.stdout)
    assert not start.strip()
    answers = [json.loads(line) for line in [*curl.splitlines(), with_requests]]
    assert len(answers) == 3
    assert all(is_first(answer["choices"][0]["message"]["content"]) for answer in answers)
    details = answers[1]["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] > details["image_tokens"] > 0
    assert is_first(with_openai)
    first, _, second = two_pictures.partition(".")
    assert is_first(first)
    assert "green square" in second
    assert exit_code.strip() == "0"
    assert "exit code" not in done.stderr
    assert not [
        p
        for p in psutil.process_iter(["cmdline"])
        if f"--port {_port(done.stderr)}" in " ".join(p.info["cmdline"] or ())
    ]


def _port(log: str) -> str:
    found = re.search(r"listening on http://127\.0\.0\.1:(\d+)", log)
    assert found, log
    return found[1]


def test_a_server_that_cannot_start_is_said(tmp_path: Path) -> None:
    process, port = launch_server_cmd(f"SIGHTLINE_LOG_LEVEL=error python3 -m sightline.launch_server {tmp_path}")
    with pytest.raises(RuntimeError, match="exit code 3"):
        wait_for_server(f"http://localhost:{port}", timeout=60, process=process)
    terminate_process(process)
    with pytest.raises(TimeoutError):
        wait_for_server(f"http://localhost:{port}", timeout=0.3)
