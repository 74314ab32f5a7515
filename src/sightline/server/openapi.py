"""The description of the API at /openapi.json, and the page at /docs that shows it. Neither loads anything from elsewhere.

Request schemas are those that requests are read with; answers are described here.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any, NamedTuple

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.responses import HTMLResponse, Response

from sightline import demo
from sightline.server.completions import CompletionRequest
from sightline.server.native import AbortRequest, GenerateRequest
from sightline.server.preview import PreviewRequest
from sightline.server.responses import ResponsesRequest
from sightline.server.schema import Body, ChatCompletionRequest
from sightline.server.tokenize import DetokenizeRequest, TokenizeRequest

router = APIRouter(include_in_schema=False)

_REF = "#/components/schemas/"


@router.get("/docs")
async def docs() -> Response:
    """A page for people over /openapi.json."""
    return HTMLResponse(Path(__file__).with_name("docs.html").read_text(encoding="utf-8"))


class _Operation(NamedTuple):
    """body: what a request is read with. answer: name of the schema of a 200. streams: whether it may be events instead."""

    body: type[Body]
    answer: str
    example: dict[str, Any]
    streams: bool = False


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REF + name}


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _either(*schemas: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": list(schemas)}


_TEXT, _COUNT, _NUMBER, _NULL = {"type": "string"}, {"type": "integer"}, {"type": "number"}, {"type": "null"}
_MAYBE_TEXT, _ANY_OBJECT = _either(_TEXT, _NULL), {"type": "object"}
_FINISH = {"enum": ["stop", "length", "tool_calls"]}
_USAGE = _object(
    {
        "prompt_tokens": _COUNT,
        "completion_tokens": _COUNT,
        "total_tokens": _COUNT,
        "prompt_tokens_details": _object({"cached_tokens": _COUNT, "image_tokens": _COUNT, "text_tokens": _COUNT}),
    }
)
_HEAD = {"id": _TEXT, "created": _COUNT, "model": _TEXT}
_EVENT = {**_object({"data": _TEXT}, {"event": _TEXT}), "description": "One server-sent event, with stream: true."}
_STOP_REASON = {"stop_reason": _either(_TEXT, _COUNT, _NULL)}

_PARTS = {
    "TextPart": _object({"type": {"const": "text"}, "text": _TEXT}),
    "ImagePart": _object(
        {
            "type": {"const": "image_url"},
            "image_url": _object(
                {"url": {**_TEXT, "description": "data:image/...;base64,... or http(s)://..."}},
                {"detail": {"enum": ["auto", "low", "high", "original"]}},
            ),
        }
    ),
    "Message": _object(
        {"role": {"enum": ["system", "developer", "user", "assistant", "tool", "function"]}},
        {"content": _either(_TEXT, _list(_either(_ref("TextPart"), _ref("ImagePart"), _ANY_OBJECT)), _NULL)},
    ),
}
_ANSWERS = {
    "Error": _object({"error": _object({"message": _TEXT, "type": _TEXT, "param": _MAYBE_TEXT, "code": _MAYBE_TEXT})}),
    "ChatCompletion": _object(
        {
            **_HEAD,
            "object": {"const": "chat.completion"},
            "choices": _list(
                _object(
                    {
                        "index": _COUNT,
                        "message": _object(
                            {"role": {"const": "assistant"}, "content": _MAYBE_TEXT}, {"tool_calls": _list(_ANY_OBJECT)}
                        ),
                        "finish_reason": _FINISH,
                        "logprobs": _either(_ANY_OBJECT, _NULL),
                    },
                    _STOP_REASON,
                )
            ),
            "usage": _ref("Usage"),
        }
    ),
    "Completion": _object(
        {
            **_HEAD,
            "object": {"const": "text_completion"},
            "choices": _list(
                _object(
                    {
                        "index": _COUNT,
                        "text": _TEXT,
                        "finish_reason": _FINISH,
                        "logprobs": _either(_ANY_OBJECT, _NULL),
                    },
                    _STOP_REASON,
                )
            ),
            "usage": _ref("Usage"),
        }
    ),
    "Response": _object(
        {
            "id": _TEXT,
            "object": {"const": "response"},
            "created_at": _COUNT,
            "status": {"enum": ["completed", "incomplete"]},
            "model": _TEXT,
            "output": _list(_object({"id": _TEXT, "type": _TEXT, "status": _TEXT})),
            "usage": _object({"input_tokens": _COUNT, "output_tokens": _COUNT, "total_tokens": _COUNT}),
        }
    ),
    "InputTokens": _object({"object": {"const": "response.input_tokens"}, "input_tokens": _COUNT}),
    "Tokens": _object(
        {
            "count": _either(_COUNT, _list(_COUNT)),
            "max_model_len": _COUNT,
            "tokens": _either(_list(_COUNT), _list(_list(_COUNT))),
            "token_strs": _either(_list({}), _NULL),
        },
        {"image_tokens": _COUNT},
    ),
    "Text": _object({"text": _either(_TEXT, _list(_TEXT)), "prompt": _either(_TEXT, _list(_TEXT))}),
    "Generated": _object(
        {
            "text": _TEXT,
            "output_ids": _list(_COUNT),
            "meta_info": _object({"id": _TEXT, "prompt_tokens": _COUNT, "completion_tokens": _COUNT}),
        }
    ),
    "GeneratedOneOrMany": _either(_ref("Generated"), _list(_ref("Generated"))),
    "Aborted": _object({"aborted": _COUNT}),
    "Previews": _object(
        {
            "object": {"const": "list"},
            "model": _TEXT,
            "data": _list(
                _object(
                    {
                        "index": _COUNT,
                        "width": _COUNT,
                        "height": _COUNT,
                        "image_tokens": _COUNT,
                        "views": _list(_ref("PreviewedView")),
                    }
                )
            ),
        }
    ),
    "PreviewedView": _object(
        {
            "image_url": _object({"url": _TEXT}),
            "width": _COUNT,
            "height": _COUNT,
            "cells": _object(
                {
                    "unit": {"enum": ["patch", "tile"]},
                    "rows": _COUNT,
                    "columns": _COUNT,
                    "width": _COUNT,
                    "height": _COUNT,
                }
            ),
        }
    ),
    "Usage": _USAGE,
}


def _picture() -> str:
    data = (Path(demo.__file__).parent / "samples" / "shapes.png").read_bytes()
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _operations() -> dict[str, _Operation]:
    url = _picture()
    question = "What is in this image?"
    parts = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": url}}]
    messages = [{"role": "user", "content": parts}]
    items = [{"type": "input_text", "text": question}, {"type": "input_image", "image_url": url}]
    given = {"input": [{"role": "user", "content": items}]}
    sampling = {"max_new_tokens": 16, "temperature": 0}
    return {
        "/v1/chat/completions": _Operation(
            ChatCompletionRequest, "ChatCompletion", {"messages": messages, "max_tokens": 100}, streams=True
        ),
        "/v1/completions": _Operation(
            CompletionRequest, "Completion", {"prompt": "A red", "max_tokens": 8}, streams=True
        ),
        "/v1/responses": _Operation(ResponsesRequest, "Response", {**given, "max_output_tokens": 100}, streams=True),
        "/v1/responses/input_tokens": _Operation(ResponsesRequest, "InputTokens", given),
        "/v1/images/preview": _Operation(PreviewRequest, "Previews", {"images": parts[1:]}),
        "/tokenize": _Operation(TokenizeRequest, "Tokens", {"messages": messages}),
        "/v1/tokenize": _Operation(TokenizeRequest, "Tokens", {"prompt": question}),
        "/detokenize": _Operation(DetokenizeRequest, "Text", {"tokens": [40, 41, 42]}),
        "/v1/detokenize": _Operation(DetokenizeRequest, "Text", {"tokens": [[40, 41], [42]]}),
        "/generate": _Operation(
            GenerateRequest,
            "GeneratedOneOrMany",
            {"text": question, "image_data": url, "sampling_params": sampling},
            streams=True,
        ),
        "/abort_request": _Operation(AbortRequest, "Aborted", {"rid": "my-request"}),
    }


def install(app: FastAPI) -> None:
    """Let the application describe itself with `document`."""

    def openapi() -> dict[str, Any]:
        app.openapi_schema = app.openapi_schema or document(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def document(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description of the routes, with the bodies, answers and errors that it cannot see."""
    schema = get_openapi(
        title="sightline",
        version=app.version,
        description="Answers about pictures and text, in OpenAI's dialect and in SGLang's.",
        routes=app.routes,
    )
    components = schema.setdefault("components", {})
    schemas: dict[str, Any] = {**_PARTS, **_ANSWERS}
    components["schemas"] = schemas
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    schema["security"] = [{"key": []}, {}]
    error = {
        "description": "What is wrong, and the remedy.",
        "content": {"application/json": {"schema": _ref("Error")}},
    }
    operations = _operations()
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            operation["responses"] = {"200": operation["responses"]["200"], "4XX": error, "5XX": error}
            if path in operations and method in ("post", "put"):
                _describe(operation, operations[path], schemas)
            elif "application/json" in operation["responses"]["200"]["content"]:
                operation["responses"]["200"]["content"] = {"application/json": {"schema": _ANY_OBJECT}}
    # /startupz answers 503 with its progress while the model loads.
    schema["paths"]["/startupz"]["get"]["responses"]["5XX"] = schema["paths"]["/startupz"]["get"]["responses"]["200"]
    return schema


def _describe(operation: dict[str, Any], described: _Operation, schemas: dict[str, Any]) -> None:
    name = described.body.__name__
    if name not in schemas:
        body = described.body.model_json_schema(ref_template=_REF + "{model}")
        schemas.update(body.pop("$defs", {}))
        for field, part in (("messages", "Message"), ("images", "ImagePart")):
            if field in body["properties"]:
                body["properties"][field]["items"] = _ref(part)
        schemas[name] = body
    content = {"application/json": {"schema": _ref(name), "example": described.example}}
    operation["requestBody"] = {"required": True, "content": content}
    answer: dict[str, Any] = {"application/json": {"schema": _ref(described.answer)}}
    if described.streams:
        answer["text/event-stream"] = {"schema": _EVENT}
    operation["responses"]["200"] = {"description": "The answer.", "content": answer}
