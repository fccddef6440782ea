"""Predictions over HTTP: images in any envelope in, labels and the duration of each step out."""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import math
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, Final, TypeVar

from fastapi import APIRouter, Query, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from lensrack import wire
from prompts_store import StoreError
from server.api import forms, params, problems, raw_pixels
from server.api.services import Services, ServicesOf, request_id
from server.errors import BadRequest, ServiceError, Unprocessable
from server.serving.answers import Answer, Scored, Timings
from server.serving.decoding import Image
from server.serving.resolver import Ref

T = TypeVar("T")
log = logging.getLogger(__name__)
router = APIRouter(tags=["predictions"])

TopK = Annotated[int, Query(ge=1, le=1000, description="How many labels to give for each image, best first.")]
Tasks = Annotated[
    list[str],
    Query(
        alias="task",
        min_length=1,
        description="`task`, `task@alias`, `task@version`; `@one+other` for both; repeatable.",
    ),
]

JSON: Final = "application/json"
_ENVELOPES: Final = (*params.IMAGE_TYPES, forms.FORM, JSON)
IMAGES: Final[dict[str, Any]] = {
    "required": True,
    "content": {
        **{kind: {"schema": {"type": "string", "format": "binary"}} for kind in (*params.IMAGE_TYPES, params.OCTETS)},
        forms.FORM: {
            "schema": {
                "type": "object",
                "required": ["images"],
                "properties": {"images": {"type": "array", "items": {"type": "string", "format": "binary"}}},
            }
        },
        JSON: {"schema": {"$ref": "#/components/schemas/PredictRequest"}},
    },
}
_PIXELS: Final[dict[str, Any]] = {
    **IMAGES,
    "content": {**IMAGES["content"], raw_pixels.NPY: {"schema": {"type": "string", "format": "binary"}}},
}
KEY_HEADER: Final[dict[str, Any]] = {
    "name": "Lensrack-Key",
    "in": "header",
    "description": "Requests with the same key see the same side of a canary.",
    "schema": {"type": "string"},
}
_BODY: Final[dict[str, Any]] = {
    "parameters": [
        {
            "name": "Lensrack-Timeout",
            "in": "header",
            "description": "Seconds after which the answer is useless; at most the server's limit.",
            "schema": {"type": "number", "exclusiveMinimum": 0},
        },
        KEY_HEADER,
        {
            "name": wire.GEOMETRY_HEADER,
            "in": "header",
            "description": "How the client has cut the pixels of a NumPy body; a version that is cut otherwise answers "
            f"409 geometry_differs. `{wire.Geometry.EXAMPLE}`",
            "schema": {"type": "string"},
        },
    ],
    "requestBody": _PIXELS,
}
_HEADERS: Final[dict[str, Any]] = {
    "Server-Timing": {"description": "decode, queue and compute in milliseconds.", "schema": {"type": "string"}}
}
_VERSION: Final[dict[str, Any]] = {
    "Lensrack-Version": {
        "description": "The version that answered; an ensemble's joined by `+`.",
        "schema": {"type": "string"},
    }
}


@router.post(
    "/predict/{task}",
    response_model=wire.PredictResponse,
    responses={200: {"headers": {**_HEADERS, **_VERSION}}},
    openapi_extra=_BODY,
)
async def predict(request: Request, services: ServicesOf, refs: params.RefsOf, top_k: TopK = 5) -> Response:
    """Ask one task, `task`, `task@alias` or `task@version`, about one or more images.

    `task@live+candidate` is an ensemble: several versions answer in one batch, a row each, and their probabilities are
    averaged. A NumPy body (uint8 [n, S, S, 3], RGB) holds images that the client has cut to the version's size itself.
    """
    timeout_s = _timeout_s(request, services)
    images = await read_pixels(request, services, len(refs))
    work = services.predictor.predict(
        refs, images, top_k, key=_key(request), tenant=services.tenant, timeout_s=timeout_s
    )
    answer = await unless_gone(request, work)
    body = wire.PredictResponse(
        task=answer.task,
        version=answer.version,
        versions=_ensemble_versions(answer),
        predictions=_predictions(answer.predictions),
    )
    return _response(body, answer.timings, {"Lensrack-Version": answer.version})


@router.post(
    "/predict", response_model=wire.ManyPredictResponse, responses={200: {"headers": _HEADERS}}, openapi_extra=_BODY
)
async def predict_many(request: Request, services: ServicesOf, tasks: Tasks, top_k: TopK = 5) -> Response:
    """Ask many tasks about the same images. A task that fails has its problem in its place; only when none could answer
    is the whole request a problem, the first task's."""
    refs, timeout_s = Ref.parse_each(tasks), _timeout_s(request, services)
    images = await read_pixels(request, services, sum(map(len, refs.values())))
    work = services.predictor.predict_many(
        refs, images, top_k, key=_key(request), tenant=services.tenant, timeout_s=timeout_s
    )
    results = await unless_gone(request, work)
    answered = [result for result in results.values() if isinstance(result, Answer)]
    for result in results.values():
        if isinstance(result, Exception) and not answered:
            raise result
    body = wire.ManyPredictResponse(
        results={task: _task_result(result, request_id(request)) for task, result in results.items()}
    )
    return _response(body, _longest([answer.timings for answer in answered]))


@router.post("/embed", response_model=wire.EmbedResponse, responses={200: {"headers": _HEADERS}}, openapi_extra=_BODY)
async def embed(request: Request, services: ServicesOf) -> Response:
    """The frozen backbone's features of images."""
    timeout_s = _timeout_s(request, services)
    images = await read_pixels(request, services)
    features = await unless_gone(request, services.predictor.embed(images, tenant=services.tenant, timeout_s=timeout_s))
    body = wire.EmbedResponse(fingerprint=features.fingerprint, embeddings=features.vectors.tolist())
    return _response(body, features.timings)


# --- images in ------------------------------------------------------------------------------------------------------


async def read_images(request: Request, services: Services, tasks: int = 1) -> list[bytes]:
    """Return the images of a body, in order, still encoded. The key is charged for each image and task.

    Raises UnsupportedMedia, BadRequest, Unprocessable, TooLarge, QueueFull rate_limited.
    """
    kind = params.require_type(request.headers, _ENVELOPES, params.may_be_image)
    images = [data for data, _ in await _read(request, services, kind)]
    await services.meter.images(services.key, len(images) * tasks)
    return images


async def read_pixels(request: Request, services: Services, tasks: int = 1) -> list[Image]:
    """Like `read_images`; also images that are pixels (NumPy), as the body or as parts of a form."""
    kind = params.require_type(request.headers, (*_ENVELOPES, raw_pixels.NPY), params.may_be_image)
    images: list[Image] = []
    for data, kind_of_part in await _read(request, services, kind):
        left = services.settings.max_images - len(images)
        pixels = kind_of_part == raw_pixels.NPY or (kind_of_part in params.UNDECLARED and raw_pixels.is_array(data))
        images += raw_pixels.read(data, request.headers, most=left) if pixels else [data]
    await services.meter.images(services.key, len(images) * tasks)
    return images


async def _read(request: Request, services: Services, kind: str) -> list[tuple[bytes, str]]:
    """The files in a body of a media type, each with its own."""
    body = await request.body()
    if kind == forms.FORM:
        declared = request.headers["content-type"]
        parts = await asyncio.to_thread(forms.read, body, declared, most=services.settings.max_images)
        return [(bytes(part.data), part.media_type) for part in forms.files(parts, "images")]
    if kind == JSON:
        return [(data, JSON) for data in await asyncio.to_thread(_from_json, body)]
    if not body:
        raise BadRequest("expected an image, got 0 bytes", code="bad_image")
    return [(body, kind)]


def _from_json(body: bytes) -> list[bytes]:
    images = problems.parse_json(wire.PredictRequest, body).images
    return [_from_base64(image.b64, index) for index, image in enumerate(images)]


def _from_base64(text: str, index: int) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Unprocessable(f"images.{index}.b64: expected base64 (RFC 4648, padded), got {text[:40]!r}") from error


def _timeout_s(request: Request, services: Services) -> float:
    most = services.settings.request_timeout_s
    header = request.headers.get("Lensrack-Timeout")
    if header is None:
        return most
    try:
        timeout_s = float(header)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s <= most:
        raise Unprocessable(f"Lensrack-Timeout: expected seconds above 0 and up to {most:g}, got {header[:40]!r}")
    return timeout_s


def _key(request: Request) -> str:
    return request.headers.get("Lensrack-Key") or request_id(request)


# --- waiting --------------------------------------------------------------------------------------------------------


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, which is cancelled when the client disconnects. Raises ClientDisconnect then.

    The body must have been read, so that the next message from the client can only be its disconnect.
    """
    task, disconnected = asyncio.current_task(), False
    assert task is not None, "requests are answered in tasks"
    cancellations = task.cancelling()

    def cancel(watcher: asyncio.Task[None]) -> None:
        nonlocal disconnected
        if not watcher.cancelled():
            disconnected = True
            task.cancel()

    watcher = asyncio.ensure_future(_disconnect(request))
    watcher.add_done_callback(cancel)
    try:
        return await work
    except asyncio.CancelledError:
        if disconnected and task.uncancel() <= cancellations:  # by the disconnect alone
            raise ClientDisconnect from None
        raise
    finally:
        watcher.remove_done_callback(cancel)
        watcher.cancel()


async def _disconnect(request: Request) -> None:
    """Return when the client has disconnected, or the connection fails."""
    with suppress(Exception):
        while (await request.receive())["type"] != "http.disconnect":
            pass


# --- answers out ----------------------------------------------------------------------------------------------------


def _task_result(result: Answer | Exception, id_: str) -> wire.TaskResult:
    if isinstance(result, Answer):
        return wire.TaskResult(
            version=result.version, versions=_ensemble_versions(result), predictions=_predictions(result.predictions)
        )
    if not isinstance(result, ServiceError | StoreError):
        log.error("request %s: a task failed unexpectedly", id_, exc_info=result)
    return wire.TaskResult(error=problems.problem(problems.service_error(result), id_))


def _ensemble_versions(answer: Answer) -> list[str] | None:
    return list(answer.versions) if len(answer.versions) > 1 else None


def _predictions(predictions: Sequence[Sequence[Scored]]) -> list[list[wire.Prediction]]:
    return [
        [wire.Prediction(label=best.label, index=best.index, score=best.score) for best in of_image]
        for of_image in predictions
    ]


def _longest(timings: Sequence[Timings]) -> Timings:
    """The longest of each step, which is what the request waited: its tasks run side by side."""
    return Timings(
        decode_s=max(task.decode_s for task in timings),
        queue_s=max(task.queue_s for task in timings),
        compute_s=max(task.compute_s for task in timings),
    )


def _response(
    body: wire.PredictResponse | wire.ManyPredictResponse | wire.EmbedResponse,
    timings: Timings,
    headers: Mapping[str, str] | None = None,
) -> Response:
    text = body.model_dump_json(exclude_none=True)
    return Response(text, media_type="application/json", headers={**server_timing(timings), **(headers or {})})


def server_timing(timings: Timings) -> dict[str, str]:
    steps = {"decode": timings.decode_s, "queue": timings.queue_s, "compute": timings.compute_s}
    return {"Server-Timing": ", ".join(f"{name};dur={1000 * seconds:.3f}" for name, seconds in steps.items())}
