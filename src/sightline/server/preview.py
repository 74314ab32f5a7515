"""POST /v1/images/preview: what the model sees of pictures, without asking it anything."""

from __future__ import annotations

import base64
import re
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response

from sightline.errors import RequestError
from sightline.prompt.caller import caller
from sightline.prompt.preview import Preview, preview
from sightline.prompt.processor import MindsCompany, PixelLimits
from sightline.server.admission import ClientGone, note
from sightline.server.exchange import check_model, renamed
from sightline.server.lifecycle import Lifecycle
from sightline.server.schema import Body, PixelBounds
from sightline.server.sse import until_client_goes

router = APIRouter()


class PreviewRequest(Body):
    """Body of POST /v1/images/preview."""

    images: list[dict[str, Any]]
    model: str | None = None
    num_images: Annotated[int, Field(ge=1)] | None = None
    mm_processor_kwargs: PixelBounds | None = None

    def check(self) -> None:
        """Pictures and nothing else, as in a chat message."""
        super().check()
        if not self.images:
            raise RequestError("images must hold at least one image_url part.", param="images", code="empty_array")
        for i, part in enumerate(self.images):
            if part.get("type") != "image_url":
                raise RequestError(
                    f"images[{i}].type must be image_url, as in a chat message.", param=f"images[{i}].type"
                )


@router.post("/v1/images/preview")
async def images_preview(request: Request) -> Response:
    """The resized pictures, how they are divided into patches or tiles, and what they take in a prompt."""
    lifecycle: Lifecycle = request.app.state.lifecycle
    body = PreviewRequest.parse(await request.body())
    check_model(lifecycle, body.model)
    with lifecycle.admit(), renamed(_rename):
        try:
            data = await until_client_goes(request.receive, _previews(lifecycle, body))
        except ClientGone as error:
            note(error)
            return Response(status_code=499)
    return JSONResponse({"object": "list", "model": lifecycle.model_name, "data": data})


async def _previews(lifecycle: Lifecycle, body: PreviewRequest) -> list[dict[str, Any]]:
    pipeline, bounds = lifecycle.pipeline, body.mm_processor_kwargs
    limits = PixelLimits(bounds.min_pixels, bounds.max_pixels) if bounds else PixelLimits()
    if isinstance(pipeline.processor, MindsCompany):
        limits = pipeline.processor.limits_among(limits, max(body.num_images or 1, len(body.images)))
    # As a conversation of these pictures alone: the same fetch, checks and limits as for an answer.
    prompt = await pipeline.chat([{"role": "user", "content": body.images}], limits=limits)
    data = []
    for i, image in enumerate(prompt.images):
        seen = await preview(pipeline, prompt.pictures[image.digest])
        for view in seen.views:
            caller().hold(len(view.png))
        data.append(_item(i, seen))
    return data


def _item(index: int, seen: Preview) -> dict[str, Any]:
    views = [
        {
            "image_url": {"url": f"data:image/png;base64,{base64.b64encode(view.png).decode()}"},
            "width": view.width,
            "height": view.height,
            "cells": view.cells._asdict(),
        }
        for view in seen.views
    ]
    width, height = seen.size
    return {"index": index, "width": width, "height": height, "image_tokens": seen.num_tokens, "views": views}


def _rename(param: str) -> str:
    """messages[0].content[i], as the pipeline names it, is images[i] here."""
    return re.sub(r"^messages(?:\.?\[0\]\.content\.?(?=\[))?", "images", param)
