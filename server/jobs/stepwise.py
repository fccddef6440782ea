"""What every job store does alike: take a request apart, and turn each of a worker's words into a `Step`.

A backend says how a new job is added and how a step is taken: read the job, decide, write job and events as one.
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
    """The verbs of the job store that are the same for every backend."""

    @abstractmethod
    def _add(self, asked: Job) -> Job:
        """Give `asked` an id and a time and queue it, unless its idempotency key stands for a job already."""

    @abstractmethod
    def _step(self, job_id: str, decide: Callable[[Job, float], Step]) -> Job:
        """What `decide` makes of the job at this time, written together with its events or not at all."""

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
        asked = Job(
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
        return self._add(asked)

    def heartbeat(self, job_id: str, attempt: int, lease_s: float, progress: Mapping[str, Any] | None = None) -> Job:
        return self._step(
            job_id, lambda job, now: lifecycle.kept_alive(job, attempt, lease_s=lease_s, progress=progress, now=now)
        )

    def set_checkpoint(self, job_id: str, attempt: int, ref: str | None) -> Job:
        return self._step(job_id, lambda job, _: lifecycle.checkpointed(job, attempt, ref))

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
