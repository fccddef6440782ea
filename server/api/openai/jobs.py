"""Fine-tuning jobs: a training job in OpenAI's words.

    model            the backbone            training_file    a data set
    suffix           the task                method.type      `supervised` lets a search choose, or a method's name
    n_epochs         epochs                  batch_size       batch_size
    hyperparameters may hold any other field of a recipe

A job that succeeds leaves a version behind: `fine_tuned_model` is `task@version`.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from typing import Annotated, Any, Final

from fastapi import APIRouter, Header, Query
from pydantic import BaseModel, ConfigDict, ValidationError

from lensrack import wire
from server.api import problems
from server.api.routes import train
from server.api.services import Services, ServicesOf
from server.errors import NotFound, Unprocessable
from server.jobs.job import Event, Job

from . import bodies, paging
from .faults import RESPONSES
from .models import require_backbone

SUPERVISED: Final = "supervised"
AUTO: Final = "auto"
_RECIPE: Final = {"n_epochs": "epochs"}  # fields with another name in our recipe
_OURS: Final = {"task": "suffix", "dataset": "training_file", "recipe": "hyperparameters"}
_LEVELS: Final = {"failed": "error", "retried": "warn", "live_unusable": "warn"}
_EVENT: Final = re.compile(r"(job_[0-9a-z]+)-([0-9]{1,18})")

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["OpenAI"], responses=RESPONSES)

After = Annotated[str | None, Query(description="The id of the last item seen.")]
Limit = Annotated[int, Query(ge=1, le=100)]


class FineTuningRequest(BaseModel):
    """`validation_file`, `integrations` and `metadata` are refused rather than ignored."""

    model_config = ConfigDict(extra="forbid")

    model: str
    training_file: str
    suffix: str
    method: dict[str, Any] | None = None
    hyperparameters: dict[str, Any] | None = None
    seed: int | None = None
    validation_file: None = None
    integrations: None = None
    metadata: None = None


@router.post("", response_model=bodies.FineTuningJob)
async def create_job(
    services: ServicesOf,
    request: FineTuningRequest,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> dict[str, Any]:
    await require_backbone(services, request.model)
    return to_wire(services, await train.enqueue(services, request_of(request), idempotency_key))


@router.get("", response_model=bodies.FineTuningJobList)
async def list_jobs(services: ServicesOf, after: After = None, limit: Limit = 20) -> dict[str, Any]:
    """Newest first."""
    jobs, following = await asyncio.to_thread(lambda: services.jobs.list(cursor=after, limit=limit))
    return paging.page([to_wire(services, job) for job in jobs], following is not None)


@router.get("/{job_id}", response_model=bodies.FineTuningJob)
async def get_job(services: ServicesOf, job_id: str) -> dict[str, Any]:
    return to_wire(services, await train.current(services, job_id))


@router.post("/{job_id}/cancel", response_model=bodies.FineTuningJob)
async def cancel_job(services: ServicesOf, job_id: str) -> dict[str, Any]:
    """A waiting job ends at once, a running one within a step: until then its status is `running`."""
    return to_wire(services, await asyncio.to_thread(services.jobs.cancel, job_id))


@router.get("/{job_id}/events", response_model=bodies.FineTuningEventList)
async def list_job_events(services: ServicesOf, job_id: str, after: After = None, limit: Limit = 20) -> dict[str, Any]:
    """Newest first."""
    before = None if after is None else _seq(job_id, after)
    all_events = await asyncio.to_thread(_events, services, job_id)
    older = [event for event in reversed(all_events) if before is None or event.seq < before]
    return paging.page([_event(job_id, event) for event in older[:limit]], len(older) > limit)


# --- in ---------------------------------------------------------------------------------------------------------------


def request_of(request: FineTuningRequest) -> wire.TrainRequest:
    """Return our training request. Raises Unprocessable, with the client's field names."""
    method, of_method = _method(request.method)
    recipe = _recipe({**(request.hyperparameters or {}), **of_method})
    if request.seed is not None:
        recipe["seed"] = request.seed
    fields: dict[str, Any] = {"task": request.suffix, "dataset": request.training_file, "method": method}
    try:
        return wire.TrainRequest.model_validate({**fields, "recipe": recipe} if recipe else fields)
    except ValidationError as error:
        findings = [{**finding, "loc": _renamed(finding["loc"])} for finding in error.errors(include_url=False)]
        raise problems.unprocessable(findings) from error


def _method(method: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """Our name of the method, and its hyper-parameters."""
    method = {"type": SUPERVISED} if method is None else method
    kind = method.get("type")
    if not isinstance(kind, str):
        raise Unprocessable(f"method.type: expected {SUPERVISED!r} or a method's name, got none", param="method.type")
    settings = method.get(kind) or {}
    if not isinstance(settings, dict) or not isinstance(settings.get("hyperparameters") or {}, dict):
        raise Unprocessable(f"method.{kind[:100]}: expected an object with hyperparameters", param="method")
    return AUTO if kind == SUPERVISED else kind, settings.get("hyperparameters") or {}


def _recipe(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Our recipe. Fields that are `auto` are left out, as a search chooses what a recipe leaves open."""
    multiplier = hyperparameters.get("learning_rate_multiplier", AUTO)
    if multiplier not in (AUTO, 1, None):
        expected = "'auto', or the rate itself as lr: methods have no common rate that could be multiplied"
        detail = f"learning_rate_multiplier: expected {expected}, got {str(multiplier)[:40]}"
        raise Unprocessable(detail, param="hyperparameters.learning_rate_multiplier")
    fields = {name: value for name, value in hyperparameters.items() if name != "learning_rate_multiplier"}
    chosen = {name: value for name, value in fields.items() if name == "search" or value not in (AUTO, None)}
    return {_RECIPE.get(name, name): value for name, value in chosen.items()}


def _renamed(location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    theirs = {ours: name for name, ours in _RECIPE.items()}
    return tuple(_OURS.get(str(part), theirs.get(str(part), part)) for part in location)


def _seq(job_id: str, event_id: str) -> int:
    parts = _EVENT.fullmatch(event_id)
    if parts is None or parts[1] != job_id:
        raise NotFound(f"after: expected the id of an event of this job, got {event_id[:100]!r}", param="after")
    return int(parts[2])


# --- out --------------------------------------------------------------------------------------------------------------


def to_wire(services: Services, job: Job) -> dict[str, Any]:
    recipe, method = job.recipe, SUPERVISED if job.method == AUTO else job.method
    parameters = {
        "n_epochs": recipe.get("epochs", AUTO),
        "batch_size": recipe.get("batch_size", AUTO),
        "learning_rate_multiplier": AUTO,
    }
    eta_s = job.progress.get("eta_s") if job.state == "running" else None
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "model": services.settings.backbone,
        "created_at": int(job.created_at),
        "finished_at": None if job.finished_at is None else int(job.finished_at),
        "estimated_finish": None if eta_s is None else int(time.time() + eta_s),
        "fine_tuned_model": f"{job.task}@{job.version}" if job.version else None,
        "organization_id": services.tenant,
        "status": job.state,
        "training_file": job.dataset,
        "validation_file": None,
        "result_files": [],
        "hyperparameters": parameters,
        "method": {"type": method, method: {"hyperparameters": parameters}},
        "seed": recipe.get("seed", 0),
        "trained_tokens": None,
        "user_provided_suffix": job.task,
        "error": _error(job.error) if job.state == "failed" and job.error else None,
    }


def _error(error: Mapping[str, str]) -> dict[str, Any]:
    return {"code": error["code"], "message": error["detail"], "param": None}


def _events(services: Services, job_id: str) -> list[Event]:
    """All events of a job: about as many as epochs."""
    events_: list[Event] = []
    while page := services.jobs.events(job_id, events_[-1].seq if events_ else 0, train.MOST_EVENTS):
        events_ += page
    return events_


def _event(job_id: str, event: Event) -> dict[str, Any]:
    values = ", ".join(f"{name} {value}" for name, value in event.data.items() if isinstance(value, int | float | str))
    return {
        "id": f"{job_id}-{event.seq}",
        "object": "fine_tuning.job.event",
        "created_at": int(event.at),
        "level": _LEVELS.get(event.type, "info"),
        "type": "metrics" if event.type == "epoch" else "message",
        "message": f"{event.type}: {values}" if values else event.type,
        "data": event.data,
    }
