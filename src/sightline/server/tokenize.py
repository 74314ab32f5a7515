"""POST /tokenize and /detokenize: text, or a conversation with pictures, to token ids and back, without computing anything."""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response

from sightline.errors import RequestError
from sightline.server.admission import ClientGone, note
from sightline.server.chat import chat_prompt
from sightline.server.exchange import check_ids, check_model
from sightline.server.lifecycle import Lifecycle
from sightline.server.schema import Body, ChatCompletionRequest
from sightline.server.sse import until_client_goes

router = APIRouter()


class TokenizeRequest(ChatCompletionRequest):
    """Body of POST /tokenize: a raw `prompt`, or `messages` and whatever else a chat completion takes."""

    messages: list[dict[str, Any]] = Field(default_factory=list)
    prompt: str | list[str] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    def check(self) -> None:
        """One of the two forms."""
        if self.prompt is None:
            super().check()
        elif self.messages:
            raise RequestError("Send either prompt or messages.", param="prompt")
        elif not self.prompt and isinstance(self.prompt, list):
            raise RequestError("prompt must hold at least one text.", param="prompt", code="empty_array")


class DetokenizeRequest(Body):
    """Body of POST /detokenize."""

    tokens: list[int] | list[list[int]]
    model: str | None = None
    skip_special_tokens: bool | None = None


@router.post("/tokenize")
@router.post("/v1/tokenize")
async def tokenize(request: Request) -> Response:
    """Token ids of `prompt`, or of `messages` with their pictures, and how many."""
    lifecycle: Lifecycle = request.app.state.lifecycle
    body = TokenizeRequest.parse(await request.body())
    check_model(lifecycle, body.model)
    with lifecycle.admit():
        try:
            counted = await until_client_goes(request.receive, _counted(lifecycle, body))
        except ClientGone as error:
            note(error)
            return Response(status_code=499)
    return JSONResponse(_answer(lifecycle, counted, body))


class _Counted(NamedTuple):
    ids: list[int]
    num_image: int


async def _counted(lifecycle: Lifecycle, body: TokenizeRequest) -> list[_Counted]:
    if body.prompt is None:
        prompt = await chat_prompt(lifecycle, body)
        return [_Counted(prompt.input_ids.tolist(), prompt.num_image_tokens)]
    texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    add_bos = body.add_special_tokens is not False
    encode = lifecycle.pipeline.encode
    return await asyncio.to_thread(lambda: [_Counted(encode(text, add_bos=add_bos), 0) for text in texts])


def _answer(lifecycle: Lifecycle, counted: list[_Counted], body: TokenizeRequest) -> dict[str, Any]:
    """SGLang's lists for a list of prompts, vLLM's form with the pictures' share for one."""
    to_token = lifecycle.pipeline.tokenizer.id_to_token
    strings = [list(map(to_token, each.ids)) if body.return_token_strs else None for each in counted]
    length = lifecycle.pipeline.context_length
    if isinstance(body.prompt, list):
        ids = [each.ids for each in counted]
        return {"count": list(map(len, ids)), "max_model_len": length, "tokens": ids, "token_strs": strings}
    (only,) = counted
    return {
        "count": len(only.ids),
        "max_model_len": length,
        "tokens": only.ids,
        "token_strs": strings[0],
        "image_tokens": only.num_image,
    }


@router.post("/detokenize")
@router.post("/v1/detokenize")
async def detokenize(request: Request) -> Response:
    """The text of token ids, special tokens included unless `skip_special_tokens`."""
    lifecycle: Lifecycle = request.app.state.lifecycle
    body = DetokenizeRequest.parse(await request.body())
    check_model(lifecycle, body.model)
    is_list = bool(body.tokens) and isinstance(body.tokens[0], list)
    many: list[list[int]] = body.tokens if is_list else [body.tokens]  # type: ignore[assignment, list-item]
    for ids in many:
        check_ids(lifecycle, ids, "tokens")
    skip = bool(body.skip_special_tokens)
    with lifecycle.admit():
        tokenizer = lifecycle.pipeline.tokenizer
        texts = await asyncio.to_thread(lambda: [tokenizer.decode(ids, skip_special_tokens=skip) for ids in many])
    text = texts if is_list else texts[0]
    # vLLM's clients read `prompt`, SGLang's `text`.
    return JSONResponse({"prompt": text, "text": text})
