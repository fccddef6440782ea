"""Tasks, their versions and aliases, and which of them sit on the device."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

import prompts_store as stored
from lensrack import wire
from prompts_store import Bundle
from server.api import forms, params, views
from server.api.middleware.root_path import located
from server.api.services import Services, ServicesOf
from server.errors import BadRequest
from server.importing.importer import File, ImportOptions

from . import imports

router = APIRouter(tags=["tasks"])

BUNDLE_TYPES: Final = ("application/octet-stream", "application/vnd.safetensors")
_BUNDLE: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            **{kind: {"schema": {"type": "string", "format": "binary"}} for kind in BUNDLE_TYPES},
            forms.FORM: {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "array", "items": {"type": "string", "format": "binary"}},
                        "labels": {"type": "string", "description": "JSON: the classes' names in their order."},
                        "preprocess": {"type": "string", "description": "JSON: mean, std, interpolation, …"},
                    },
                }
            },
        },
    }
}
# --- tasks ------------------------------------------------------------------------------------------------------------


@router.get("/tasks")
async def list_tasks(services: ServicesOf) -> wire.TaskList:
    summaries = await asyncio.to_thread(_summaries, services.store)
    return wire.TaskList(tasks=[views.with_residency(services, task) for task in summaries])


@router.get("/tasks/{task}")
async def get_task(services: ServicesOf, task: params.TaskOf) -> wire.Task:
    return views.with_residency(services, await asyncio.to_thread(_summary, services.store, task))


@router.delete("/tasks/{task}", status_code=204)
async def delete_task(services: ServicesOf, task: params.TaskOf) -> None:
    """Forget a task with all its versions, aliases and feedback, on the device too."""
    versions = await asyncio.to_thread(services.store.versions, task)
    await asyncio.to_thread(services.store.delete_task, task)
    delete = partial(asyncio.to_thread, services.feedback.delete_task, task)
    unload = [_unload(services, task, info.version) for info in versions]
    await asyncio.gather(services.follow_ups.do(f"deleting the feedback of {task}", delete), *unload)


# --- versions ---------------------------------------------------------------------------------------------------------


@router.get("/tasks/{task}/versions")
async def list_versions(services: ServicesOf, task: params.TaskOf) -> wire.VersionList:
    """Newest first."""
    infos = await asyncio.to_thread(services.store.versions, task)
    return wire.VersionList(versions=[views.version(services, task, info) for info in infos])


@router.put(
    "/tasks/{task}/versions",
    status_code=201,
    openapi_extra=_BUNDLE,
    responses={201: {"headers": {"Location": {"schema": {"type": "string"}}}}},
)
async def upload_version(
    *,
    request: Request,
    response: Response,
    services: ServicesOf,
    task: params.TaskOf,
    alias: Annotated[wire.AliasName | None, Query(description="An alias to point at the new version.")] = None,
    form: Annotated[
        wire.ImportFormat | None,
        Query(alias="format", description="The body is another tool's checkpoint, of this kind."),
    ] = None,
) -> wire.VersionInfo:
    """Store a bundle, or import a checkpoint of another tool, which a form always is. Aliases stay where they are
    unless one is given."""
    kind = params.require_type(request.headers, (*BUNDLE_TYPES, forms.FORM))
    if form is None and kind != forms.FORM:
        version = await asyncio.to_thread(_put, services, task, await request.body(), alias)
    else:
        files, options = await imports.read(request, task, form or "auto")
        version = await asyncio.to_thread(_import, services, files, options, alias)
    response.headers["Location"] = located(request, f"/tasks/{task}/versions/{version}")
    return await get_version(services, task, version)


@router.get("/tasks/{task}/versions/{version}")
async def get_version(services: ServicesOf, task: params.TaskOf, version: str) -> wire.VersionInfo:
    """One version, by its digest or the unique beginning of it."""
    full = await services.predictor.version_like(task, version)
    for info in await asyncio.to_thread(services.store.versions, task):
        if info.version == full:
            return views.version(services, task, info)
    raise stored.VersionNotFound(task, version)


@router.get(
    "/tasks/{task}/versions/{version}/bundle",
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}},
)
async def download_bundle(services: ServicesOf, task: params.TaskOf, version: str) -> Response:
    """The bundle's file: safetensors, with the manifest in its metadata."""
    full = await services.predictor.version_like(task, version)
    bundle = await asyncio.to_thread(services.store.get, task, full)
    disposition = f'attachment; filename="{task}-{full[:12]}.safetensors"'
    headers = {"Content-Disposition": disposition, "ETag": f'"{full}"', "Lensrack-Version": full}
    return Response(bundle.data, media_type="application/octet-stream", headers=headers)


@router.delete("/tasks/{task}/versions/{version}", status_code=204)
async def delete_version(services: ServicesOf, task: params.TaskOf, version: str) -> None:
    """Forget a version that no alias points at, on the device too."""
    full = await services.predictor.version_like(task, version)
    await asyncio.to_thread(services.store.delete_version, task, full)
    await _unload(services, task, full)


async def _unload(services: Services, task: str, version: str) -> None:
    unload = partial(services.residency.unload, task, version)
    await services.follow_ups.do(f"unloading {task}@{version[:12]}", unload)


# --- the store, in threads --------------------------------------------------------------------------------------------


def _summaries(store: stored.Store) -> list[wire.Task]:
    summaries = []
    for task in store.tasks():
        try:
            summaries.append(_summary(store, task))
        except stored.TaskNotFound:
            continue  # deleted since the list was read
    return summaries


def _summary(store: stored.Store, task: str) -> wire.Task:
    aliases, versions = store.aliases(task), store.versions(task)
    live = aliases["live"].heaviest if "live" in aliases else None
    return wire.Task(
        task=task,
        live=live,
        aliases=[views.alias(alias) for alias in aliases.values()],
        versions=len(versions),
        **next((_of_live(info) for info in versions if info.version == live), {}),
    )


def _of_live(info: stored.VersionInfo) -> dict[str, Any]:
    manifest = info.manifest
    accuracy = manifest.metrics.get("val_accuracy")
    return {
        "method": manifest.method,
        "classes": len(manifest.labels),
        "dataset": manifest.dataset,
        "val_accuracy": accuracy if isinstance(accuracy, int | float) else None,
    }


def _put(services: Services, task: str, data: bytes, alias: str | None) -> str:
    bundle = Bundle.parse(data, max_bytes=services.settings.max_bundle_bytes)
    if bundle.manifest.task != task:
        raise BadRequest(f"expected a bundle of task {task!r}, got one of {bundle.manifest.task!r}", code="bad_bundle")
    services.check_bundle(bundle)
    return _store(services, bundle, alias)


def _import(services: Services, files: list[File], options: ImportOptions, alias: str | None) -> str:
    return _store(services, services.importer.bundle(files, options, services.store), alias)


def _store(services: Services, bundle: Bundle, alias: str | None) -> str:
    version = services.store.put(bundle)
    if alias is not None:
        services.store.set_alias(bundle.manifest.task, alias, version)
    return version
