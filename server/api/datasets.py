"""Datasets over HTTP: an archive goes from the socket to a file, never into memory, and from there into the store."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Any, Final

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from lensrack import wire
from server.api import guard, uploads
from server.api.services import ServicesOf
from server.datasets.dataset import Dataset
from server.errors import BadRequest

router = APIRouter(tags=["datasets"])

INGESTS: Final = 2  # at once: each decodes every picture, and predictions need the cores and the threads as well
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
    """Store a zip, tar, tar.gz or tar.zst of class folders, optionally under train/, val/ and test/."""
    guard.require_type(request.headers, guard.ARCHIVE_TYPES)
    async with uploads.received(request, services.settings.datasets_dir) as archive:
        if not archive.stat().st_size:
            raise BadRequest("expected an archive, got 0 bytes", code="bad_archive")
        ingest = partial(services.datasets.ingest, archive, name=name)
        dataset = await anyio.to_thread.run_sync(ingest, limiter=request.app.state.ingests)
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


def told(dataset: Dataset) -> wire.Dataset:
    return wire.Dataset.model_validate(dataset, from_attributes=True)
