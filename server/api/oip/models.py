"""The protocol's models: a task is a model, and all its stored versions answer.

No version has to be loaded before it answers: the first request loads it. So a model is ready when it exists, `load`
only spares its first request the wait, and `unload` frees memory without putting the model out of service.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import prompts_store as stored
from server import __version__
from server.api.routes import residency
from server.api.services import Services
from server.errors import Unprocessable
from server.serving.predictor import within_timeout
from server.serving.resolver import Ref

from . import tensors

PLATFORM: Final = "lensrack"
EXTENSIONS: Final = ("binary_tensor_data", "classification", "model_repository", "parameters")
READY: Final = "READY"


def server() -> dict[str, Any]:
    return {"name": PLATFORM, "version": __version__, "extensions": list(EXTENSIONS)}


async def find(services: Services, ref: Ref) -> stored.VersionInfo:
    """The version that a reference means. Raises BadRequest, and the store's errors for what is not there."""
    full = await residency.one_version(services, ref)
    for info in await asyncio.to_thread(services.store.versions, ref.task):
        if info.version == full:
            return info
    raise stored.VersionNotFound(ref.task, full)


async def metadata(services: Services, ref: Ref) -> dict[str, Any]:
    manifest = (await find(services, ref)).manifest
    versions = await asyncio.to_thread(services.store.versions, ref.task)
    return {
        "name": ref.task,
        "versions": [info.version for info in versions],
        "platform": PLATFORM,
        "inputs": _specs(tensors.inputs(manifest.preprocess.size)),
        "outputs": _specs(tensors.outputs(len(manifest.labels))),
    }


async def index(services: Services) -> list[dict[str, str]]:
    """Return every version of every task that the key covers."""
    return await asyncio.to_thread(_index, services.store)


async def load(services: Services, ref: Ref, parameters: object) -> None:
    """Load the live version ahead of its first request. Raises Unprocessable for parameters."""
    if parameters:
        raise Unprocessable("parameters: expected none, models come from the store with all that belongs to them")
    version = await residency.one_version(services, ref)
    await within_timeout(services.settings.request_timeout_s, services.residency.load(ref.task, version))


async def unload(services: Services, task: str) -> None:
    """Free the device memory of all versions of a task."""
    for info in await asyncio.to_thread(services.store.versions, task):
        await services.residency.unload(task, info.version)


def _specs(forms: dict[str, tensors.TensorSpec]) -> list[dict[str, Any]]:
    return [{"name": name, "datatype": form.datatype, "shape": list(form.shape)} for name, form in forms.items()]


def _index(store: stored.Store) -> list[dict[str, str]]:
    versions_ = []
    for task in store.tasks():
        try:
            versions = store.versions(task)
        except stored.TaskNotFound:
            continue  # deleted since the list was read
        versions_ += [{"name": task, "version": info.version, "state": READY, "reason": ""} for info in versions]
    return versions_
