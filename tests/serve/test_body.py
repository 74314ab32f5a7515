"""What a body tells the router: equal beginnings and equal pictures, in every dialect, and nothing across tenants."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from sightline.engine.routing import Footprint, Router
from sightline.serve.body import body_footprint

A, B = "data:image/png;base64,AAAA", "data:image/png;base64,BBBB"
LONG = "One sentence of some length, which is here again and again. " * 40


def mark(tenant: bytes = b"", **fields: Any) -> Footprint:
    return body_footprint(json.dumps(fields).encode(), tenant)


def reused(prompt: Footprint, after: Footprint) -> float:
    router: Router[int] = Router("cache_aware", prefix_tokens=10**6, picture_tokens=10**6)
    router.record(after, 0)
    return router.reused(prompt, 0)


def chat(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}]


def picture(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


def test_settings_do_not_matter_and_beginnings_do() -> None:
    first = mark(messages=chat(picture(A), LONG), temperature=0)
    assert reused(mark(messages=chat(picture(A), LONG), stream=True), first) == 1.0
    longer = mark(messages=[*chat(picture(A), LONG), {"role": "assistant", "content": LONG}])
    assert 0.5 < reused(longer, first) < 0.9
    assert reused(mark(messages=chat("else", picture(B), LONG)), first) < 0.1


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": chat(LONG, picture(A))},
        {"messages": chat(LONG, {"type": "image_url", "image_url": A})},
        {"input": chat(LONG, {"type": "input_image", "image_url": A})},
        {"text": LONG, "image_data": A},
        {"text": LONG, "image_data": [A]},
    ],
)
def test_a_picture_is_found_in_every_dialect(fields: dict[str, Any]) -> None:
    """Whatever stands before it."""
    (use,) = mark(**fields).pictures
    assert reused(mark(messages=chat(picture(A))), mark(**fields)) > 0.8
    assert use.offset > 0
    assert reused(mark(messages=chat(picture(B))), mark(**fields)) == pytest.approx(0.0, abs=0.1)


def test_tenants_share_no_prefix() -> None:
    assert reused(mark(b"a", prompt=LONG), mark(b"b", prompt=LONG)) == 0.0
    assert reused(mark(b"a", prompt=LONG), mark(b"a", prompt=LONG)) == 1.0


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"7", b"\xff", b'{"model": "x"}', b'{"messages": 7}'])
def test_what_is_no_prompt_goes_by_load(body: bytes) -> None:
    assert body_footprint(body) == Footprint(0, (), ())


def test_without_ray_the_message_names_the_extra() -> None:
    code = "import sys; sys.modules['ray'] = None; import sightline.serve.ray"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "pip install 'sightline[ray]'" in done.stderr.splitlines()[-1]
