"""Files: an archive of labelled images becomes a data set, whose id is the file's. The archive is not kept."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Query, Request

from server.api import receiving
from server.api.forms import FileForm
from server.api.services import ServicesOf
from server.datasets.dataset import Dataset
from server.errors import BadRequest, Unprocessable

from . import bodies, paging
from .faults import RESPONSES

PURPOSE: Final = "fine-tune"
_FORM: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": [PURPOSE]},
                    },
                }
            }
        },
    }
}

router = APIRouter(prefix="/v1", tags=["OpenAI"], responses=RESPONSES)


@router.post("/files", openapi_extra=_FORM, response_model=bodies.FileObject)
async def upload_file(request: Request, services: ServicesOf) -> dict[str, Any]:
    """Store an archive in any form that /datasets takes."""
    settings = services.settings
    await asyncio.to_thread(services.datasets.require_room, 0)
    async with receiving.spooled(settings.datasets_dir) as (archive, append):
        form = FileForm(request.headers.get("content-type", ""), append)
        await receiving.fill(request, form.feed, silence_s=settings.upload_silence_s)
        form.finish()
        _check(form.fields)
        if not archive.stat().st_size:
            raise BadRequest("expected an archive, got 0 bytes", code="bad_archive", param="file")
        ingest = partial(services.datasets.ingest, archive, name=form.name)
        return to_wire(await request.app.state.ingests.run(services.tenant, ingest))


@router.get("/files", response_model=bodies.FileList)
async def list_files(
    services: ServicesOf,
    *,
    purpose: str | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    newest = await asyncio.to_thread(services.datasets.list) if purpose in (None, PURPOSE) else []
    ordered = newest if order == "desc" else newest[::-1]
    return paging.cut([to_wire(dataset) for dataset in ordered], after, limit)


@router.get("/files/{dataset_id}", response_model=bodies.FileObject)
async def get_file(services: ServicesOf, dataset_id: str) -> dict[str, Any]:
    return to_wire(await asyncio.to_thread(services.datasets.get, dataset_id))


@router.delete("/files/{dataset_id}", response_model=bodies.DeletedFile)
async def delete_file(services: ServicesOf, dataset_id: str) -> dict[str, Any]:
    full = await asyncio.to_thread(services.datasets.full_id, dataset_id)
    await asyncio.to_thread(services.datasets.delete, full)
    return {"id": full, "object": "file", "deleted": True}


def _check(fields: dict[str, str]) -> None:
    """Raises Unprocessable."""
    if unknown := sorted(fields.keys() - {"purpose"}):
        raise Unprocessable(f"expected the fields file and purpose, got {unknown[0][:100]!r}", param=unknown[0])
    if fields.get("purpose") != PURPOSE:
        got = repr(fields["purpose"][:100]) if "purpose" in fields else "none"
        raise Unprocessable(f"purpose: expected {PURPOSE!r}, got {got}", param="purpose")


def to_wire(dataset: Dataset) -> dict[str, Any]:
    """Return a data set as a file. `bytes`: of its images."""
    return {
        "id": dataset.id,
        "object": "file",
        "bytes": dataset.bytes,
        "created_at": int(dataset.created_at),
        "filename": dataset.name,
        "purpose": PURPOSE,
        "status": "processed",
    }
