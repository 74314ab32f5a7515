"""simonw's llm, the command.

It has no way to ask that a tool be called, and the model in the box was not trained to. So a relay between both adds that wish to
the first request of a conversation with tools; the answers pass it unchanged.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from common import BASE, MODEL, QUESTION, SERVER, SHAPES, Paint, run, see

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
FUNCTION = """
import typing

def paint(color: typing.Literal["red", "green", "blue"]) -> str:
    "Paint a wall."
    return "The wall has a new color."
"""


class Relay(BaseHTTPRequestHandler):
    """Passes requests on; one that offers tools and has no results yet must lead to a call."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not any(message["role"] == "tool" for message in body["messages"]):
            body |= {"tool_choice": "required", "parallel_tool_calls": False, "temperature": 0}
            # or a model of three million parameters goes on with arguments that nobody declared
            for tool in body["tools"]:
                tool["function"]["parameters"]["additionalProperties"] = False
        else:
            RESULTS.append(body["messages"][-1]["content"])
        headers = {"content-type": "application/json"}
        with DIRECT.open(urllib.request.Request(SERVER + self.path, json.dumps(body).encode(), headers)) as answer:
            data = answer.read()
            self.send_response(200)
            self.send_header("content-type", answer.headers["content-type"])
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        return


RESULTS: list[str] = []
relay = ThreadingHTTPServer(("127.0.0.1", 0), Relay)
threading.Thread(target=relay.serve_forever, daemon=True).start()
MODELS = {"sightline": BASE, "relayed": f"http://127.0.0.1:{relay.server_port}/v1"}
CONFIG = "".join(
    f"""
- model_id: {name}
  model_name: {MODEL}
  api_base: {base}
  api_key_name: sightline
  vision: true
  supports_schema: true
  supports_tools: true
"""
    for name, base in MODELS.items()
)


def llm(*args: str, model: str = "sightline") -> str:
    done = subprocess.run(
        [Path(sys.executable).parent / "llm", "-m", model, QUESTION, "-a", SHAPES, "--key", "none", *args],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def picture() -> None:
    see(llm("--no-stream"))


def streaming() -> None:
    see(llm())
    logged = subprocess.check_output([Path(sys.executable).parent / "llm", "logs", "--json", "-n", "1"], text=True)
    assert json.loads(logged)[0]["input_tokens"] > 64


def structured() -> None:
    assert Paint.model_validate_json(llm("--schema", json.dumps(Paint.model_json_schema())))


def offered() -> None:
    assert llm("-T", "llm_version").strip()


def tools() -> None:
    """A call, its result, and the answer to that, whole and streamed."""
    for how in ((), ("--no-stream",)):
        RESULTS.clear()
        assert llm("--functions", FUNCTION, *how, model="relayed").strip()
        assert RESULTS == ["The wall has a new color."]


with tempfile.TemporaryDirectory() as folder:
    os.environ["LLM_USER_PATH"] = folder
    (Path(folder) / "extra-openai-models.yaml").write_text(CONFIG)
    run(picture, streaming, structured, offered, tools)
