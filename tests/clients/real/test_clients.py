"""Every client's script, with the client unmodified, against one server of the bundled model."""

from __future__ import annotations

import pytest

from tests.clients.real.environments import HERE, node, output, python

PYTHON = [
    ("openai_sdk", "openai3", "picture streaming structured tools responses errors"),
    ("openai_sdk", "openai2", "picture streaming structured tools responses errors"),
    ("langchain_openai_", "openai3", "picture streaming structured tools responses"),
    ("llama_index_", "openai2", "picture streaming structured tools"),
    ("litellm_sdk", "openai2", "picture streaming structured tools errors"),
    ("litellm_proxy", "openai2", "picture streaming structured tools errors"),
    ("instructor_", "openai2", "tools structured"),
    ("pydantic_ai_", "openai3", "picture streaming structured tools responses"),
    ("openai_agents", "openai3", "picture streaming structured tools"),
    ("llm_cli", "openai3", "picture streaming structured offered tools"),
]
NODE = [
    ("openai", "picture streaming structured tools responses errors"),
    ("langchain", "picture streaming structured tools responses"),
    ("ai_sdk", "picture streaming structured tools"),
]


@pytest.mark.parametrize(("script", "environment", "checks"), PYTHON, ids=[f"{s}-{e}" for s, e, _ in PYTHON])
def test_python(server: str, script: str, environment: str, checks: str) -> None:
    printed = output([python(environment), HERE / "python" / f"{script}.py"], server)
    assert [line for line in printed.splitlines() if line in checks.split()] == checks.split()


@pytest.mark.parametrize(("script", "checks"), NODE, ids=[s for s, _ in NODE])
def test_node(server: str, script: str, checks: str) -> None:
    assert output([node(), HERE / "node" / f"{script}.mjs"], server).split() == checks.split()


def test_every_script_is_run() -> None:
    scripts = {path.stem for kind in ("python", "node") for path in (HERE / kind).glob("*.*") if path.suffix != ".json"}
    assert scripts - {"common"} == {s for s, _, _ in PYTHON} | {s for s, _ in NODE}
