"""The API's description: complete, usable without a network, true in its examples, and kept under random requests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode, checks

from sightline.server import openapi, playground
from sightline.server.app import MODULES
from tests import tiny
from tests.servers import ServerProcess

# What the schema allows may still be refused: that a prompt fits the context is no matter of types.
EXCLUDED = [checks.positive_data_acceptance, checks.negative_data_rejection]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Its own server: random requests ask for very long answers, so the context is short."""
    arguments = [str(tiny.qwen2_vl()), "--served-model-name", "tiny", "--context-length", "128"]
    with ServerProcess([*arguments, "--media-timeout", "0.5"]) as process:
        process.wait_ready()
        yield process.base_url
        assert process.running
        assert process.terminate() == 0
        assert "Traceback" not in process.log()


@pytest.fixture(scope="module")
def document(url: str) -> dict[str, Any]:
    return requests.get(f"{url}/openapi.json", timeout=10).json()


def described() -> dict[str, Any]:
    """The document of a server's routes, without the server."""
    app = FastAPI(version="0")
    for module in MODULES:
        app.include_router(module.router)
    return openapi.document(app)


OPERATIONS = [found.ok() for found in schemathesis.openapi.from_dict(described()).get_all_operations()]
# Of 2,000 random requests, those with a body get their share; half of them break the schema on purpose.
CASES = {True: 165, False: 10}


def test_there_are_two_thousand_random_requests() -> None:
    assert sum(CASES[bool(operation.body)] for operation in OPERATIONS) >= 2000


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_random_requests(operation: Any, url: str) -> None:
    """No 5xx, and every answer is as described."""
    modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE] if operation.body else [GenerationMode.POSITIVE]
    cases = st.one_of([operation.as_strategy(generation_mode=mode) for mode in modes])

    @settings(
        max_examples=CASES[bool(operation.body)],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def check(case: schemathesis.Case) -> None:
        response = case.call(base_url=url, timeout=30)
        case.validate_response(response, excluded_checks=EXCLUDED)

    check()


def examples(document: dict[str, Any]) -> dict[str, dict]:
    return {
        path: methods["post"]["requestBody"]["content"]["application/json"]["example"]
        for path, methods in document["paths"].items()
        if "requestBody" in methods.get("post", {})
    }


def test_every_route_is_described(document: dict[str, Any]) -> None:
    pages = (openapi, playground)
    paths = {r.path.replace(":path", "") for m in MODULES if m not in pages for r in m.router.routes}
    assert paths == set(document["paths"])
    assert len(examples(document)) >= 10


@pytest.mark.parametrize("operation", [o for o in OPERATIONS if o.body], ids=lambda operation: operation.label)
def test_every_example_runs(operation: Any, server: str) -> None:
    """With the bundled model, whole and streamed, and the answers are as described."""
    body = examples(described())[operation.path]
    for stream in (False, True):
        case = operation.Case(body={**body, "stream": stream}, media_type="application/json")
        response = case.call(base_url=server, timeout=60)
        assert response.status_code == 200, response.text
        case.validate_response(response, excluded_checks=EXCLUDED)


def test_the_example_of_a_picture_is_answered(server: str) -> None:
    body = examples(requests.get(f"{server}/openapi.json", timeout=10).json())["/v1/chat/completions"]
    assert "data:image/png;base64," in str(body)
    answer = requests.post(f"{server}/v1/chat/completions", json=body, timeout=60).json()
    assert re.search(r"circle|square|triangle", answer["choices"][0]["message"]["content"])


def test_the_page_needs_no_network_and_no_key(keyed_server: str) -> None:
    page = requests.get(f"{keyed_server}/docs", timeout=10)
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page.text)
    assert requests.get(f"{keyed_server}/openapi.json", timeout=10).json()["openapi"].startswith("3.")
    assert requests.get(f"{keyed_server}/redoc", timeout=10).status_code == 401
