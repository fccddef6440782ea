"""Models: the backbone, which embeds and which jobs fine-tune, and every task."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from fastapi import APIRouter

import prompts_store as stored
from server.api.routes import residency
from server.api.services import Services, ServicesOf
from server.errors import NotFound
from server.serving.resolver import Ref

from . import bodies
from .faults import RESPONSES

OWNER: Final = "lensrack"

router = APIRouter(prefix="/v1/models", tags=["OpenAI"], responses=RESPONSES)


@router.get("", response_model=bodies.ModelList)
async def list_models(services: ServicesOf) -> dict[str, Any]:
    tasks = await asyncio.to_thread(_tasks, services.store)
    return {"object": "list", "data": [_model(services.settings.backbone, 0), *tasks]}


@router.get("/{task}", response_model=bodies.Model)
async def get_model(services: ServicesOf, task: str) -> dict[str, Any]:
    """The backbone, or `task`, `task@alias` or `task@version`."""
    if task in await names(services):
        return _model(task, 0)
    ref = Ref.parse(task)
    version = await residency.one_version(services, ref)
    for info in await asyncio.to_thread(services.store.versions, ref.task):
        if info.version == version:
            return _model(task, int(info.manifest.created_at))
    raise stored.VersionNotFound(ref.task, version)


async def names(services: Services) -> set[str]:
    """Return the backbone's names: the setting's, and its architecture's."""
    ready = await asyncio.to_thread(services.ready)
    return {services.settings.backbone} | ({ready.backbone.arch} if ready.backbone else set())


async def require_backbone(services: Services, model: str) -> None:
    """Raises NotFound model_not_found."""
    known = await names(services)
    if model not in known:
        detail = f"model: expected the backbone, {' or '.join(sorted(known))}, got {model[:100]!r}"
        raise NotFound(detail, code="model_not_found", param="model")


def _tasks(store: stored.Store) -> list[dict[str, Any]]:
    models = []
    for task in store.tasks():
        try:
            versions = store.versions(task)
        except stored.TaskNotFound:
            continue  # deleted since the list was read
        models.append(_model(task, int(max((info.manifest.created_at for info in versions), default=0))))
    return models


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": OWNER}
