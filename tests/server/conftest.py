"""A server of a tiny random checkpoint: meaningless answers, every code path."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from tests.servers import ServerProcess

OPERATOR = {"Authorization": "Bearer operator"}


@pytest.fixture(scope="session")
def tiny_process() -> Iterator[ServerProcess]:
    with ServerProcess(
        [str(tiny.qwen2_vl()), "--served-model-name", "tiny", "--allow-private-media", "--admin-api-key", "operator"]
    ) as process:
        process.wait_ready()
        yield process
        assert process.running, f"the server died during the tests:\n{process.log()}"
        assert process.terminate() == 0


@pytest.fixture(scope="session")
def keyed_server() -> Iterator[str]:
    """A server that wants one of two keys, `alpha` or `beta`."""
    with ServerProcess([str(tiny.qwen2_vl()), "--api-key", "alpha", "--api-key", "beta"]) as process:
        process.wait_ready()
        yield process.base_url
        assert process.running, f"the server died during the tests:\n{process.log()}"
        assert process.terminate() == 0


@pytest.fixture(scope="session")
def tiny_server(tiny_process: ServerProcess) -> str:
    return tiny_process.base_url


def picture(seed: int, width: int = 120, height: int = 90, kind: str = "PNG") -> bytes:
    """Encoded noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def data_url(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def image_part(seed: int, **size: int) -> dict:
    return {"type": "image_url", "image_url": {"url": data_url(picture(seed, **size))}}


def ask(*parts: dict | str) -> list[dict]:
    """One user message."""
    return [{"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}]
