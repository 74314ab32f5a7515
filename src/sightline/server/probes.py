"""Health, start-up progress and what the server is. Probes answer from the first moment and need no key."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

import sightline
from sightline.config import dump_public
from sightline.errors import NotFoundError, OverloadedError
from sightline.server import limits
from sightline.server.errors import error_response
from sightline.server.lifecycle import FAILED, LOADING, Lifecycle
from sightline.types import SamplingParams

router = APIRouter()

# Answered while the model loads, and without a key.
OPEN_PATHS = frozenset(
    {"/livez", "/readyz", "/ready", "/health", "/startupz", "/ping", "/version", "/v2/health/live", "/v2/health/ready"}
    # What the API looks like is no secret: it is the same for every server.
    | {"/docs", "/openapi.json"}
)

DEMO_NOTICE = (
    "sightline-tiny is a demonstration model for synthetic pictures: coloured shapes, their places and numbers, short "
    "words. It does not understand photographs."
)


def _lifecycle(request: Request) -> Lifecycle:
    lifecycle: Lifecycle = request.app.state.lifecycle
    return lifecycle


@router.get("/livez")
@router.get("/v2/health/live")
async def livez() -> Response:
    """The process runs."""
    return JSONResponse({"status": "alive"})


@router.get("/readyz")
@router.get("/ready")
@router.get("/health")
@router.get("/ping")
@router.get("/v2/health/ready")
async def readyz(request: Request) -> Response:
    """200 when a request would run now; else 503 with Retry-After and the reason."""
    lifecycle = _lifecycle(request)
    try:
        lifecycle.require_ready()
    except OverloadedError as error:
        return error_response(error)
    alive, total = lifecycle.engine.num_alive
    return JSONResponse({"status": "ready"} | ({"engines": {"alive": alive, "total": total}} if total > 1 else {}))


@router.get("/startupz")
async def startupz(request: Request) -> Response:
    """Where start-up stands: state, phase, progress (0 to 1 within the phase, or null), seconds."""
    lifecycle = _lifecycle(request)
    elapsed = lifecycle.ready_after if lifecycle.ready_after is not None else time.monotonic() - lifecycle.started
    fraction = lifecycle.progress.fraction
    loading = lifecycle.state == LOADING
    body = {
        "state": lifecycle.state,
        "phase": lifecycle.progress.phase,
        "progress": fraction,
        "detail": lifecycle.progress.detail,
        "elapsed_seconds": round(elapsed, 3),
        "demo": lifecycle.demo,
    }
    return JSONResponse(
        body, 503 if loading or lifecycle.state == FAILED else 200, {"retry-after": "1"} if loading else {}
    )


@router.get("/health_generate")
async def health_generate(request: Request) -> Response:
    """Run one token through the engine."""
    lifecycle = _lifecycle(request)
    with lifecycle.admit():
        prompt = await lifecycle.pipeline.text("a")
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        answer = await lifecycle.engine.submit(
            prompt, sampling, pipeline=lifecycle.pipeline, request_id=f"health-{time.monotonic_ns()}"
        )
        try:
            async for _ in answer:
                pass
        finally:
            answer.close()
    return JSONResponse({"status": "ready"})


@router.get("/version")
async def version() -> Response:
    """The server's version."""
    return JSONResponse({"version": sightline.__version__})


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The one model, as OpenAI lists it."""
    return JSONResponse({"object": "list", "data": [_model_card(_lifecycle(request))]})


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """One model; names may contain slashes."""
    lifecycle = _lifecycle(request)
    if not lifecycle.accepts_model(name):
        raise NotFoundError(f"The model {name[:200]!r} does not exist.", param="model", code="model_not_found")
    return JSONResponse(_model_card(lifecycle))


def _model_card(lifecycle: Lifecycle) -> dict[str, Any]:
    modalities = ["text", "image"] if lifecycle.pipeline.processor is not None else ["text"]
    card = {
        "id": lifecycle.model_name,
        "object": "model",
        "created": lifecycle.created,
        "owned_by": "sightline",
        "root": lifecycle.model_name,
        "max_model_len": lifecycle.pipeline.context_length,
        "architecture": {"input_modalities": modalities, "output_modalities": ["text"]},
    }
    return {**card, "demo": True, "description": DEMO_NOTICE} if lifecycle.demo else card


@router.get("/model_info")
@router.get("/get_model_info")
async def model_info(request: Request) -> Response:
    """SGLang's description of the model."""
    lifecycle = _lifecycle(request)
    return JSONResponse(
        {
            "model_path": lifecycle.model_name,
            "tokenizer_path": lifecycle.model_name,
            "served_model_name": lifecycle.model_name,
            "is_generation": True,
            "weight_version": "default",
            "load_format": lifecycle.config.load_format,
            "architectures": [lifecycle.pipeline.architecture],
            "has_image_understanding": lifecycle.pipeline.processor is not None,
            "has_audio_understanding": False,
            "preferred_sampling_params": lifecycle.sampling_defaults,
        }
    )


@router.get("/server_info")
@router.get("/get_server_info")
async def server_info(request: Request) -> Response:
    """Settings (without keys), limits, the memory plan, and counters since start."""
    lifecycle = _lifecycle(request)
    media, admission = lifecycle.pipeline.media, lifecycle.admission
    stats = msgspec.to_builtins(lifecycle.engine.stats)
    alive, total = lifecycle.engine.num_alive
    assert lifecycle.plan is not None
    return JSONResponse(
        {
            "version": sightline.__version__,
            "model": lifecycle.model_name,
            # Under SGLang's names too, for its tools.
            "model_path": lifecycle.model_name,
            "served_model_name": lifecycle.model_name,
            "max_total_num_tokens": lifecycle.plan.num_tokens,
            "internal_states": msgspec.to_builtins(lifecycle.engine.replica_stats),
            "engines": {"alive": alive, "total": total},
            "config": dump_public(lifecycle.config),
            "memory_plan": msgspec.to_builtins(lifecycle.plan),
            "ready_after_seconds": lifecycle.ready_after,
            "requests_in_flight": lifecycle.in_flight,
            "calls": {"received": admission.num_received, "in_flight": admission.num_calls, **admission.outcomes},
            "limits": {limit.name: limit.value for limit in limits.table(lifecycle.config, media.limits)},
            "media": vars(media.counters),
            "engine": stats,
        }
    )
