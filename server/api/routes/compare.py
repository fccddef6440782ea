"""Comparisons over HTTP: queued here, run by workers as jobs, watched and cancelled under /train like any job."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Any, Final

from fastapi import APIRouter, Header, Request
from starlette.responses import Response

from lensrack import wire
from server.api.middleware.root_path import located
from server.api.services import Services, ServicesOf
from server.errors import NotFound
from server.jobs.job import Job

from . import train

router = APIRouter(tags=["jobs"])

COMPARE: Final = "compare"  # the method of such a job
_ACCEPTED: Final[dict[int | str, dict[str, Any]]] = {
    202: {"headers": {"Location": {"description": "Where to watch the job.", "schema": {"type": "string"}}}}
}


@router.post("/compare", status_code=202, responses=_ACCEPTED)
async def compare(
    *,
    request: Request,
    response: Response,
    services: ServicesOf,
    comparison: wire.CompareRequest,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> wire.Job:
    """Queue a comparison of methods. Its job is watched, followed and cancelled like any other."""
    known = {*services.methods, *services.baselines}
    for name in comparison.methods or ():
        train.require_method(name, known)
    submit = partial(_submit, services, comparison, idempotency_key)
    job = await train.submit_counted(services, idempotency_key, submit)
    response.headers["Location"] = located(request, f"/train/{job.id}")
    return train.to_wire(job)


@router.get("/compare/{job_id}")
async def get_comparison(services: ServicesOf, job_id: str) -> wire.Comparison:
    """What a comparison has found: its table once it has succeeded."""
    job = await asyncio.to_thread(services.jobs.get, job_id)
    if job.method != COMPARE:
        raise NotFound(f"job {job.id} compares nothing: its method is {job.method!r}", code="job_not_found")
    table = {"task": job.task, "title": job.task, **job.metrics.get(COMPARE, {})}
    return wire.Comparison.model_validate({**table, "id": job.id, "dataset": job.dataset, "state": job.state})


def _submit(services: Services, comparison: wire.CompareRequest, key: str | None) -> Job:
    dataset = services.datasets.get(comparison.dataset)
    request = {
        "methods": comparison.methods or list(services.methods),
        "seeds": comparison.seeds,
        "recipe": comparison.recipe.model_dump(exclude_none=True),
    }
    return services.jobs.submit(
        comparison.task,
        dataset.id,
        COMPARE,
        {COMPARE: request},
        idempotency_key=key,
        tenant=services.tenant,
        priority=comparison.priority,
        publish="never",
        max_attempts=services.settings.max_attempts,
    )
