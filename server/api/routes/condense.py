"""What a job takes over from the version that it condenses: method, recipe, and data set where none is named."""

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
_OF_A_FIT: Final = ("search", "budget", "preset", "init", "pool")


async def taken_over(services: Services, asked: wire.TrainRequest) -> wire.TrainRequest:
    """The request with everything that it leaves to the version told; as it is where it names none.

    Raises StoreError and ServiceError: nothing is queued that could not be done.
    """
    how = asked.recipe.condense
    if how is None or how.version is None:
        return asked
    version = await _version(services, asked.task, how.version)
    return await asyncio.to_thread(_from, services, asked, version)


async def _version(services: Services, task: str, name: str) -> str:
    """Of an alias the version with most of the requests."""
    alias = (await asyncio.to_thread(services.store.aliases, task)).get(name)
    if alias is not None:
        return alias.heaviest
    return await services.predictor.version_like(task, name)


def _from(services: Services, asked: wire.TrainRequest, version: str) -> wire.TrainRequest:
    bundle = services.store.get(asked.task, version)
    services.check_bundle(bundle)
    manifest = bundle.manifest
    if "prompts" not in bundle.tensors or not sum(manifest.prompt_lengths):
        raise Unprocessable(
            f"condense.version: expected a version with prompts, got {version[:12]}, by {manifest.method}, without any"
        )
    if asked.method not in (AUTO, manifest.method):
        raise Unprocessable(f"method: expected {manifest.method}, which the version is by, got {asked.method[:100]!r}")
    dataset = services.datasets.get(_dataset(asked, bundle))
    require_labels(bundle, tuple(dataset.labels))
    return asked.model_copy(
        update={"method": manifest.method, "dataset": dataset.id, "recipe": _recipe(asked.recipe, bundle)}
    )


def _dataset(asked: wire.TrainRequest, bundle: Bundle) -> str:
    named = asked.dataset or bundle.manifest.dataset
    if named is None:
        raise Conflict(
            f"version {bundle.version[:12]} does not tell what it was fitted on: expected a dataset, got none",
            code="no_parent_dataset",
        )
    return named


def _recipe(asked: wire.Recipe, bundle: Bundle) -> wire.Recipe:
    """The version's own, beneath what is asked for. A manifest may be a stranger's: it is checked like a request."""
    given: dict[str, Any] = asked.model_dump(exclude_none=True, exclude={"search"} if asked.search == "none" else None)
    if others := sorted(given.keys() & set(_OF_A_FIT)):
        raise Unprocessable(f"recipe: a version is condensed with its own recipe: expected no {', '.join(others)}")
    known = wire.Recipe.model_fields.keys() - {*_OF_A_FIT, "condense"}
    own = {name: value for name, value in bundle.manifest.recipe.items() if name in known}
    if "base_lr" in given:
        own.pop("lr", None)
    own["pool"] = bundle.manifest.pool
    told = {**own, **given, "condense": {**given["condense"], "version": bundle.version}}
    try:
        return wire.Recipe.model_validate(told)
    except ValidationError as error:
        raise problems.unprocessable(error.errors()) from error
