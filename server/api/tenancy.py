"""What a key with a prefix sees of the server. Other tenants' resources look as if they did not exist (404).

A route gets services that are scoped to the request's key already, so no route can forget to check. Only names that a
request would create cannot be 404: those outside the prefix are refused alike (403), whether the task exists or not.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import prompts_store as stored
from lensrack import wire
from prompts_store import ANY, Alias, Bundle, Change, Store, VersionInfo
from server.datasets.dataset import Example
from server.datasets.feedback_store import Added, Page, no_feedback
from server.errors import Forbidden, NotFound
from server.jobs.job import Job, Publish, State
from server.jobs.store import Events, Jobs
from server.keys.key import Key
from server.serving.residency import Residency

from .services import FeedbackRequests, JobRequests, Services

NOTHING: Final = "\0"  # the tenant of a request without a key: no name begins with it


def services_by_key(services: Services) -> Callable[[Key | None], Services]:
    """Return a function from a request's key to its services. Cached by prefix, and by key until the key changes."""
    by_tenant: dict[tuple[str, int | None], Services] = {}
    by_key: dict[str, Services] = {}

    def services_of(key: Key | None) -> Services:
        tenant, quota = (NOTHING, 0) if key is None else (key.tasks, key.allowance.bytes_stored)
        if (tenant, quota) not in by_tenant:
            by_tenant[tenant, quota] = scoped(services, tenant, quota)
        if key is None:
            return by_tenant[tenant, quota]
        cached = by_key.get(key.id)
        if cached is None or cached.key is not key:
            cached = by_key[key.id] = replace(by_tenant[tenant, quota], key=key)
        return cached

    return services_of


def scoped(services: Services, tenant: str, quota: int | None) -> Services:
    """Return the services restricted to one tenant. `quota`: the most bytes that its data sets, unfinished uploads and
    feedback may have."""
    uploads = services.uploads.scoped(tenant)

    def besides() -> int:
        return uploads.reserved() + services.feedback.stored_bytes(tenant)

    datasets = services.datasets.scoped(tenant, quota, besides)
    if not tenant:
        return replace(services, datasets=datasets)
    store = ScopedStore(services.store, tenant)
    residency = ScopedResidency(services.residency, store)
    return replace(
        services,
        tenant=tenant,
        store=store,
        residency=residency,
        predictor=services.predictor.scoped(store, residency),
        jobs=ScopedJobs(services.jobs, tenant),
        datasets=datasets,
        uploads=uploads,
        feedback=ScopedFeedback(services.feedback, tenant, datasets.require_room),
        rack=partial(scoped_rack, services.rack, tenant),
    )


async def scoped_rack(read: Callable[[], Awaitable[wire.Rack]], tenant: str) -> wire.Rack:
    """Return the rack with the tenant's seats only, without counts over all tasks, which would reveal the others'."""
    rack = await read()
    seats = [seat for seat in rack.seats if seat.task.startswith(tenant)]
    used = {"used_slots": len(seats), "used_bytes": sum(seat.bytes for seat in seats)}
    return rack.model_copy(update={"seats": seats, **used, "hits": 0, "loads": 0, "evictions": 0})


def require_scoped_name(tenant: str, task: str) -> None:
    """For names that a request would create. Raises Forbidden, whether the task exists or not."""
    if not task.startswith(tenant):
        raise Forbidden(f"the names of this key's tasks begin with {tenant!r}, got {task[:100]!r}")


class ScopedStore:
    """The tasks of a store whose names begin with `tenant`."""

    def __init__(self, inner: Store, tenant: str) -> None:
        self._inner, self._tenant = inner, tenant

    def put(self, bundle: Bundle) -> str:
        require_scoped_name(self._tenant, bundle.manifest.task)
        return self._inner.put(bundle)

    def get(self, task: str, version: str) -> Bundle:
        return self._store_of(task).get(task, version)

    def tasks(self) -> list[str]:
        return [task for task in self._inner.tasks() if task.startswith(self._tenant)]

    def versions(self, task: str) -> list[VersionInfo]:
        return self._store_of(task).versions(task)

    def aliases(self, task: str) -> dict[str, Alias]:
        return self._store_of(task).aliases(task)

    def known_aliases(self, task: str) -> Mapping[str, Alias] | None:
        known: Callable[[str], Mapping[str, Alias] | None] | None = getattr(self._store_of(task), "known_aliases", None)
        return known(task) if known is not None else None

    def known_versions(self, task: str) -> Sequence[VersionInfo] | None:
        known: Callable[[str], Sequence[VersionInfo] | None] | None = getattr(
            self._store_of(task), "known_versions", None
        )
        return known(task) if known is not None else None

    def refresh(self, task: str) -> None:
        refresh: Callable[[str], None] | None = getattr(self._store_of(task), "refresh", None)
        if refresh is not None:
            refresh(task)

    def set_alias(self, task: str, alias: str, targets: stored.Targets, *, expect: stored.Expect = ANY) -> Alias:
        return self._store_of(task).set_alias(task, alias, targets, expect=expect)

    def delete_alias(self, task: str, alias: str, *, expect: stored.Expect = ANY) -> None:
        self._store_of(task).delete_alias(task, alias, expect=expect)

    def history(self, task: str, alias: str) -> list[Alias]:
        return self._store_of(task).history(task, alias)

    def rollback(self, task: str, alias: str, *, expect: stored.Expect = ANY) -> Alias:
        return self._store_of(task).rollback(task, alias, expect=expect)

    def delete_version(self, task: str, version: str) -> None:
        self._store_of(task).delete_version(task, version)

    def delete_task(self, task: str) -> None:
        self._store_of(task).delete_task(task)

    def watch(self, stop: threading.Event) -> Iterator[Change]:
        return (change for change in self._inner.watch(stop) if change.task.startswith(self._tenant))

    def close(self) -> None:
        """The inner store is closed by its owner."""

    def owns(self, task: str) -> bool:
        return task.startswith(self._tenant)

    def _store_of(self, task: str) -> Store:
        if not self.owns(task):
            raise stored.TaskNotFound(task)
        return self._inner


class ScopedResidency:
    """The seats of the tenant's tasks."""

    def __init__(self, inner: Residency, store: ScopedStore) -> None:
        self._inner, self._store = inner, store

    async def acquire(self, task: str, version: str) -> Any:
        self._require(task)
        return await self._inner.acquire(task, version)

    def release(self, seat: Any) -> None:
        self._inner.release(seat)

    async def load(self, task: str, version: str) -> None:
        self._require(task)
        await self._inner.load(task, version)

    async def unload(self, task: str, version: str) -> bool:
        return self._store.owns(task) and await self._inner.unload(task, version)

    async def pin(self, task: str, version: str, on: bool) -> bool:
        return self._store.owns(task) and await self._inner.pin(task, version, on)

    def pinned(self, task: str, version: str) -> bool:
        return self._store.owns(task) and self._inner.pinned(task, version)

    def resident(self, task: str, version: str) -> bool:
        return self._store.owns(task) and self._inner.resident(task, version)

    def lens_bytes(self, task: str, version: str) -> int:
        return self._inner.lens_bytes(task, version) if self._store.owns(task) else 0

    def _require(self, task: str) -> None:
        if not self._store.owns(task):
            raise stored.TaskNotFound(task)


class ScopedJobs:
    """The jobs of the tenant's tasks."""

    def __init__(self, inner: JobRequests, tenant: str) -> None:
        self._inner, self._tenant = inner, tenant

    def submit(
        self,
        task: str,
        dataset: str,
        method: str,
        recipe: Mapping[str, Any],
        *,
        idempotency_key: str | None = None,
        tenant: str = "",
        priority: int = 0,
        publish: Publish = "always",
        max_attempts: int,
    ) -> Job:
        require_scoped_name(self._tenant, task)
        return self._inner.submit(
            task, dataset, method, recipe, idempotency_key=idempotency_key, tenant=self._tenant, priority=priority,
            publish=publish, max_attempts=max_attempts,
        )  # fmt: skip

    def submitted_with(self, idempotency_key: str, *, tenant: str = "") -> Job | None:
        return self._inner.submitted_with(idempotency_key, tenant=self._tenant)

    def get(self, job_id: str) -> Job:
        job = self._inner.get(job_id)
        if not job.task.startswith(self._tenant):
            raise NotFound(f"there is no job {job_id[:64]!r}", code="job_not_found")
        return job

    def list(
        self,
        *,
        task: str | None = None,
        state: State | None = None,
        cursor: str | None = None,
        limit: int = 50,
        task_prefix: str = "",
    ) -> tuple[Jobs, str | None]:
        if task is not None and not task.startswith(self._tenant):
            task = NOTHING
        prefix = task_prefix if task_prefix.startswith(self._tenant) else self._tenant
        return self._inner.list(task=task, state=state, cursor=cursor, limit=limit, task_prefix=prefix)

    def cancel(self, job_id: str) -> Job:
        self.get(job_id)
        return self._inner.cancel(job_id)

    def events(self, job_id: str, after: int = 0, limit: int = 1000) -> Events:
        self.get(job_id)
        return self._inner.events(job_id, after, limit)


class ScopedFeedback:
    """Feedback on the tenant's tasks; other tasks look as if they had none."""

    def __init__(self, inner: FeedbackRequests, tenant: str, require_room: Callable[[int], None]) -> None:
        self._inner, self._tenant, self._require_room = inner, tenant, require_room

    def stored_bytes(self, tenant: str) -> int:
        return self._inner.stored_bytes(tenant if tenant.startswith(self._tenant) else self._tenant)

    def add(self, task: str, pictures: Sequence[bytes], label: str) -> list[Added]:
        require_scoped_name(self._tenant, task)
        self._require_room(sum(map(len, pictures)))
        return self._inner.add(task, pictures, label)

    def page(self, task: str, *, label: str | None = None, before: int | None = None, limit: int = 50) -> Page:
        if not task.startswith(self._tenant):
            return Page({}, [], None)
        return self._inner.page(task, label=label, before=before, limit=limit)

    def examples(self, task: str) -> list[tuple[Example, Path]]:
        return self._inner.examples(task) if task.startswith(self._tenant) else []

    def delete(self, task: str, sha256: str) -> None:
        if not task.startswith(self._tenant):
            raise no_feedback(task, sha256)
        self._inner.delete(task, sha256)

    def delete_task(self, task: str) -> None:
        if task.startswith(self._tenant):
            self._inner.delete_task(task)
