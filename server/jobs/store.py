"""The interface of the job store. `tests/jobs/test_job_store.py` tests every backend against it.

A job is a stored resource with a lease, not a message that can be lost. A claim returns an attempt number, which every
later call for the job must carry: a worker that lost its lease gets `LeaseLost` and can change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from .job import Event, Job, Publish, State

Jobs = list[Job]  # in the store, `list` is a method
Events = list[Event]


class LeaseLost(Exception):
    """The attempt is no longer the current one: the job ended, went back to the queue, or another worker has it."""

    def __init__(self, job: Job, attempt: int) -> None:
        super().__init__(f"attempt {attempt} of job {job.id} is over: the job is {job.state}, attempt {job.attempt}")
        self.job, self.attempt = job, attempt


class JobStore(Protocol):
    """Safe for threads and processes. A change of a job and its event are written together or not at all.

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

        A tenant's idempotency key belongs to one job: a second call with the same task, dataset, method, recipe and
        publishing policy returns that job as it is then; with other parameters it raises `Conflict`
        idempotency_conflict, whose extra `job` is the job's id.
        """

    def submitted_with(self, idempotency_key: str, *, tenant: str = "") -> Job | None:
        """The job that the tenant's idempotency key belongs to; None while it is unused."""

    def get(self, job_id: str) -> Job: ...

    def list(
        self,
        *,
        task: str | None = None,
        state: State | None = None,
        cursor: str | None = None,
        limit: int = 50,
        task_prefix: str = "",
    ) -> tuple[Jobs, str | None]:
        """At most `limit` jobs, newest first, and the cursor of the next page or None. Raises `BadRequest` for an
        invalid cursor.

        `task_prefix`: of the tasks' names; a backend may have to read every job for it.
        """

    def claim(self, worker: str, lease_s: float) -> Job | None:
        """Claim the waiting job of highest priority, of these the oldest. It is returned running, with the next attempt
        number; None where no job waits.

        A running job whose lease expired waits too. It is retried, or ended where cancellation was requested or no
        attempt is left (`too_many_attempts`, with the last error in the detail).
        """

    def heartbeat(self, job_id: str, attempt: int, lease_s: float, progress: Mapping[str, Any] | None = None) -> Job:
        """Renew the lease for `lease_s` from now and store the progress. The returned job has `cancel_requested`."""

    def append_event(self, job_id: str, attempt: int, type_: str, data: Mapping[str, Any]) -> Event: ...

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
        """Return the job to the queue without counting a failure; cancelled where that was requested."""

    def fail_attempt(self, job_id: str, attempt: int, error: Mapping[str, str], *, retry: bool) -> Job:
        """With `retry` return the job to the queue while attempts are left; else it fails. error: its code, detail."""

    def cancel(self, job_id: str) -> Job:
        """Cancel the job, at once or by a request to its worker. Raises `Conflict` job_finished."""

    def events(self, job_id: str, after: int = 0, limit: int = 1000) -> Events:
        """Events with seq > `after`, in order."""

    def prune(self, older_than_s: float) -> Jobs:
        """Delete the jobs that finished longer ago, with their events. Returns the deleted jobs."""

    def counts(self) -> dict[State, int]:
        """The number of jobs in every state."""

    def close(self) -> None: ...
