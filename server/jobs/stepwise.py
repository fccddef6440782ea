"""The part of the job store that all backends share: every operation becomes a `Step` of the lifecycle.

A backend implements how a job is added and how a step is taken: read the job, decide, write job and events atomically.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from . import lifecycle
from .job import Job, Publish, State, to_json
from .lifecycle import Step


class StepwiseJobStore(ABC):
    """The operations of the job store that are the same for every backend."""

    @abstractmethod
    def _add(self, request: Job) -> Job:
        """Queue `request` with an id and a time, or return the job that its idempotency key belongs to."""

    @abstractmethod
    def _step(self, job_id: str, decide: Callable[[Job, float], Step]) -> Job:
        """Read the job, call `decide` with it and the time, write the step atomically, and return the new job."""

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
        request = Job(
            id="",
            task=task,
            dataset=dataset,
            method=method,
            recipe=json.loads(to_json(recipe)),
            max_attempts=max_attempts,
            created_at=0.0,
            priority=priority,
            publish=publish,
            tenant=tenant,
            idempotency_key=idempotency_key,
        )
        return self._add(request)

    def heartbeat(self, job_id: str, attempt: int, lease_s: float, progress: Mapping[str, Any] | None = None) -> Job:
        return self._step(
            job_id, lambda job, now: lifecycle.kept_alive(job, attempt, lease_s=lease_s, progress=progress, now=now)
        )

    def finish(
        self,
        job_id: str,
        attempt: int,
        state: State,
        *,
        version: str | None = None,
        metrics: Mapping[str, Any] | None = None,
        error: Mapping[str, str] | None = None,
    ) -> Job:
        return self._step(
            job_id,
            lambda job, now: lifecycle.finished(
                job, attempt, state, version=version, metrics=metrics, error=error, now=now
            ),
        )

    def release(self, job_id: str, attempt: int) -> Job:
        return self._step(job_id, lambda job, now: lifecycle.released(job, attempt, now=now))

    def fail_attempt(self, job_id: str, attempt: int, error: Mapping[str, str], *, retry: bool) -> Job:
        return self._step(job_id, lambda job, now: lifecycle.attempt_failed(job, attempt, error, retry=retry, now=now))

    def cancel(self, job_id: str) -> Job:
        return self._step(job_id, lambda job, now: lifecycle.cancelled(job, now=now))
