"""LiteLLM's proxy in front of the server, asked by openai-python."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from common import BASE, MESSAGES, MODEL, Paint, run, see, streamed
from openai import BadRequestError, OpenAI

KEY = "sk-a-key-of-this-test-alone-0123456789"
CONFIG = f"""
model_list:
  - model_name: sightline
    litellm_params: {{model: hosted_vllm/{MODEL}, api_base: "{BASE}", api_key: none}}
    model_info: {{supports_vision: true}}
"""
# The proxy takes additionalProperties out of a tool, so the arguments are named as a whole.
PARAMETERS = {"type": "object", "enum": [{"color": "red"}, {"color": "blue"}]}
TOOL = {"type": "function", "function": {"name": "paint", "parameters": PARAMETERS}}

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    PORT = free.getsockname()[1]
client = OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key=KEY, max_retries=0)
given = {"model": "sightline", "messages": MESSAGES, "temperature": 0, "max_tokens": 200}


def picture() -> None:
    assert [model.id for model in client.models.list()] == ["sightline"]
    see(client.chat.completions.create(**given).choices[0].message.content)


def streaming() -> None:
    chunks = list(client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}))
    streamed([chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices])
    assert chunks[-1].usage.completion_tokens > 0


def structured() -> None:
    answer = client.chat.completions.parse(**given, response_format=Paint)
    assert isinstance(answer.choices[0].message.parsed, Paint)


def tools() -> None:
    forced = {**given, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    (call,) = client.chat.completions.create(**forced).choices[0].message.tool_calls
    assert Paint.model_validate_json(call.function.arguments)
    with client.chat.completions.stream(**forced) as stream:
        (again,) = stream.get_final_completion().choices[0].message.tool_calls
    assert again.function.arguments == call.function.arguments


def errors() -> None:
    broken = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}]
    try:
        client.chat.completions.create(model="sightline", messages=[{"role": "user", "content": broken}])
    except BadRequestError:
        return
    raise AssertionError("a broken picture was taken")


def wait(process: subprocess.Popen[bytes]) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(360):
        assert process.poll() is None, "the proxy has ended"
        try:
            direct.open(f"http://127.0.0.1:{PORT}/health/liveliness", timeout=5).close()
            return
        except OSError:
            time.sleep(0.25)
    raise AssertionError("the proxy did not start within 90 seconds")


with tempfile.TemporaryDirectory() as folder:
    config = Path(folder) / "config.yaml"
    config.write_text(CONFIG)
    process = subprocess.Popen(
        [Path(sys.executable).parent / "litellm", "--config", config, "--host", "127.0.0.1", "--port", str(PORT)],
        env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MASTER_KEY": KEY},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
    )
    try:
        wait(process)
        run(picture, streaming, structured, tools, errors)
    finally:
        process.terminate()
        process.wait(30)
