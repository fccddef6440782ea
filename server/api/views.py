"""The store's and the device's state as wire models."""

from __future__ import annotations

from dataclasses import asdict

from starlette.responses import Response

import prompts_store as stored
from lensrack import wire

from .services import Services


def with_residency(services: Services, task: wire.Task) -> wire.Task:
    """Return a task as the store describes it, with what only this process knows: residency and requests."""
    resident = task.live is not None and services.residency.resident(task.task, task.live)
    requests = services.predictor.request_counts(task.task).total()
    return task.model_copy(update={"resident": resident, "requests": requests})


def residency(services: Services, task: str, version: str) -> wire.Residency:
    on_device = services.residency
    return wire.Residency(
        task=task,
        version=version,
        resident=on_device.resident(task, version),
        pinned=on_device.pinned(task, version),
        bytes=on_device.lens_bytes(task, version),
    )


def alias_with_etag(response: Response, state: stored.Alias) -> wire.Alias:
    """Return an alias, and set its ETag on the response."""
    body = alias(state)
    response.headers["ETag"] = body.etag
    return body


def _targets(state: stored.Alias) -> list[wire.AliasTarget]:
    return [wire.AliasTarget(version=target.version, weight=target.weight) for target in state.targets]


def alias(state: stored.Alias) -> wire.Alias:
    return wire.Alias(name=state.name, targets=_targets(state), revision=state.revision, changed_at=state.changed_at)


def change(state: stored.Alias) -> wire.AliasChange:
    return wire.AliasChange(
        alias=state.name, targets=_targets(state), revision=state.revision, changed_at=state.changed_at
    )


def version(services: Services, task: str, info: stored.VersionInfo) -> wire.VersionInfo:
    manifest = info.manifest
    return wire.VersionInfo(
        version=info.version,
        method=manifest.method,
        labels=list(manifest.labels),
        prompt_lengths=list(manifest.prompt_lengths),
        bytes=info.bytes,
        created_at=manifest.created_at,
        metrics=manifest.metrics,
        recipe=manifest.recipe,
        dataset=manifest.dataset,
        parent=manifest.parent,
        preprocess=asdict(manifest.preprocess),
        resident=services.residency.resident(task, info.version),
    )
