"""Which versions are on the device, and loading, unloading and pinning them by hand."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter

from lensrack import wire
from server.api import params, views
from server.api.services import Services, ServicesOf
from server.serving.predictor import within_timeout
from server.serving.resolver import Ref

router = APIRouter(tags=["residency"])


@router.post("/tasks/{task}/load")
async def load_version(services: ServicesOf, ref: params.RefOf) -> wire.Residency:
    """Make a version (`task`, `task@alias` or `task@version`) resident ahead of its first request."""
    version = await one_version(services, ref)
    await within_timeout(services.settings.request_timeout_s, services.residency.load(ref.task, version))
    return views.residency(services, ref.task, version)


@router.post("/tasks/{task}/unload")
async def unload_version(services: ServicesOf, ref: params.RefOf) -> wire.Residency:
    """Free the version's memory on the device; answers when the last request that needs it has been served."""
    version = await one_version(services, ref)
    await services.residency.unload(ref.task, version)
    return views.residency(services, ref.task, version)


@router.post("/tasks/{task}/pin")
async def pin_version(services: ServicesOf, ref: params.RefOf, body: wire.PinRequest | None = None) -> wire.Residency:
    """Make a version resident and keep it from being evicted, or with `pinned: false` no longer keep it."""
    version = await one_version(services, ref)
    if (body or wire.PinRequest()).pinned:
        acquire = services.residency.acquire(ref.task, version)
        seat = await within_timeout(services.settings.request_timeout_s, acquire)  # until the release, no eviction
        await services.residency.pin(ref.task, version, True)
        services.residency.release(seat)
    else:
        await services.residency.pin(ref.task, version, False)
    return views.residency(services, ref.task, version)


async def one_version(services: Services, ref: Ref) -> str:
    """Return the version that a reference means; of a split alias, the one with most of the requests."""
    aliases = await asyncio.to_thread(services.store.aliases, ref.task)
    if ref.name in aliases:
        return aliases[ref.name].heaviest
    return await services.predictor.resolve(ref, key="")
