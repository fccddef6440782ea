"""What each operation makes of a job: pure functions, the same for every store.

A store reads the job, asks here for the `Step`, and writes the new job and its events in one transaction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from server.errors import Conflict

from .job import FINISHED, TRANSITIONS, Job, State, to_json
from .store import LeaseLost

SILENT: Final = "lease_expired"
Happening = tuple[str, dict[str, Any]]  # an event's type and data, before the store gives it a number and a time


@dataclass(frozen=True, slots=True)
class Step:
    job: Job
    events: tuple[Happening, ...] = ()


def submitted(job: Job) -> Step:
    return Step(job, (("queued", {}),))


def resubmitted(job: Job, asked: Job) -> Job:
    """The job that an idempotency key stands for, when it is asked for in the same words."""
    if _words(job) != _words(asked):
        raise Conflict(
            f"idempotency key {job.idempotency_key!r} belongs to job {job.id}, which was asked for in other words",
            code="idempotency_conflict",
            job=job.id,
        )
    return job


def claimed(job: Job, *, worker: str, lease_s: float, now: float) -> Step:
    """A worker takes the job. One whose lease expired has lost an attempt: it may end here instead of running again."""
    if job.state == "running":
        lost = {"code": SILENT, "detail": f"attempt {job.attempt} fell silent and lost its lease"}
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


def checkpointed(job: Job, attempt: int, ref: str | None) -> Step:
    return Step(replace(_held(job, attempt), checkpoint=ref))


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
    """Given back in good order, by a worker that is being stopped: no failure is counted."""
    held = _held(job, attempt)
    if held.cancel_requested:
        return _ended(held, "cancelled", None, now)
    return Step(_waiting(held), (("queued", {"reason": "released", "attempt": attempt}),))


def attempt_failed(job: Job, attempt: int, error: Mapping[str, str], *, retry: bool, now: float) -> Step:
    held = _held(job, attempt)
    return _retried(held, dict(error), now) if retry else _ended(held, "failed", dict(error), now)


def cancelled(job: Job, *, now: float) -> Step:
    """At once when nobody works on it; otherwise a request that the worker sees at its next heartbeat."""
    if job.finished:
        raise Conflict(f"job {job.id} is {job.state} already and cannot be cancelled", code="job_finished")
    if job.state == "queued" or job.lease_expired(now):
        return _ended(job, "cancelled", None, now)
    if job.cancel_requested:
        return Step(job)
    return Step(replace(job, cancel_requested=True), (("cancel_requested", {}),))


# --- the parts --------------------------------------------------------------------------------------------------------


def _words(job: Job) -> tuple[str, ...]:
    """What makes a request another one. How urgent it is does not."""
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
    """An end is final: nobody holds the job any more, and what went wrong in earlier attempts no longer matters."""
    ended = _moved(job, state, worker=None, lease_expires_at=None, error=error, finished_at=now)
    told = {"version": ended.version, "error": error}
    return Step(ended, ((state, {key: value for key, value in told.items() if value is not None}),))


def _retried(job: Job, error: dict[str, str], now: float) -> Step:
    """One attempt has failed: back into the queue, unless it was to be cancelled anyway or was the last."""
    failed = replace(job, failures=job.failures + 1)
    last = job.error if job.error and error["code"] == SILENT else error  # a reported error says more than silence
    if job.cancel_requested:
        return _ended(failed, "cancelled", None, now)
    if failed.failures >= job.max_attempts:
        return _ended(failed, "failed", _given_up(failed, last), now)
    return Step(_waiting(failed, error=last), (("retried", {"attempt": job.attempt, "error": error}),))


def _given_up(job: Job, last: Mapping[str, str]) -> dict[str, str]:
    detail = f"gave up after {job.failures} of {job.max_attempts} attempts; the last error was {last['code']}: "
    return {"code": "too_many_attempts", "detail": detail + last["detail"]}
