"""Aliases: where a task's names point, moved by compare-and-set, split for canaries, rolled back."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import Response

import prompts_store as stored
from lensrack import wire
from prompts_store import ANY, names
from server.api import params, views
from server.api.services import Services, ServicesOf
from server.errors import PreconditionFailed, Unprocessable

router = APIRouter(tags=["aliases"])

CANARY_TRIES: Final = 5
_CONDITIONS: Final[dict[str, Any]] = {
    "parameters": [
        {"name": name, "in": "header", "description": meaning, "schema": {"type": "string"}}
        for name, meaning in (
            (
                "If-Match",
                "The alias' ETag: change it only if it is still so; `*`: only if there is one; otherwise 412.",
            ),
            ("If-None-Match", "`*`: create the alias only if there is none; otherwise 412."),
        )
    ]
}
_ETAG: Final[dict[str, Any]] = {
    "headers": {"ETag": {"description": "Goes into If-Match.", "schema": {"type": "string"}}}
}


@router.get("/tasks/{task}/aliases/{alias}", responses={200: _ETAG})
async def get_alias(response: Response, services: ServicesOf, task: params.TaskOf, alias: str) -> wire.Alias:
    return views.alias_with_etag(response, await _current(services, task, alias))


@router.put("/tasks/{task}/aliases/{alias}", openapi_extra=_CONDITIONS, responses={200: _ETAG})
async def set_alias(
    *,
    request: Request,
    response: Response,
    services: ServicesOf,
    task: params.TaskOf,
    alias: str,
    update: wire.AliasUpdate,
) -> wire.Alias:
    """Point an alias at a version; with a weight below 1 the rest of the requests stay where they are (canary)."""
    _require_alias_name(alias)
    version = await services.predictor.version_like(task, update.version)
    expect = await _expectation(request, services, task, alias)
    tries = 1 if expect is not ANY else CANARY_TRIES
    for left in reversed(range(tries)):
        try:
            return views.alias_with_etag(
                response, await _point(services, task, alias, version=version, weight=update.weight, expect=expect)
            )
        except stored.AliasConflict as error:
            if expect is not ANY:
                raise await _precondition_failed(services, task, alias, error) from error
            if not left:
                raise
    raise AssertionError("the loop returns or raises")


@router.delete("/tasks/{task}/aliases/{alias}", status_code=204, openapi_extra=_CONDITIONS)
async def delete_alias(request: Request, services: ServicesOf, task: params.TaskOf, alias: str) -> None:
    expect = await _expectation(request, services, task, alias)
    try:
        await asyncio.to_thread(services.store.delete_alias, task, alias, expect=expect)
    except stored.AliasConflict as error:
        raise await _precondition_failed(services, task, alias, error) from error


@router.get("/tasks/{task}/aliases/{alias}/history")
async def alias_history(services: ServicesOf, task: params.TaskOf, alias: str) -> wire.AliasHistory:
    states = await asyncio.to_thread(services.store.history, task, alias)
    return wire.AliasHistory(changes=[views.change(state) for state in states])


@router.post("/tasks/{task}/rollback", openapi_extra=_CONDITIONS, responses={200: _ETAG})
async def rollback(
    request: Request,
    response: Response,
    services: ServicesOf,
    task: params.TaskOf,
    body: wire.RollbackRequest | None = None,
) -> wire.Alias:
    """Point an alias (`live` unless another is named) where it pointed before; a second rollback undoes the first."""
    alias = (body or wire.RollbackRequest()).alias
    expect = await _expectation(request, services, task, alias)
    try:
        state = await asyncio.to_thread(services.store.rollback, task, alias, expect=expect)
    except stored.AliasConflict as error:
        raise await _precondition_failed(services, task, alias, error) from error
    return views.alias_with_etag(response, state)


async def _current(services: Services, task: str, alias: str) -> stored.Alias:
    aliases = await asyncio.to_thread(services.store.aliases, task)
    if alias not in aliases:
        raise stored.AliasNotFound(task, alias)
    return aliases[alias]


async def _point(
    services: Services, task: str, alias: str, *, version: str, weight: float, expect: stored.Expect
) -> stored.Alias:
    targets: stored.Targets = version
    if weight < 1:
        current = await _current(services, task, alias)
        targets = _with_canary(current, version, weight)
        # the new weights are computed from the revision that was read, so it must be the one that is replaced
        expect = current.revision if expect is ANY else expect
    return await asyncio.to_thread(services.store.set_alias, task, alias, targets, expect=expect)


def _with_canary(current: stored.Alias, version: str, weight: float) -> dict[str, float]:
    """`weight` of the requests go to the version; the others share the rest in their previous proportion."""
    others = {target.version: target.weight for target in current.targets if target.version != version}
    if not others:
        raise Unprocessable(
            f"weight: expected 1, as alias {current.name!r} points at no other version that could take the rest, "
            f"got {weight:g}"
        )
    left = (1 - weight) / sum(others.values())
    return {**{other: share * left for other, share in others.items()}, version: weight}


# --- conditions -------------------------------------------------------------------------------------------------------


async def _expectation(request: Request, services: Services, task: str, alias: str) -> stored.Expect:
    """The revision that If-Match or If-None-Match requires. Raises PreconditionFailed."""
    if request.headers.get("If-None-Match") == "*":
        return None
    header = request.headers.get("If-Match")
    if header is None:
        return ANY
    if header.strip() == "*":  # any revision, but one (RFC 9110, section 13.1.1)
        if alias not in await asyncio.to_thread(services.store.aliases, task):
            raise PreconditionFailed(f"If-Match: *: expected an alias {alias!r} of {task!r}, got none", current=None)
        return ANY
    tag = header.strip().strip('"')
    if not (tag.isascii() and tag.isdecimal() and len(tag) < 19):
        raise PreconditionFailed(f'If-Match: expected the alias\' ETag such as "3", got {header[:40]!r}')
    return int(tag)


async def _precondition_failed(
    services: Services, task: str, alias: str, error: stored.AliasConflict
) -> PreconditionFailed:
    aliases = await asyncio.to_thread(services.store.aliases, task)
    current = views.alias(aliases[alias]).model_dump() if alias in aliases else None
    return PreconditionFailed(f"alias {alias!r} has changed: {error.detail}", current=current)


def _require_alias_name(alias: str) -> None:
    if not names.is_alias(alias):
        raise Unprocessable(f"alias: expected a name like {wire.ALIAS_PATTERN}, got {alias[:100]!r}", code="bad_alias")
