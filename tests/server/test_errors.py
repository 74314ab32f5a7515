"""A client's mistake is a 4xx in OpenAI's shape that names the field; never a 5xx, never a path or an address."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import requests

from tests import tiny
from tests.server.conftest import ask, data_url, image_part, picture
from tests.servers import ServerProcess

HI = {"role": "user", "content": "hi"}


def picture_url(url: Any) -> dict:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


ZERO_PNG = picture(1).replace((120).to_bytes(4, "big") + (90).to_bytes(4, "big"), bytes(8))

CASES: list[tuple[str, Any, int, str | None, str | None]] = [
    ("no body", b"", 400, None, "invalid_json"),
    ("not JSON", b'{"messages": [', 400, None, "invalid_json"),
    ("not UTF-8", b'{"model": "\xff"}', 400, None, "invalid_json"),
    ("an array", [], 400, None, "invalid_json"),
    ("no messages", {}, 400, "messages", "missing_required_parameter"),
    ("empty messages", {"messages": []}, 400, "messages", "empty_array"),
    ("messages of another type", {"messages": "hi"}, 400, "messages", "invalid_type"),
    ("message of another type", {"messages": ["hi"]}, 400, "messages[0]", "invalid_type"),
    ("unknown model", {"messages": [HI], "model": "gpt-9"}, 404, "model", "model_not_found"),
    ("empty parts", {"messages": [{"role": "user", "content": []}]}, 400, "messages[0].content", None),
    ("no content", {"messages": [{"role": "user"}]}, 400, "messages[0].content", None),
    ("unknown role", {"messages": [{"role": "bob", "content": "x"}]}, 400, "messages[0].role", None),
    ("no role", {"messages": [{"content": "x"}]}, 400, "messages[0].role", None),
    ("unknown part", {"messages": ask({"type": "video_url"})}, 400, "messages[0].content[0].type", None),
    ("audio part", {"messages": ask({"type": "input_audio"})}, 400, "messages[0].content[0].type", None),
    ("a local picture", {"messages": ask({"type": "image", "image": "/etc/passwd"})}, 400, None, None),
    ("n 0", {"messages": [HI], "n": 0}, 400, "n", "invalid_value"),
    ("n too large", {"messages": [HI], "n": 10**9}, 400, "n", "invalid_value"),
    ("temperature -1", {"messages": [HI], "temperature": -1}, 400, "temperature", "invalid_value"),
    ("temperature 3", {"messages": [HI], "temperature": 3}, 400, "temperature", "invalid_value"),
    ("temperature text", {"messages": [HI], "temperature": "1"}, 400, "temperature", "invalid_type"),
    ("top_p below 0", {"messages": [HI], "top_p": -0.1}, 400, "top_p", "invalid_value"),
    ("top_k -2", {"messages": [HI], "top_k": -2}, 400, "top_k", "invalid_value"),
    ("max_tokens 0", {"messages": [HI], "max_tokens": 0}, 400, "max_tokens", "invalid_value"),
    ("max_tokens huge", {"messages": [HI], "max_tokens": 2**70}, 400, "max_tokens", None),
    ("max_completion_tokens 0", {"messages": [HI], "max_completion_tokens": 0}, 400, "max_completion_tokens", None),
    ("seed huge", {"messages": [HI], "seed": 2**64}, 400, "seed", None),
    ("stop of numbers", {"messages": [HI], "stop": [1]}, 400, "stop[0]", "invalid_type"),
    ("empty stop", {"messages": [HI], "stop": ""}, 400, "stop", "invalid_value"),
    ("presence_penalty 3", {"messages": [HI], "presence_penalty": 3}, 400, "presence_penalty", "invalid_value"),
    ("logit_bias by word", {"messages": [HI], "logit_bias": {"a": 1}}, 400, "logit_bias", None),
    ("logit_bias of no token", {"messages": [HI], "logit_bias": {"999999": 1}}, 400, "logit_bias", "invalid_value"),
    ("stop_token_ids -1", {"messages": [HI], "stop_token_ids": [-1]}, 400, "stop_token_ids", "invalid_value"),
    ("top_logprobs alone", {"messages": [HI], "top_logprobs": 2}, 400, "top_logprobs", None),
    ("top_logprobs 21", {"messages": [HI], "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", None),
    ("stream_options alone", {"messages": [HI], "stream_options": {}}, 400, "stream_options", None),
    ("tools", {"messages": [HI], "tools": [{"type": "function"}]}, 400, "tools[0].function.name", None),
    ("empty tools", {"messages": [HI], "tools": []}, 400, "tools", None),
    ("response_format", {"messages": [HI], "response_format": {"type": "xml"}}, 400, "response_format", "invalid_value"),
    ("no schema", {"messages": [HI], "response_format": {"type": "json_schema"}}, 400,
     "response_format.json_schema.schema", "missing_required_parameter"),
    ("keyword", {"messages": [HI], "json_schema": {"type": "array", "uniqueItems": True}}, 400, "json_schema", "invalid_value"),
    ("two grammars", {"messages": [HI], "regex": "a+", "ebnf": 'root ::= "a"'}, 400, "ebnf", None),
    ("regex", {"messages": [HI], "regex": "(?=a)"}, 400, "regex", "invalid_value"),
    ("tool_choice alone", {"messages": [HI], "tool_choice": "required"}, 400, "tool_choice", None),
    ("functions", {"messages": [HI], "functions": [{"name": "f"}]}, 400, "functions", None),
    ("audio out", {"messages": [HI], "modalities": ["text", "audio"]}, 400, "modalities", None),
    ("chat_template", {"messages": [HI], "chat_template": "{{ 1 }}"}, 400, "chat_template", None),
    ("detail", picture_url("x") | {"messages": ask({"type": "image_url", "image_url": {"url": "x", "detail": "?"}})},
     400, "messages[0].content[0].image_url.detail", None),
    ("no URL", picture_url(None), 400, "messages[0].content[0].image_url", "invalid_image_url"),
    ("URL of no scheme", picture_url("cat.png"), 400, "messages[0].content[0].image_url", "invalid_image_url"),
    ("a path", picture_url("/etc/passwd"), 400, "messages[0].content[0].image_url", "invalid_image_url"),
    ("file URL", picture_url("file:///etc/passwd"), 403, "messages[0].content[0].image_url", "invalid_image_url"),
    ("dead host", picture_url("http://127.0.0.1:9/x.png"), 400, "messages[0].content[0].image_url",
     "failed_to_download_image"),
    ("bad base64", picture_url("data:image/png;base64,@@@@"), 400, "messages[0].content[0].image_url",
     "invalid_base64_image"),
    ("empty picture", picture_url("data:image/png;base64,"), 400, "messages[0].content[0].image_url",
     "empty_image_file"),
    ("no picture", picture_url("data:image/png;base64,aGVsbG8gd29ybGQ="), 400, "messages[0].content[0].image_url",
     "invalid_image_format"),
    ("another type", picture_url("data:text/html;base64,aGVsbG8="), 400, "messages[0].content[0].image_url",
     "unsupported_image_media_type"),
    ("truncated JPEG", picture_url(data_url(picture(1, kind="JPEG")[:-800], "image/jpeg")), 400,
     "messages[0].content[0].image_url", "image_parse_error"),
    ("truncated PNG", picture_url(data_url(picture(1)[:500])), 400, "messages[0].content[0].image_url",
     "image_parse_error"),
    ("0x0", picture_url(data_url(ZERO_PNG)), 400, "messages[0].content[0].image_url", "image_parse_error"),
    ("17 pictures", {"messages": ask(*[image_part(1)] * 17)}, 400, "messages", None),
    ("too long", {"messages": [{"role": "user", "content": "word " * 5000}]}, 400, "messages",
     "context_length_exceeded"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "param", "code"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_mistake_is_named(tiny_server: str, body: Any, status: int, param: str | None, code: str | None) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = requests.post(f"{tiny_server}/v1/chat/completions", data=data, timeout=30)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) > 10
    assert param is None or error["param"] == param
    assert code is None or error["code"] == code
    assert response.headers["x-should-retry"] == "false"
    assert not re.search(r"0x[0-9a-f]{4}|Traceback|site-packages|/work|/usr|\.py\b", response.text)


def test_unknown_routes_and_methods(tiny_server: str) -> None:
    missing = requests.get(f"{tiny_server}/v1/nothing", timeout=10)
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_url")
    wrong = requests.get(f"{tiny_server}/v1/chat/completions", timeout=10)
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (405, "invalid_request_error")


def test_body_over_the_limit_is_413(tiny_server: str) -> None:
    body = b'{"messages": "' + b"x" * 33_000_000 + b'"}'
    response = requests.post(f"{tiny_server}/v1/chat/completions", data=body, timeout=30)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")

    def chunks():
        for _ in range(33):
            yield b"x" * 1_000_000

    response = requests.post(f"{tiny_server}/v1/chat/completions", data=chunks(), timeout=30)
    assert response.status_code == 413


def test_request_ids(tiny_server: str) -> None:
    given = requests.get(f"{tiny_server}/v1/models", headers={"x-request-id": "mine-1"}, timeout=10)
    assert given.headers["x-request-id"] == "mine-1"
    odd = requests.get(f"{tiny_server}/v1/models", headers={"x-request-id": "a b<script>"}, timeout=10)
    assert odd.headers["x-request-id"].startswith("req-")
    assert int(odd.headers["openai-processing-ms"]) >= 0


def test_server_info_tells_no_path_and_no_key(tiny_server: str) -> None:
    text = requests.get(f"{tiny_server}/server_info", timeout=10).text
    assert "/work" not in text
    assert "/tmp" not in text
    assert ".pytest_cache" not in text


def test_a_page_that_may_call_from_a_browser() -> None:
    """A browser asks first, without a key; its scripts may then read what clients need of the headers."""
    arguments = [str(tiny.qwen2_vl()), "--load-format", "dummy", "--api-key", "k"]
    with ServerProcess([*arguments, "--allowed-origins", "https://a.example"]) as process:
        process.wait_ready()
        url = f"{process.base_url}/v1/models"
        asking = {
            "Origin": "https://a.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
        }
        answer = requests.options(url, headers=asking, timeout=10)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://a.example")
        assert "authorization" in answer.headers["access-control-allow-headers"]
        refused = requests.get(url, headers={"Origin": "https://a.example"}, timeout=10)
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://a.example")
        assert "x-request-id" in refused.headers["access-control-expose-headers"]
        other = requests.options(url, headers={**asking, "Origin": "https://b.example"}, timeout=10)
        assert (other.status_code, "access-control-allow-origin" in other.headers) == (400, False)


def test_no_page_may_unless_it_is_named(tiny_server: str) -> None:
    answer = requests.get(f"{tiny_server}/v1/models", headers={"Origin": "https://a.example"}, timeout=10)
    assert "access-control-allow-origin" not in answer.headers
