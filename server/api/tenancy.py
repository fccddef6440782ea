"""What a key with a prefix sees of the server: its own, and of everything else exactly what it would see of nothing.

The services that a route is given are narrowed before it gets them, so no route can forget to ask. What is not the
key's fails with the words that what does not exist fails with. Only names that a request would make anew cannot fail
like that: those beyond the prefix are refused alike, whether there is such a task or not.
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

NOTHING: Final = "\0"  # what somebody without a key sees: no name begins with it


def scoping(services: Services) -> Callable[[Key | None], Services]:
    """From a request's key to its services. Those of one prefix are made once, a key's as long as it is unchanged."""
    made: dict[tuple[str, int | None], Services] = {}
    kept: dict[str, Services] = {}

    def narrowed(key: Key | None) -> Services:
        tenant, quota = (NOTHING, 0) if key is None else (key.tasks, key.allowance.bytes_stored)
        if (tenant, quota) not in made:
            made[tenant, quota] = within(services, tenant, quota)
        found = made[tenant, quota]
        if key is None:
            return found
        own = kept.get(key.id)
        if own is None or own.key is not key:
            own = kept[key.id] = replace(found, key=key)
        return own

    return narrowed


def within(services: Services, tenant: str, quota: int | None) -> Services:
    """`quota`: the most bytes that the tenant's data sets may have."""
    datasets = services.datasets.scoped(tenant, quota)
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
        uploads=services.uploads.scoped(tenant),
        feedback=ScopedFeedback(services.feedback, tenant),
        rack=partial(own_rack, services.rack, tenant),
    )


async def own_rack(ask: Callable[[], Awaitable[wire.Rack]], tenant: str) -> wire.Rack:
    """The key's own seats. What is counted over all tasks would tell of the others'."""
    rack = await ask()
    seats = [seat for seat in rack.seats if seat.task.startswith(tenant)]
    used = {"used_slots": len(seats), "used_bytes": sum(seat.bytes for seat in seats)}
    return rack.model_copy(update={"seats": seats, **used, "hits": 0, "loads": 0, "evictions": 0})


def require_own(tenant: str, task: str) -> None:
    """For names that would be made. Raises Forbidden, whether there is such a task or not."""
    if not task.startswith(tenant):
        raise Forbidden(f"the names of this key's tasks begin with {tenant!r}, got {task[:100]!r}")


class ScopedStore:
    """The tasks of a store whose names begin with `tenant`."""

    def __init__(self, inner: Store, tenant: str) -> None:
        self._inner, self._tenant = inner, tenant

    def put(self, bundle: Bundle) -> str:
        require_own(self._tenant, bundle.manifest.task)
        return self._inner.put(bundle)

    def get(self, task: str, version: str) -> Bundle:
        return self._of(task).get(task, version)

    def tasks(self) -> list[str]:
        return [task for task in self._inner.tasks() if task.startswith(self._tenant)]

    def versions(self, task: str) -> list[VersionInfo]:
        return self._of(task).versions(task)

    def aliases(self, task: str) -> dict[str, Alias]:
        return self._of(task).aliases(task)

    def known_aliases(self, task: str) -> Mapping[str, Alias] | None:
        known: Callable[[str], Mapping[str, Alias] | None] | None = getattr(self._of(task), "known_aliases", None)
        return known(task) if known is not None else None

    def refresh(self, task: str) -> None:
        refresh: Callable[[str], None] | None = getattr(self._of(task), "refresh", None)
        if refresh is not None:
            refresh(task)

    def set_alias(self, task: str, alias: str, targets: stored.Targets, *, expect: stored.Expect = ANY) -> Alias:
        return self._of(task).set_alias(task, alias, targets, expect=expect)

    def delete_alias(self, task: str, alias: str, *, expect: stored.Expect = ANY) -> None:
        self._of(task).delete_alias(task, alias, expect=expect)

    def history(self, task: str, alias: str) -> list[Alias]:
        return self._of(task).history(task, alias)

    def rollback(self, task: str, alias: str, *, expect: stored.Expect = ANY) -> Alias:
        return self._of(task).rollback(task, alias, expect=expect)

    def delete_version(self, task: str, version: str) -> None:
        self._of(task).delete_version(task, version)

    def delete_task(self, task: str) -> None:
        self._of(task).delete_task(task)

    def watch(self, stop: threading.Event) -> Iterator[Change]:
        return (change for change in self._inner.watch(stop) if change.task.startswith(self._tenant))

    def close(self) -> None:
        """Whoever made the inner store closes it."""

    def owns(self, task: str) -> bool:
        return task.startswith(self._tenant)

    def _of(self, task: str) -> Store:
        if not self.owns(task):
            raise stored.TaskNotFound(task)
        return self._inner


class ScopedResidency:
    """The seats of a store's own tasks."""

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
    """The jobs of own tasks."""

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
        require_own(self._tenant, task)
        return self._inner.submit(
            task, dataset, method, recipe, idempotency_key=idempotency_key, tenant=self._tenant, priority=priority,
            publish=publish, max_attempts=max_attempts,
        )  # fmt: skip

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
    """Feedback on own tasks; on others nothing has been said."""

    def __init__(self, inner: FeedbackRequests, tenant: str) -> None:
        self._inner, self._tenant = inner, tenant

    def add(self, task: str, pictures: Sequence[bytes], label: str) -> list[Added]:
        require_own(self._tenant, task)
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
