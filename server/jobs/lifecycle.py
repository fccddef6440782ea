"""The state machine of a job: pure functions, the same for every store.

A store reads the job, calls the function of the operation, and writes the resulting `Step`, the new job and its events,
in one transaction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from server.errors import Conflict

from .job import FINISHED, TRANSITIONS, Job, State, to_json
from .store import LeaseLost

LEASE_EXPIRED: Final = "lease_expired"
NewEvent = tuple[str, dict[str, Any]]  # type and data; the store adds the number and the time


@dataclass(frozen=True, slots=True)
class Step:
    job: Job
    events: tuple[NewEvent, ...] = ()


def submitted(job: Job) -> Step:
    return Step(job, (("queued", {}),))


def resubmitted(job: Job, request: Job) -> Job:
    """The job of an idempotency key. Raises Conflict (idempotency_conflict) if the request has other parameters."""
    if _parameters(job) != _parameters(request):
        raise Conflict(
            f"idempotency key {job.idempotency_key!r} was already used with different parameters, for job {job.id}",
            code="idempotency_conflict",
            job=job.id,
        )
    return job


def claimed(job: Job, *, worker: str, lease_s: float, now: float) -> Step:
    """A worker claims the job. A job whose lease expired loses an attempt, and ends here if that was the last."""
    if job.state == "running":
        lost = {"code": LEASE_EXPIRED, "detail": f"attempt {job.attempt} sent no heartbeat and lost its lease"}
        waiting = _retried(job, lost, now)
        if waiting.job.finished:
            return waiting
    else:
        waiting = Step(job)
    running = _moved(
        waiting.job,
        "running",
        attempt=job.attempt + 1,
        worker=worker,
        lease_expires_at=now + lease_s,
        started_at=job.started_at if job.started_at is not None else now,
    )
    return Step(running, (*waiting.events, ("started", {"attempt": running.attempt, "worker": worker})))


def kept_alive(job: Job, attempt: int, *, lease_s: float, progress: Mapping[str, Any] | None, now: float) -> Step:
    held = _held(job, attempt)
    return Step(
        replace(
            held, lease_expires_at=now + lease_s, progress=dict(progress) if progress is not None else held.progress
        )
    )


def noted(job: Job, attempt: int, type_: str, data: Mapping[str, Any]) -> Step:
    return Step(_held(job, attempt), ((type_, dict(data)),))


def finished(
    job: Job,
    attempt: int,
    state: State,
    *,
    version: str | None,
    metrics: Mapping[str, Any] | None,
    error: Mapping[str, str] | None,
    now: float,
) -> Step:
    if state not in FINISHED:
        raise ValueError(f"a job finishes as one of {sorted(FINISHED)}, not as {state!r}")
    held = replace(_held(job, attempt), version=version, metrics=dict(metrics or {}))
    return _ended(held, state, dict(error) if error else None, now)


def released(job: Job, attempt: int, *, now: float) -> Step:
    """Returned to the queue by a worker that shuts down. No failure is counted."""
    held = _held(job, attempt)
    if held.cancel_requested:
        return _ended(held, "cancelled", None, now)
    return Step(_waiting(held), (("queued", {"reason": "released", "attempt": attempt}),))


def attempt_failed(job: Job, attempt: int, error: Mapping[str, str], *, retry: bool, now: float) -> Step:
    held = _held(job, attempt)
    return _retried(held, dict(error), now) if retry else _ended(held, "failed", dict(error), now)


def cancelled(job: Job, *, now: float) -> Step:
    """Cancelled at once where no worker runs the job; else a request that the worker sees at its next heartbeat."""
    if job.finished:
        raise Conflict(f"job {job.id} is {job.state} already and cannot be cancelled", code="job_finished")
    if job.state == "queued" or job.lease_expired(now):
        return _ended(job, "cancelled", None, now)
    if job.cancel_requested:
        return Step(job)
    return Step(replace(job, cancel_requested=True), (("cancel_requested", {}),))


# --- the parts --------------------------------------------------------------------------------------------------------


def _parameters(job: Job) -> tuple[str, ...]:
    """The parameters that have to be equal for the same idempotency key: all but the priority."""
    return job.task, job.dataset, job.method, to_json(job.recipe), job.publish


def _held(job: Job, attempt: int) -> Job:
    if job.state != "running" or job.attempt != attempt:
        raise LeaseLost(job, attempt)
    return job


def _moved(job: Job, state: State, **changes: Any) -> Job:
    if state not in TRANSITIONS[job.state]:
        raise ValueError(f"job {job.id} cannot go from {job.state} to {state}")
    return replace(job, state=state, **changes)


def _waiting(job: Job, **changes: Any) -> Job:
    return _moved(job, "queued", worker=None, lease_expires_at=None, **changes)


def _ended(job: Job, state: State, error: dict[str, str] | None, now: float) -> Step:
    """The final step: without worker and lease, and without the errors of earlier attempts."""
    ended = _moved(job, state, worker=None, lease_expires_at=None, error=error, finished_at=now)
    data = {"version": ended.version, "error": error}
    return Step(ended, ((state, {key: value for key, value in data.items() if value is not None}),))


def _retried(job: Job, error: dict[str, str], now: float) -> Step:
    """The step after a failed attempt: back to the queue, unless cancellation was requested or it was the last."""
    failed = replace(job, failures=job.failures + 1)
    # an error that an attempt reported says more than a lost lease
    last = job.error if job.error and error["code"] == LEASE_EXPIRED else error
    if job.cancel_requested:
        return _ended(failed, "cancelled", None, now)
    if failed.failures >= job.max_attempts:
        return _ended(failed, "failed", _given_up(failed, last), now)
    return Step(_waiting(failed, error=last), (("retried", {"attempt": job.attempt, "error": error}),))


def _given_up(job: Job, last: Mapping[str, str]) -> dict[str, str]:
    detail = f"gave up after {job.failures} of {job.max_attempts} attempts; the last error was {last['code']}: "
    return {"code": "too_many_attempts", "detail": detail + last["detail"]}
