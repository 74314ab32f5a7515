"""docs/migrating.md: SGLang's and vLLM's flags, helpers, endpoints and fields, and what stands for them here."""

from __future__ import annotations

from pathlib import Path

from sightline.config import ServerConfig, declared, foreign_flags
from sightline.foreign_flags import ANY, ForeignFlag

MIGRATING = Path(__file__).resolve().parent.parent / "docs" / "migrating.md"

HEAD = """# Coming from SGLang, vLLM or OpenAI

<!-- Written by `make docs` from src/sightline/config.py and foreign_flags.py. A test fails when this page is not current. -->

**From OpenAI:** change `base_url` to `http://127.0.0.1:8000/v1`. Requests, streams and errors have the same shape; what is
accepted without effect and what is refused is listed in [Compatibility](compatibility.md).

**From SGLang:** `python -m sightline.launch_server` takes SGLang's flags as below, `sightline.utils` has its notebook helpers
(`launch_server_cmd`, `wait_for_server`, `print_highlight`, `terminate_process`), `from sightline import Engine` is the offline
engine. The port is 8000 unless `--port 30000` is given.

**From vLLM:** `sightline serve MODEL` takes vLLM's flags as below; `from sightline import Engine` stands for `LLM`.

A notebook of SGLang's runs with the package's name changed:

<!-- test: contains "red circle", "blue square" -->
```python
import base64
import requests
from sightline.utils import launch_server_cmd, print_highlight, terminate_process, wait_for_server

server, port = launch_server_cmd("python3 -m sightline.launch_server")
wait_for_server(f"http://localhost:{port}", process=server)

picture = base64.b64encode(open("src/sightline/demo/samples/shapes.png", "rb").read()).decode()
answer = requests.post(
    f"http://localhost:{port}/generate",
    json={
        "text": "<|im_start|>user\\n<|vision_start|><|image_pad|><|vision_end|>What is in this image?<|im_end|>\\n"
        "<|im_start|>assistant\\n",
        "image_data": picture,
        "sampling_params": {"temperature": 0, "max_new_tokens": 100},
    },
)
print_highlight(answer.json()["text"])
terminate_process(server)
```

## What differs

| | there | here |
|---|---|---|
| a model's name in requests | SGLang takes any | the served name, the path, its last part, or `default`; another is a 404 |
| picture URLs | any address; SGLang also opens files of the server | public addresses only; `--allow-private-media`, `--allowed-media-domains` and `--allowed-local-media-path` open more |
| `image_url.detail` | ignored | `low` is at most 512 x 512 pixels |
| pictures that cannot be used | often a 5xx | a 4xx with one of OpenAI's image codes and `x-should-retry: false` |
| SGLang's error bodies | flat | `{"error": {...}}` as OpenAI's |
| `usage.prompt_tokens_details` | behind a flag | always, with `cached_tokens` and `image_tokens` |
| special tokens in a chat's text | count as such | are plain text; in `/v1/completions` and `/generate` they count |
| a chat template for pictures | `--chat-template` needed for some models | the checkpoint's own, or its family's when that has no place for pictures |
| fields that are not implemented | ignored | a 400 that names them |
| `GET /v1/models/{name}` | missing in vLLM | there |
| one model on several machines | SGLang's `--nnodes`, `--node-rank`, `--dist-init-addr` | the same flags, and a secret, without which the start ends: `SIGHTLINE_DIST_SECRET`. [Operations](operations.md#one-model-on-several-machines) |
"""

ENDPOINTS = """
## Endpoints

| SGLang | vLLM | here |
|---|---|---|
| `/v1/chat/completions`, `/v1/completions`, `/v1/responses`, `/v1/models` | the same | the same; responses are not stored |
| `/generate` | `/inference/v1/generate` | `/generate`, SGLang's form |
| `/tokenize`, `/v1/tokenize`, `/detokenize`, `/v1/detokenize` | `/tokenize`, `/detokenize` | both forms |
| `/model_info`, `/get_model_info`, `/server_info`, `/get_server_info` | `/server_info`, `/version` | all of them |
| `/health`, `/health_generate`, `/ready` | `/health`, `/ping`, `/ready` | `/health`, `/readyz`, `/livez`, `/startupz`, `/ping`, `/health_generate` |
| `/flush_cache` | `/reset_prefix_cache`, `/reset_mm_cache` | `/flush_cache` |
| `/abort_request` | | `/abort_request` |
| `/encode`, `/classify`, `/v1/embeddings`, `/v1/rerank`, `/v1/score` | the same | not served: generating models only |
| `/v1/audio/*`, `/v1/realtime` | the same | not served: text and pictures only |
| `/v1/messages`, `/api/*` | `/v1/messages` | not served |
| `/load_lora_adapter`, `/update_weights_*` | `/v1/load_lora_adapter` | not served |
"""


def migrating_page() -> str:
    """The whole page."""
    parts = [HEAD, "\n## Flags with another name here\n\n| SGLang, vLLM | here |\n|---|---|\n"]
    for _, (ours, *others), *_ in declared(ServerConfig):
        parts += [f"| `{other}` | `{ours}` |\n" for other in others]
    parts.append("\nFlags that are spelled as here mean the same: see [Configuration](configuration.md).\n")
    for origin in ("SGLang", "vLLM"):
        parts.append(f"\n## Other flags of {origin}\n\nWhat is not accepted ends the start with this reason.\n\n")
        parts.append("| flag | accepted | why |\n|---|---|---|\n")
        parts += [_row(flag) for flag in foreign_flags(ServerConfig) if flag.origin == origin]
    return "".join([*parts, ENDPOINTS])


def _row(flag: ForeignFlag) -> str:
    accepted = "yes, changes nothing" if ANY in flag.accepted else f"`{flag.shown}`" if flag.shown else "no"
    return f"| {', '.join(f'`{option}`' for option in flag.options)} | {accepted} | {flag.why} |\n"
