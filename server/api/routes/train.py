"""Training over HTTP: jobs are asked for, listed, watched and cancelled here; workers elsewhere do them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Annotated, Any, Final

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import Response

from lensrack import wire
from server.api import sse
from server.api.services import Services, ServicesOf
from server.errors import Unprocessable
from server.jobs.job import Event, Job

from . import condense, predict

router = APIRouter(tags=["jobs"])

AUTO: Final = "auto"  # a search chooses the method, too
MOST_EVENTS: Final = 1000
# The store is another process's to write, and SQLite cannot call us: whoever waits for events looks again this often.
LOOK_AGAIN_S: Final = 0.15
_ACCEPTED: Final[dict[int | str, dict[str, Any]]] = {
    202: {"headers": {"Location": {"description": "Where to watch the job.", "schema": {"type": "string"}}}}
}
_STREAM: Final[dict[int | str, dict[str, Any]]] = {
    200: {"content": {sse.MEDIA_TYPE: {"schema": {"type": "string"}}}},
    204: {"description": "Asked for a stream of a job that has ended and whose events have all been seen."},
}


@router.post("/train", status_code=202, responses=_ACCEPTED)
async def train(
    response: Response,
    services: ServicesOf,
    asked: wire.TrainRequest,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> wire.Job:
    """Queue a training job. Asked again with the same Idempotency-Key it is the same job."""
    job = await queued(services, asked, idempotency_key)
    response.headers["Location"] = f"/train/{job.id}"
    return told(job)


async def queued(services: Services, asked: wire.TrainRequest, idempotency_key: str | None) -> Job:
    """The job of a request, counted for its key. Raises ServiceError kinds and the store's errors."""
    asked = await condense.taken_over(services, asked)
    if asked.method in services.baselines:
        _check_baseline(services, asked)
    elif asked.method != AUTO:
        require_method(asked.method, {AUTO, *services.methods})
    await services.meter.job(services.key)
    return await asyncio.to_thread(_submit, services, asked, idempotency_key)


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
    return wire.JobList(jobs=[told(job) for job in jobs], next=following)


@router.get("/train/{job_id}")
async def get_job(services: ServicesOf, job_id: str) -> wire.Job:
    return told(await current(services, job_id))


@router.post("/train/{job_id}/cancel")
async def cancel(services: ServicesOf, job_id: str) -> wire.Job:
    """A waiting job ends at once, a running one within a step."""
    return told(await asyncio.to_thread(services.jobs.cancel, job_id))


@router.get("/train/{job_id}/events", response_model=wire.JobEvents, responses=_STREAM)
async def events(
    request: Request,
    services: ServicesOf,
    job_id: str,
    after: Annotated[int, Query(ge=0, description="The last `seq` seen.")] = 0,
    wait_s: Annotated[float, Query(ge=0, le=30, description="How long to wait for a first event.")] = 0.0,
) -> wire.JobEvents | Response:
    """What has happened to a job since. `next` is the next call's `after`; `finished`: nothing will follow.

    With `Accept: text/event-stream` the same as a stream that ends with the job; `Last-Event-ID` resumes it.
    """
    await request.body()
    if sse.wanted(request):
        seen = sse.last_seen(request, after)
        page = partial(_events, request, services, job_id)
        return await sse.respond(page, seen, lambda: bool(request.app.state.leaving))
    return await predict.unless_gone(request, _events(request, services, job_id, after, wait_s))


async def _events(request: Request, services: Services, job_id: str, after: int, wait_s: float) -> wire.JobEvents:
    """Each look asks for the key anew: whoever waits must not outlive its revocation, nor keep a server that leaves."""
    until = time.monotonic() + wait_s
    while True:
        await request.state.admitted(request.scope)
        job = await current(services, job_id)  # before its events: an end that is seen here is among them
        found: list[Event] = await asyncio.to_thread(services.jobs.events, job_id, after, MOST_EVENTS)
        if found or job.finished or time.monotonic() >= until or request.app.state.leaving:
            break
        await asyncio.sleep(min(LOOK_AGAIN_S, max(0.0, until - time.monotonic())))
    return wire.JobEvents(
        events=[wire.JobEvent(seq=one.seq, type=one.type, at=one.at, data=one.data) for one in found],
        next=found[-1].seq if found else after,
        finished=job.finished and len(found) < MOST_EVENTS,
    )


def require_method(name: str, known: Collection[str]) -> None:
    """Raises Unprocessable (unknown_method)."""
    if name not in known:
        names = ", ".join(sorted(known))
        raise Unprocessable(f"method: expected one of {names}, got {name[:100]!r}", code="unknown_method")


def _check_baseline(services: Services, asked: wire.TrainRequest) -> None:
    """A baseline is fitted and reported, as it is asked for. Raises Unprocessable."""
    if asked.publish != "never":
        why = services.baselines[asked.method][1]
        raise Unprocessable(
            f"method {asked.method!r} {why}, so no version of it can be stored or served: "
            f"expected publish 'never', which fits it for its figures, got {asked.publish!r}",
            code="method_not_servable",
        )
    if asked.recipe.search == "quick":
        raise Unprocessable("recipe.search: 'quick' publishes a first version, which a baseline cannot have")


def _submit(services: Services, asked: wire.TrainRequest, key: str | None) -> Job:
    dataset = services.datasets.get(asked.dataset or "")
    return services.jobs.submit(
        asked.task,
        dataset.id,
        asked.method,
        _recipe(services, asked),
        idempotency_key=key,
        tenant=services.tenant,
        priority=asked.priority,
        publish=asked.publish,
        max_attempts=services.settings.max_attempts,
    )


def _recipe(services: Services, asked: wire.TrainRequest) -> dict[str, Any]:
    """The recipe as a job keeps it: it says itself how what it leaves open is found."""
    told = asked.recipe.model_dump(exclude_none=True)
    if asked.method in services.baselines:  # what is left out takes its default
        return {**told, "search": "none"}
    return {"search": "auto", **told} if asked.method == AUTO else told


async def current(services: Services, job_id: str) -> Job:
    """A job as it is. One that is told to have succeeded can be asked at once: its version is known here by then."""

    def read() -> Job:
        job = services.jobs.get(job_id)
        refresh: Callable[[str], None] | None = getattr(services.store, "refresh", None)
        if job.state == "succeeded" and refresh is not None:
            refresh(job.task)
        return job

    return await asyncio.to_thread(read)


def told(job: Job) -> wire.Job:
    """A job in the wire's words; what only workers need stays out."""
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
