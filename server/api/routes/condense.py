"""A condensing job inherits method, recipe and, where none is named, data set from the version that it condenses."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from pydantic import ValidationError

from lensrack import wire
from prompts_store import Bundle
from server.api import problems
from server.api.services import Services
from server.errors import Conflict, Unprocessable
from server.training.parent_version import require_labels

AUTO: Final = "auto"
_FIT_ONLY: Final = ("search", "budget", "preset", "init", "pool")


async def with_inherited(services: Services, request: wire.TrainRequest) -> wire.TrainRequest:
    """Return the request, completed from the version that it condenses; unchanged where it names none.

    Raises StoreError and ServiceError, so that nothing is queued that must fail.
    """
    condense = request.recipe.condense
    if condense is None or condense.version is None:
        return request
    version = await _version(services, request.task, condense.version)
    return await asyncio.to_thread(_from, services, request, version)


async def _version(services: Services, task: str, name: str) -> str:
    """A version by its name; of an alias, the one with most of the requests."""
    alias = (await asyncio.to_thread(services.store.aliases, task)).get(name)
    if alias is not None:
        return alias.heaviest
    return await services.predictor.version_like(task, name)


def _from(services: Services, request: wire.TrainRequest, version: str) -> wire.TrainRequest:
    bundle = services.store.get(request.task, version)
    services.check_bundle(bundle)
    manifest = bundle.manifest
    if "prompts" not in bundle.tensors or not sum(manifest.prompt_lengths):
        raise Unprocessable(
            f"condense.version: expected a version with prompts, got {version[:12]} ({manifest.method}), which has none"
        )
    if request.method not in (AUTO, manifest.method):
        raise Unprocessable(f"method: expected {manifest.method}, the version's, got {request.method[:100]!r}")
    dataset = services.datasets.get(_dataset(request, bundle))
    require_labels(bundle, tuple(dataset.labels))
    return request.model_copy(
        update={"method": manifest.method, "dataset": dataset.id, "recipe": _recipe(request.recipe, bundle)}
    )


def _dataset(request: wire.TrainRequest, bundle: Bundle) -> str:
    dataset = request.dataset or bundle.manifest.dataset
    if dataset is None:
        raise Conflict(
            f"version {bundle.version[:12]} does not record its dataset: expected a dataset in the request, got none",
            code="no_parent_dataset",
        )
    return dataset


def _recipe(overrides: wire.Recipe, bundle: Bundle) -> wire.Recipe:
    """The version's recipe with the request's overrides. A manifest may come from outside: it is validated, too."""
    unused = {"search"} if overrides.search == "none" else None
    changes: dict[str, Any] = overrides.model_dump(exclude_none=True, exclude=unused)
    if others := sorted(changes.keys() & set(_FIT_ONLY)):
        raise Unprocessable(f"recipe: a version is condensed with its own recipe: expected no {', '.join(others)}")
    known = wire.Recipe.model_fields.keys() - {*_FIT_ONLY, "condense"}
    inherited = {name: value for name, value in bundle.manifest.recipe.items() if name in known}
    if "base_lr" in changes:
        inherited.pop("lr", None)
    inherited["pool"] = bundle.manifest.pool
    recipe = {**inherited, **changes, "condense": {**changes["condense"], "version": bundle.version}}
    try:
        return wire.Recipe.model_validate(recipe)
    except ValidationError as error:
        raise problems.unprocessable(error.errors()) from error
