"""Resumable uploads, by tus 1.0 (tus.io/protocols) with the extensions creation, termination and expiration. A whole
upload becomes a dataset by `POST /datasets?upload=ID`.

    POST /uploads  Upload-Length ──► Location ──► PATCH  Upload-Offset, bytes ──► 204, Upload-Offset on the disk
                                        ▲                     │ the connection breaks: what arrived is kept
                                        └── HEAD: the offset ◄┘
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Coroutine, Mapping
from email.utils import formatdate
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from lensrack import wire
from server.api import params, problems, receiving
from server.api.middleware.root_path import located
from server.api.services import ServicesOf
from server.errors import PreconditionFailed, ServiceError, Unprocessable

VERSION: Final = "1.0.0"
EXTENSIONS: Final = "creation,termination,expiration"
MEDIA_TYPE: Final = "application/offset+octet-stream"

_NUMBER: Final = re.compile("[0-9]{1,18}")
_METADATA: Final = re.compile(r"[!-~][ -~]{0,4095}")
_PIECES: Final = (MEDIA_TYPE, params.OCTETS)  # the second for generated clients, which know no type of tus
_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in _PIECES},
    }
}


def _parameters(**meanings: str) -> dict[str, Any]:
    parameters = [
        {"name": name.replace("_", "-"), "in": "header", "description": meaning, "schema": {"type": "string"}}
        for name, meaning in meanings.items()
    ]
    return {"parameters": parameters}


class _Tus(APIRoute):
    """A route that requires one version of tus and names it in every response."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                _require_version(request)
                response = await handle(request)
            except ServiceError as error:
                response = problems.answer(error, request.scope)
            response.headers.update({"Tus-Resumable": VERSION, "Tus-Version": VERSION})
            return response

        return handled


router = APIRouter(tags=["uploads"], route_class=_Tus)


@router.options("/uploads", status_code=204)
async def get_upload_capabilities(services: ServicesOf) -> Response:
    """Which tus this is."""
    most = str(services.settings.max_dataset_bytes)
    return _answer(204, {"Tus-Extension": EXTENSIONS, "Tus-Max-Size": most})


@router.post(
    "/uploads",
    status_code=201,
    response_model=wire.Upload,
    openapi_extra=_parameters(Upload_Length="Bytes in all.", Upload_Metadata="Anything; HEAD gives it back."),
    responses={201: {"headers": {"Location": {"schema": {"type": "string"}}}}},
)
async def create_upload(request: Request, services: ServicesOf) -> Response:
    """Begin an upload; nothing of it is sent yet."""
    length, metadata = _number(request, "Upload-Length"), request.headers.get("Upload-Metadata", "")
    if metadata and not _METADATA.fullmatch(metadata):
        raise Unprocessable(f"Upload-Metadata: expected up to 4096 ASCII characters, got {metadata[:40]!r}")
    await asyncio.to_thread(services.datasets.require_room, length)
    upload = await asyncio.to_thread(services.uploads.create, length, metadata)
    headers = {"Location": located(request, f"/uploads/{upload.id}"), **_expiry(upload.expires_at)}
    return _answer(201, headers, wire.Upload.model_validate(upload, from_attributes=True))


@router.head("/uploads/{upload_id}", status_code=200)
async def get_upload_offset(services: ServicesOf, upload_id: str) -> Response:
    """How far an upload is, in `Upload-Offset`."""
    upload = await asyncio.to_thread(services.uploads.get, upload_id)
    metadata = {"Upload-Metadata": upload.metadata} if upload.metadata else {}
    progress = {"Upload-Offset": str(upload.offset), "Upload-Length": str(upload.length), "Cache-Control": "no-store"}
    return _answer(200, {**progress, **_expiry(upload.expires_at), **metadata})


@router.patch(
    "/uploads/{upload_id}",
    status_code=204,
    openapi_extra={**_BODY, **_parameters(Upload_Offset="Where these bytes belong: where the upload stands.")},
)
async def append_to_upload(request: Request, services: ServicesOf, upload_id: str) -> Response:
    """Go on with an upload. What has come when the connection breaks is kept."""
    params.require_type(request.headers, _PIECES, also=lambda kind: False)
    offset = _number(request, "Upload-Offset")
    part = await asyncio.to_thread(services.uploads.open, upload_id)
    try:
        part.require(offset, _content_length(request))
        await receiving.fill(request, part.append, silence_s=services.settings.upload_silence_s)
    finally:
        offset = await asyncio.to_thread(part.close)
    return _answer(204, {"Upload-Offset": str(offset), **_expiry(time.time() + services.settings.upload_expiry_s)})


@router.delete("/uploads/{upload_id}", status_code=204)
async def delete_upload(services: ServicesOf, upload_id: str) -> Response:
    """Forget an upload and what has come of it."""
    await asyncio.to_thread(services.uploads.delete, upload_id)
    return _answer(204, {})


def _require_version(request: Request) -> None:
    """A client that names no version, such as curl, is assumed to speak this one."""
    got = request.headers.get("Tus-Resumable", VERSION)
    if got != VERSION and request.method != "OPTIONS":
        raise PreconditionFailed(f"Tus-Resumable: expected {VERSION}, got {got[:40]!r}")


def _number(request: Request, header: str) -> int:
    got = request.headers.get(header, "")
    if not _NUMBER.fullmatch(got):
        raise Unprocessable(f"{header}: expected a number of bytes, got {got[:40]!r}")
    return int(got)


def _content_length(request: Request) -> int:
    """The length that the client declares; 0 for a chunked body, which is measured while it arrives."""
    return _number(request, "Content-Length") if "Content-Length" in request.headers else 0


def _expiry(at: float) -> dict[str, str]:
    return {"Upload-Expires": formatdate(at, usegmt=True)}


def _answer(status: int, headers: Mapping[str, str], body: wire.Upload | None = None) -> Response:
    content = body.model_dump_json() if body else None
    return Response(content, status, headers, media_type="application/json" if body else None)
