"""Datasets over HTTP: an archive is spooled to a file, never held in memory, and then stored."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from lensrack import wire
from server.api import forms, params, receiving
from server.api.middleware.root_path import located
from server.api.services import Services, ServicesOf
from server.datasets.dataset import Dataset
from server.datasets.upload_store import UploadBusy
from server.errors import BadRequest, Unprocessable

router = APIRouter(tags=["datasets"])

Ingest = Callable[[Path], Dataset]

POLL_S: Final = 0.25
INGESTS: Final = 2  # at once: each decodes every picture, and predictions need the cores and the threads as well
_ARCHIVE: Final[dict[str, Any]] = {
    "requestBody": {
        "content": {
            **{kind: {"schema": {"type": "string", "format": "binary"}} for kind in params.ARCHIVE_TYPES},
            forms.FORM: {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "string", "format": "binary"}},
                }
            },
        },
    }
}


@router.post(
    "/datasets",
    status_code=201,
    openapi_extra=_ARCHIVE,
    responses={201: {"headers": {"Location": {"schema": {"type": "string"}}}}},
)
async def upload_dataset(
    *,
    request: Request,
    response: Response,
    services: ServicesOf,
    name: Annotated[str, Query(max_length=200, description="What people call it.")] = "",
    parent: Annotated[str | None, Query(description="A dataset: the new one holds its pictures as well.")] = None,
    label_column: Annotated[
        str | None,
        Query(
            min_length=1,
            max_length=200,
            pattern=r"^[^\x00]*$",
            description="The labels' column of a parquet file or a table.",
        ),
    ] = None,
    upload_id: Annotated[
        str | None, Query(alias="upload", description="A whole upload (see /uploads), in place of a body.")
    ] = None,
) -> wire.Dataset:
    """Store a zip or tar (plain, gz, zst, bz2 or xz) of class folders, optionally under train/, val/ and test/, or of
    pictures and a table of their labels (labels.csv, metadata.jsonl, …); a parquet file of images and labels; a
    MedMNIST npz.

    The report in the answer counts what there is and warns of what misleads.
    """
    ingest: Ingest = partial(services.datasets.ingest, name=name, parent=parent, label_column=label_column)
    if parent is not None:
        await asyncio.to_thread(services.datasets.get, parent)  # an unknown one fails before 10 GB are read
    if upload_id is not None:
        dataset = await _from_upload(request, services, upload_id, ingest)
    else:
        dataset = await _from_body(request, services, ingest)
    response.headers["Location"] = located(request, f"/datasets/{dataset.id}")
    return to_wire(dataset)


async def _from_body(request: Request, services: Services, ingest: Ingest) -> Dataset:
    kind = params.require_type(request.headers, (*params.ARCHIVE_TYPES, forms.FORM), params.may_be_archive)
    await asyncio.to_thread(services.datasets.require_room, int(request.headers.get("content-length", 0)))
    settings = services.settings
    async with receiving.spooled(settings.datasets_dir) as (archive, append):
        if kind == forms.FORM:
            form = forms.FileForm(request.headers["content-type"], append)
            await receiving.fill(request, form.feed, silence_s=settings.upload_silence_s)
            form.finish()
            _require_no_fields(form)
        else:
            await receiving.fill(request, append, silence_s=settings.upload_silence_s)
        if not archive.stat().st_size:
            raise BadRequest("expected an archive, got 0 bytes", code="bad_archive")
        dataset: Dataset = await request.app.state.ingests.run(services.tenant, partial(ingest, archive))
        return dataset


def _require_no_fields(form: forms.FileForm) -> None:
    for name in form.fields:
        detail = f"expected a file alone, got the field {name[:100]!r}; name and parent belong to the query"
        raise Unprocessable(f"multipart body: {detail}")


async def _from_upload(request: Request, services: Services, upload_id: str, ingest: Ingest) -> Dataset:
    """A client that repeats a request whose answer was lost waits for the first one and gets the same dataset."""
    if await request.body():
        raise Unprocessable("expected an empty body, as the archive is the upload's, got one")
    finish = partial(services.uploads.finish, upload_id, lambda archive: ingest(archive).id)
    while True:
        try:
            dataset_id = await request.app.state.ingests.run(services.tenant, finish)
        except UploadBusy:
            upload = await asyncio.to_thread(services.uploads.get, upload_id)
            if upload.offset < upload.length or await request.is_disconnected():
                raise
            await asyncio.sleep(POLL_S)
        else:
            return await asyncio.to_thread(services.datasets.get, dataset_id)


@router.get("/datasets")
async def list_datasets(services: ServicesOf) -> wire.DatasetList:
    return wire.DatasetList(datasets=[to_wire(dataset) for dataset in await asyncio.to_thread(services.datasets.list)])


@router.get("/datasets/{dataset_id}")
async def get_dataset(services: ServicesOf, dataset_id: str) -> wire.Dataset:
    return to_wire(await asyncio.to_thread(services.datasets.get, dataset_id))


@router.delete("/datasets/{dataset_id}", status_code=204)
async def delete_dataset(services: ServicesOf, dataset_id: str) -> None:
    await asyncio.to_thread(services.datasets.delete, dataset_id)


def to_wire(dataset: Dataset) -> wire.Dataset:
    return wire.Dataset.model_validate(dataset, from_attributes=True)
