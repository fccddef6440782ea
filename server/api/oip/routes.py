"""The Open Inference Protocol over HTTP, at /v2: see https://github.com/kserve/open-inference-protocol.

Triton's extensions for binary tensors, classification and the model repository are supported. `docs/howto-oip.md`
is the page for clients, `server.api.oip.grpc` the same over gRPC.
"""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from server.api import params
from server.api.routes import predict
from server.api.services import Services, ServicesOf, request_id
from server.errors import BadRequest
from server.serving.resolver import Ref

from . import body, infer, models, tensors

INLINE_BYTES: Final = 64 * 1024  # a shorter JSON is parsed on the event loop, a longer one in a thread
PARSING: Final = 2  # of the long ones at once: a list of numbers takes ten times the memory of its text

_ERROR: Final[dict[int | str, dict[str, Any]]] = {
    "default": {
        "description": "What went wrong; `Lensrack-Code` holds its stable code.",
        "content": {
            "application/json": {
                "schema": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
            }
        },
    }
}
_INFER: Final[dict[str, Any]] = {
    "parameters": [
        {
            "name": body.LENGTH,
            "in": "header",
            "description": "Bytes of the JSON, where tensors' bytes follow it.",
            "schema": {"type": "integer"},
        }
    ],
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    },
}

router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"], responses=_ERROR)


async def _live(task: str) -> Ref:
    return infer.ref(task)


async def _version(task: str, version: str) -> Ref:
    return infer.ref(task, version)


Live = Annotated[Ref, Depends(_live)]
Version = Annotated[Ref, Depends(_version)]


@router.get("")
async def server_metadata() -> dict[str, Any]:
    return models.server()


@router.get("/health/live")
async def live() -> dict[str, bool]:
    """The process answers."""
    return {"live": True}


@router.get("/health/ready", response_model=dict[str, bool])
async def ready(services: ServicesOf) -> Response:
    """Predictions can be answered; otherwise 503."""
    state = await asyncio.to_thread(services.ready)
    return JSONResponse({"ready": state.ready}, 200 if state.ready else 503)


# --- models -----------------------------------------------------------------------------------------------------------


@router.get("/models/{task}")
async def model_metadata(services: ServicesOf, ref: Live) -> dict[str, Any]:
    return await models.metadata(services, ref)


@router.get("/models/{task}/versions/{version}")
async def version_metadata(services: ServicesOf, ref: Version) -> dict[str, Any]:
    return await models.metadata(services, ref)


@router.get("/models/{task}/ready")
async def model_ready(services: ServicesOf, ref: Live) -> dict[str, Any]:
    """The model exists. A version that is not on the device is loaded by its first request."""
    await models.find(services, ref)
    return {"name": ref.task, "ready": True}


@router.get("/models/{task}/versions/{version}/ready")
async def version_ready(services: ServicesOf, ref: Version) -> dict[str, Any]:
    await models.find(services, ref)
    return {"name": ref.task, "ready": True}


# --- inference --------------------------------------------------------------------------------------------------------


@router.post("/models/{task}/infer", response_model=dict[str, Any], openapi_extra=_INFER)
async def model_infer(request: Request, services: ServicesOf, ref: Live) -> Response:
    """Ask the live version, with one of the inputs `image`, `pixels` and `tensor`."""
    return await _infer(request, services, ref)


@router.post("/models/{task}/versions/{version}/infer", response_model=dict[str, Any], openapi_extra=_INFER)
async def version_infer(request: Request, services: ServicesOf, ref: Version) -> Response:
    """Ask a version by its digest, the unique beginning of it, or an alias."""
    return await _infer(request, services, ref)


async def _infer(request: Request, services: Services, ref: Ref) -> Response:
    parsed = await _read(request, services)
    key = request.headers.get("Lensrack-Key") or request_id(request)
    inference = infer.InferRequest(ref, parsed.images, parsed.outputs, parsed.timeout_us, key)
    outputs = await predict.unless_gone(request, infer.answer(services, inference))
    members: dict[str, Any] = {"model_name": ref.task, "model_version": outputs.version}
    if parsed.id:
        members["id"] = parsed.id
    headers = {**predict.server_timing(outputs.timings), "Lensrack-Version": outputs.version}
    return body.respond(members, tensors.output_tensors(outputs, parsed.outputs), headers)


async def _read(request: Request, services: Services) -> body.ParsedRequest:
    whole, settings = await request.body(), services.settings
    length = body.header_length(request.headers, whole)
    parse = partial(body.parse, whole, length, settings.max_images)
    if length <= INLINE_BYTES:
        return parse()
    parsed: body.ParsedRequest = await request.app.state.parsing.run(services.tenant, parse)
    return parsed


# --- the repository ---------------------------------------------------------------------------------------------------


@router.post("/repository/index")
async def repository_index(services: ServicesOf) -> list[dict[str, str]]:
    """All versions of all tasks. Each is READY, since each answers requests."""
    return await models.index(services)


@router.post("/repository/models/{task}/load", response_class=Response)
async def load(request: Request, services: ServicesOf, ref: Live) -> Response:
    """Make the live version resident, so that its first request need not wait for it."""
    await models.load(services, ref, await _parameters(request))
    return Response()


@router.post("/repository/models/{task}/unload", response_class=Response)
async def unload(services: ServicesOf, task: params.TaskOf) -> Response:
    """Free the device memory of the task's versions. The next request brings its version back."""
    await models.unload(services, task)
    return Response()


async def _parameters(request: Request) -> object:
    text = await request.body()
    try:
        members = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise BadRequest("expected a JSON body, got something else") from error
    if not isinstance(members, dict):
        raise BadRequest(f"expected a JSON object, got {type(members).__name__}")
    return members.get("parameters")
