"""The job store: what every backend promises. `tests/jobs/test_job_store.py` holds each of them to it.

A job is a stored resource with a lease, not a message that can be lost. Whoever claims it gets an attempt number, and
every later word about the job must carry it: a worker that wakes up late is told `LeaseLost` and can change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from .job import Event, Job, Publish, State

Jobs = list[Job]  # inside the store `list` is a verb
Events = list[Event]


class LeaseLost(Exception):
    """The attempt is no longer the current one: the job ended, went back to the queue, or another worker has it."""

    def __init__(self, job: Job, attempt: int) -> None:
        super().__init__(f"attempt {attempt} of job {job.id} is over: the job is {job.state}, attempt {job.attempt}")
        self.job, self.attempt = job, attempt


class JobStore(Protocol):
    """Safe for threads and processes. A job changes and the event that tells of it is written together or not at all.

    Raises `NotFound` job_not_found for an unknown id, `Unavailable` store_unavailable or `DiskFull` when the backend
    fails. Recipes, progress, metrics and event data are JSON objects; NaN and the infinities are stored as null.
    """

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
        """A new queued job; ids sort in the order of submission.

        A tenant's idempotency key names one job: asked again with the same task, dataset, method, recipe and publishing
        policy the answer is that job as it now is; with others `Conflict` idempotency_conflict, whose extra `job` is
        its id.
        """

    def get(self, job_id: str) -> Job: ...

    def list(
        self,
        *,
        task: str | None = None,
        state: State | None = None,
        cursor: str | None = None,
        limit: int = 50,
        tenant: str | None = None,
        task_prefix: str = "",
    ) -> tuple[Jobs, str | None]:
        """Newest first, at most `limit`, and the cursor of the next page or None. `BadRequest` for a foreign cursor.

        `task_prefix` is how the tasks' names begin; a backend may have to look at every job for it.
        """

    def claim(self, worker: str, lease_s: float) -> Job | None:
        """The waiting job of highest priority, the oldest of these, now running with one attempt more; or None.

        A running job whose lease expired waits too. It is retried, or ended when it was to be cancelled or has no
        attempt left (`too_many_attempts`, with the last error in the detail).
        """

    def heartbeat(self, job_id: str, attempt: int, lease_s: float, progress: Mapping[str, Any] | None = None) -> Job:
        """Keep the lease for `lease_s` from now and tell the progress. See `cancel_requested` of the answer."""

    def append_event(self, job_id: str, attempt: int, type_: str, data: Mapping[str, Any]) -> Event: ...

    def set_checkpoint(self, job_id: str, attempt: int, ref: str | None) -> Job: ...

    def finish(
        self,
        job_id: str,
        attempt: int,
        state: State,
        *,
        version: str | None = None,
        metrics: Mapping[str, Any] | None = None,
        error: Mapping[str, str] | None = None,
    ) -> Job: ...

    def release(self, job_id: str, attempt: int) -> Job:
        """Back to the queue without a failure counted; cancelled when that was asked for."""

    def fail_attempt(self, job_id: str, attempt: int, error: Mapping[str, str], *, retry: bool) -> Job:
        """`error` is {"code", "detail"}. With `retry` back to the queue while attempts are left, otherwise failed."""

    def cancel(self, job_id: str) -> Job:
        """Cancelled at once when nobody works on it, otherwise asked of the worker. `Conflict` job_finished."""

    def events(self, job_id: str, after: int = 0, limit: int = 1000) -> Events:
        """Events with seq > `after`, in order."""

    def prune(self, older_than_s: float) -> Jobs:
        """Forget the jobs that finished longer ago, with their events; the answer is what was forgotten."""

    def counts(self) -> dict[State, int]:
        """The number of jobs in every state."""

    def close(self) -> None: ...
