"""What OpenAI's clients may send and must get back, row by row: each row is a claim and the check that proves it.

`test_conformance.py` runs the rows; `scripts/write_docs.py` writes them down as docs/compatibility.md. Marks: `works`, `accepted`
(read, without effect on the answer, echoed where the response has the field), `refused` (400 that names the field).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import requests

from tests.server.conftest import ask, data_url, image_part, picture

WORKS, ACCEPTED, REFUSED = "works", "accepted", "refused"


@dataclass
class Api:
    """One server, and short ways to ask it."""

    url: str
    defaults: dict[str, Any] = field(default_factory=lambda: {"temperature": 0, "max_tokens": 4})

    def post(self, path: str, body: dict, **options: Any) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=60, **options)

    def ok(self, path: str, **body: Any) -> dict:
        response = self.post(path, body)
        assert response.status_code == 200, response.text
        return response.json()

    def chat(self, **body: Any) -> dict:
        """A chat completion."""
        return self.ok("/v1/chat/completions", **{"messages": ask("hello"), **self.defaults, **body})

    def text(self, **body: Any) -> str:
        """The answer's text."""
        return self.chat(**body)["choices"][0]["message"]["content"]

    def complete(self, **body: Any) -> dict:
        return self.ok("/v1/completions", **{"prompt": "hello", **self.defaults, **body})

    def respond(self, **body: Any) -> dict:
        return self.ok("/v1/responses", **{"input": "hello", "temperature": 0, "max_output_tokens": 4, **body})

    def generate(self, sampling_params: dict | None = None, **body: Any) -> Any:
        sampling = {"max_new_tokens": 4, "temperature": 0, **(sampling_params or {})}
        prompt = {} if "input_ids" in body else {"text": "hello"}
        return self.ok("/generate", **{**prompt, "sampling_params": sampling, **body})

    def frames(self, path: str, **body: Any) -> list[Any]:
        """`data:` objects of a stream; [DONE] stays a string."""
        response = self.post(path, {"stream": True, **body})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]

    def chunks(self, **body: Any) -> list[dict]:
        """The chunks of a chat's stream, without [DONE]."""
        *chunks, done = self.frames("/v1/chat/completions", **{"messages": ask("hello"), **self.defaults, **body})
        assert done == "[DONE]"
        return chunks

    def events(self, **body: Any) -> list[dict]:
        return self.frames("/v1/responses", **{"input": "hello", "temperature": 0, "max_output_tokens": 4, **body})

    def refused(
        self, param: str, path: str = "/v1/chat/completions", status: int = 400, code: str | None = None, **body: Any
    ) -> None:
        """A permanent error that names the field."""
        need = {"/v1/chat/completions": {"messages": ask("hello")}, "/v1/completions": {"prompt": "hello"}}
        need["/v1/responses"] = {"input": "hello"}
        response = self.post(path, {**need.get(path, {}), **body})
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param, error
        assert code is None or error["code"] == code, error
        assert response.headers["x-should-retry"] == "false"


@dataclass
class Row:
    """One line of the table. check: raises AssertionError where the claim is false."""

    section: str
    name: str
    mark: str
    note: str
    check: Callable[[Api], None]

    @property
    def id(self) -> str:
        return f"{self.section}: {self.name}"


ROWS: list[Row] = []


def row(section: str, name: str, mark: str, note: str = "") -> Callable[[Callable[[Api], None]], Callable[[Api], None]]:
    """Declare the decorated function as the check of a row."""

    def declare(check: Callable[[Api], None]) -> Callable[[Api], None]:
        ROWS.append(Row(section, name, mark, note, check))
        return check

    return declare


def accepted(section: str, name: str, value: Any, note: str = "", path: str = "/v1/chat/completions") -> None:
    """A row for a field that changes nothing."""
    need: dict[str, dict] = {
        "/v1/chat/completions": {"messages": ask("hello"), "max_tokens": 4},
        "/v1/completions": {"prompt": "hello", "max_tokens": 4},
        "/v1/responses": {"input": "hello", "max_output_tokens": 4},
    }

    def texts(answer: dict) -> Any:
        if "output" in answer:
            return answer["output"][0]["content"]
        return [c.get("message") or c["text"] for c in answer["choices"]]

    def check(api: Api) -> None:
        body = {**need[path], "temperature": 0}
        assert texts(api.ok(path, **body, **{name: value})) == texts(api.ok(path, **body))

    ROWS.append(Row(section, name, ACCEPTED, note, check))


def refused(
    section: str, name: str, value: Any, note: str = "", path: str = "/v1/chat/completions", param: str | None = None
) -> None:
    """A row for a field that would change the answer and is not served."""
    ROWS.append(
        Row(
            section,
            name,
            REFUSED,
            note,
            lambda api: api.refused(param or name.split()[0], path, **{name.split()[0]: value}),
        )
    )


PNG = data_url(picture(1))
PICTURE_TOKENS = 12
__all__ = [
    "ACCEPTED",
    "PICTURE_TOKENS",
    "PNG",
    "REFUSED",
    "ROWS",
    "WORKS",
    "Api",
    "Row",
    "accepted",
    "image_part",
    "refused",
    "row",
]
