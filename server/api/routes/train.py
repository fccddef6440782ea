"""Training over HTTP: jobs are queued, listed, watched and cancelled here; worker processes run them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from difflib import get_close_matches
from functools import partial
from typing import Annotated, Any, Final

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import Response

from lensrack import wire
from server.api import sse
from server.api.middleware.root_path import located
from server.api.services import Services, ServicesOf
from server.errors import Unprocessable
from server.jobs.job import Event, Job

from . import condense, predict

router = APIRouter(tags=["jobs"])

AUTO: Final = "auto"  # a search chooses the method, too
MOST_EVENTS: Final = 1000
# The store is written by other processes, and SQLite has no notification: a request that waits for events polls.
POLL_S: Final = 0.15
_ACCEPTED: Final[dict[int | str, dict[str, Any]]] = {
    202: {"headers": {"Location": {"description": "Where to watch the job.", "schema": {"type": "string"}}}}
}
_STREAM: Final[dict[int | str, dict[str, Any]]] = {
    200: {"content": {sse.MEDIA_TYPE: {"schema": {"type": "string"}}}},
    204: {"description": "A stream was requested of a job that has ended, and all its events have been seen."},
}


@router.post("/train", status_code=202, responses=_ACCEPTED)
async def train(
    *,
    http: Request,
    response: Response,
    services: ServicesOf,
    request: wire.TrainRequest,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> wire.Job:
    """Queue a training job. The same Idempotency-Key again returns the same job."""
    job = await enqueue(services, request, idempotency_key)
    response.headers["Location"] = located(http, f"/train/{job.id}")
    return to_wire(job)


async def enqueue(services: Services, request: wire.TrainRequest, idempotency_key: str | None) -> Job:
    """Queue a job and count it for its key. Raises ServiceError kinds and the store's errors."""
    request = await condense.with_inherited(services, request)
    if request.method in services.baselines:
        _check_baseline(services, request)
    elif request.method != AUTO:
        require_method(request.method, {AUTO, *services.methods})
    return await submit_counted(services, idempotency_key, partial(_submit, services, request, idempotency_key))


async def submit_counted(services: Services, idempotency_key: str | None, submit: Callable[[], Job]) -> Job:
    """Submit a job in a thread, and count it for the key; a job that the idempotency key has submitted before is
    returned uncounted."""
    known = partial(services.jobs.submitted_with, idempotency_key or "", tenant=services.tenant)
    if idempotency_key is not None and await asyncio.to_thread(known) is not None:
        return await asyncio.to_thread(submit)
    async with services.meter.job(services.key):
        return await asyncio.to_thread(submit)


@router.get("/train")
async def list_jobs(
    services: ServicesOf,
    *,
    cursor: str | None = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    task: str | None = None,
    state: wire.JobState | None = None,
) -> wire.JobList:
    """Newest first. `next` is the cursor of the following page."""
    jobs, following = await asyncio.to_thread(
        lambda: services.jobs.list(task=task, state=state, cursor=cursor, limit=limit)
    )
    return wire.JobList(jobs=[to_wire(job) for job in jobs], next=following)


@router.get("/train/{job_id}")
async def get_job(services: ServicesOf, job_id: str) -> wire.Job:
    return to_wire(await current(services, job_id))


@router.post("/train/{job_id}/cancel")
async def cancel_job(services: ServicesOf, job_id: str) -> wire.Job:
    """A waiting job ends at once, a running one within a step."""
    return to_wire(await asyncio.to_thread(services.jobs.cancel, job_id))


@router.get("/train/{job_id}/events", response_model=wire.JobEvents, responses=_STREAM)
async def list_job_events(
    request: Request,
    services: ServicesOf,
    job_id: str,
    after: Annotated[int, Query(ge=0, description="The last `seq` seen.")] = 0,
    wait_s: Annotated[float, Query(ge=0, le=30, description="How long to wait for a first event.")] = 0.0,
) -> wire.JobEvents | Response:
    """What has happened to a job since. `next` is the next call's `after`; `finished`: nothing will follow.

    With `Accept: text/event-stream` the same as a stream that ends with the job; `Last-Event-ID` resumes it. Between
    the events, the stream has `progress` where it has changed, about once a second.
    """
    await request.body()
    if sse.accepted(request):
        seen = sse.last_seen(request, after)
        page = partial(_events, request, services, job_id)
        return await sse.respond(page, seen, lambda: bool(request.app.state.leaving))
    return await predict.unless_gone(request, _events(request, services, job_id, after, wait_s))


async def _events(request: Request, services: Services, job_id: str, after: int, wait_s: float) -> wire.JobEvents:
    """Every poll checks the key again: a waiting request must not outlive its revocation, nor delay a shutdown."""
    until = time.monotonic() + wait_s
    while True:
        await request.state.reauthorize(request.scope)
        job = await current(services, job_id)  # read before the events, so that they include the end that it shows
        events_: list[Event] = await asyncio.to_thread(services.jobs.events, job_id, after, MOST_EVENTS)
        if events_ or job.finished or time.monotonic() >= until or request.app.state.leaving:
            break
        await asyncio.sleep(min(POLL_S, max(0.0, until - time.monotonic())))
    return wire.JobEvents(
        events=[wire.JobEvent(seq=event.seq, type=event.type, at=event.at, data=event.data) for event in events_],
        next=events_[-1].seq if events_ else after,
        finished=job.finished and len(events_) < MOST_EVENTS,
        progress=wire.JobProgress.model_validate(job.progress),
    )


def require_method(name: str, known: Collection[str]) -> None:
    """Raises Unprocessable (unknown_method)."""
    if name not in known:
        names, near = ", ".join(sorted(known)), get_close_matches(name[:100], known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise Unprocessable(f"method: expected one of {names}, got {name[:100]!r}{hint}", code="unknown_method")


def _check_baseline(services: Services, request: wire.TrainRequest) -> None:
    """A baseline is fitted and reported, never published. Raises Unprocessable."""
    if request.publish != "never":
        why = services.baselines[request.method][1]
        raise Unprocessable(
            f"method {request.method!r} {why}, so no version of it can be stored or served: "
            f"expected publish 'never', which fits it for its figures, got {request.publish!r}",
            code="method_not_servable",
        )
    if request.recipe.search == "quick":
        raise Unprocessable("recipe.search: 'quick' publishes a first version, which a baseline cannot have")


def _submit(services: Services, request: wire.TrainRequest, key: str | None) -> Job:
    dataset = services.datasets.get(request.dataset or "")
    return services.jobs.submit(
        request.task,
        dataset.id,
        request.method,
        _recipe(services, request),
        idempotency_key=key,
        tenant=services.tenant,
        priority=request.priority,
        publish=request.publish,
        max_attempts=services.settings.max_attempts,
    )


def _recipe(services: Services, request: wire.TrainRequest) -> dict[str, Any]:
    """The recipe as a job stores it; `search` says how the fields that it leaves open are chosen."""
    recipe = request.recipe.model_dump(exclude_none=True)
    if request.method in services.baselines:  # what is left out takes its default
        return {**recipe, "search": "none"}
    return {"search": "auto", **recipe} if request.method == AUTO else recipe


async def current(services: Services, job_id: str) -> Job:
    """Return a job. When it has succeeded, its version is known to this process before the client hears of it."""

    def read() -> Job:
        job = services.jobs.get(job_id)
        refresh: Callable[[str], None] | None = getattr(services.store, "refresh", None)
        if job.state == "succeeded" and refresh is not None:
            refresh(job.task)
        return job

    return await asyncio.to_thread(read)


def to_wire(job: Job) -> wire.Job:
    """Return a job as clients see it, without what only workers need."""
    return wire.Job(
        id=job.id,
        task=job.task,
        dataset=job.dataset,
        method=job.method,
        recipe=job.recipe,
        publish=job.publish,
        priority=job.priority,
        state=job.state,
        attempt=job.attempt,
        progress=wire.JobProgress.model_validate(job.progress),
        version=job.version,
        metrics=job.metrics,
        error=wire.JobError.model_validate(job.error) if job.error else None,
        cancel_requested=job.cancel_requested,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
    )
