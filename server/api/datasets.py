"""Datasets over HTTP: an archive goes from the socket to a file, never into memory, and from there into the store."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from lensrack import wire
from server.api import guard
from server.api.services import ServicesOf
from server.errors import BadRequest, DiskFull

router = APIRouter(tags=["datasets"])

WRITE_BYTES: Final = 2**20  # gathered before a thread writes it: a hand-over for each packet would cost more
_ARCHIVE: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in guard.ARCHIVE_TYPES},
    }
}


@router.post(
    "/datasets",
    status_code=201,
    openapi_extra=_ARCHIVE,
    responses={201: {"headers": {"Location": {"schema": {"type": "string"}}}}},
)
async def upload(
    request: Request,
    response: Response,
    services: ServicesOf,
    name: Annotated[str, Query(max_length=200, description="What people call it.")] = "",
) -> wire.Dataset:
    """Store a zip, tar or tar.gz of class folders, optionally under train/, val/ and test/."""
    guard.require_type(request.headers, guard.ARCHIVE_TYPES)
    async with _received(request, services.settings.datasets_dir) as archive:
        dataset = await asyncio.to_thread(services.datasets.ingest, archive, name=name)
    response.headers["Location"] = f"/datasets/{dataset.id}"
    return told(dataset)


@router.get("/datasets")
async def list_datasets(services: ServicesOf) -> wire.DatasetList:
    return wire.DatasetList(datasets=[told(each) for each in await asyncio.to_thread(services.datasets.list)])


@router.get("/datasets/{dataset_id}")
async def get_dataset(services: ServicesOf, dataset_id: str) -> wire.Dataset:
    return told(await asyncio.to_thread(services.datasets.get, dataset_id))


@router.delete("/datasets/{dataset_id}", status_code=204)
async def delete_dataset(services: ServicesOf, dataset_id: str) -> None:
    await asyncio.to_thread(services.datasets.delete, dataset_id)


@asynccontextmanager
async def _received(request: Request, folder: Path) -> AsyncIterator[Path]:
    """The body in a file of its own, which is gone afterwards, however the request ends."""
    path = await asyncio.to_thread(_new_file, folder)
    try:
        if not await _write(request, path):
            raise BadRequest("expected an archive, got 0 bytes", code="bad_archive")
        yield path
    finally:
        path.unlink(missing_ok=True)


def _new_file(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    handle, path = tempfile.mkstemp(prefix=".upload-", dir=folder)
    os.close(handle)
    return Path(path)


async def _write(request: Request, path: Path) -> int:
    """Returns the bytes written. Raises ClientDisconnect, TooLarge, DiskFull."""
    written, waiting = 0, bytearray()
    with path.open("wb") as file:
        async for chunk in request.stream():
            waiting += chunk
            if len(waiting) >= WRITE_BYTES:
                written += await asyncio.to_thread(_append, file, bytes(waiting))
                waiting.clear()
        return written + await asyncio.to_thread(_append, file, bytes(waiting))


def _append(file: BinaryIO, data: bytes) -> int:
    try:
        file.write(data)
        file.flush()
    except OSError as error:
        raise DiskFull("the archive could not be written: the disk is full or failing") from error
    return len(data)


def told(dataset: Any) -> wire.Dataset:
    return wire.Dataset.model_validate(dataset, from_attributes=True)
