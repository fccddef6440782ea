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

from . import paging
from .faults import RESPONSES
from .models import require_backbone

SUPERVISED: Final = "supervised"
AUTO: Final = "auto"
_RECIPE: Final = {"n_epochs": "epochs"}  # where a recipe's field is called otherwise
_OURS: Final = {"task": "suffix", "dataset": "training_file", "recipe": "hyperparameters"}
_LEVELS: Final = {"failed": "error", "retried": "warn", "live_unusable": "warn"}
_EVENT: Final = re.compile(r"(job_[0-9a-z]+)-([0-9]{1,18})")

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["OpenAI"], responses=RESPONSES)

After = Annotated[str | None, Query(description="The id of the last one seen.")]
Limit = Annotated[int, Query(ge=1, le=100)]


class FineTuningRequest(BaseModel):
    """`validation_file`, `integrations` and `metadata` are not kept, and refused rather than dropped."""

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


@router.post("")
async def create(
    services: ServicesOf,
    asked: FineTuningRequest,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> dict[str, Any]:
    await require_backbone(services, asked.model)
    return told(services, await train.queued(services, request_of(asked), idempotency_key))


@router.get("")
async def list_jobs(services: ServicesOf, after: After = None, limit: Limit = 20) -> dict[str, Any]:
    """Newest first."""
    jobs, following = await asyncio.to_thread(lambda: services.jobs.list(cursor=after, limit=limit))
    return paging.page([told(services, job) for job in jobs], following is not None)


@router.get("/{job_id}")
async def get(services: ServicesOf, job_id: str) -> dict[str, Any]:
    return told(services, await train.current(services, job_id))


@router.post("/{job_id}/cancel")
async def cancel(services: ServicesOf, job_id: str) -> dict[str, Any]:
    """A waiting job ends at once, a running one within a step: until then its status is `running`."""
    return told(services, await asyncio.to_thread(services.jobs.cancel, job_id))


@router.get("/{job_id}/events")
async def events(services: ServicesOf, job_id: str, after: After = None, limit: Limit = 20) -> dict[str, Any]:
    """Newest first."""
    before = None if after is None else _seq(job_id, after)
    found = await asyncio.to_thread(_events, services, job_id)
    older = [one for one in reversed(found) if before is None or one.seq < before]
    return paging.page([_event(job_id, one) for one in older[:limit]], len(older) > limit)


# --- in ---------------------------------------------------------------------------------------------------------------


def request_of(asked: FineTuningRequest) -> wire.TrainRequest:
    """Raises Unprocessable, in the client's words."""
    method, of_method = _method(asked.method)
    recipe = _recipe({**(asked.hyperparameters or {}), **of_method})
    if asked.seed is not None:
        recipe["seed"] = asked.seed
    told: dict[str, Any] = {"task": asked.suffix, "dataset": asked.training_file, "method": method}
    try:
        return wire.TrainRequest.model_validate({**told, "recipe": recipe} if recipe else told)
    except ValidationError as error:
        found = [{**one, "loc": _renamed(one["loc"])} for one in error.errors(include_url=False)]
        raise problems.unprocessable(found) from error


def _method(told: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """Our name of the method, and its hyper-parameters."""
    told = {"type": SUPERVISED} if told is None else told
    kind = told.get("type")
    if not isinstance(kind, str):
        raise Unprocessable(f"method.type: expected {SUPERVISED!r} or a method's name, got none", param="method.type")
    own = told.get(kind) or {}
    if not isinstance(own, dict) or not isinstance(own.get("hyperparameters") or {}, dict):
        raise Unprocessable(f"method.{kind[:100]}: expected an object with hyperparameters", param="method")
    return AUTO if kind == SUPERVISED else kind, own.get("hyperparameters") or {}


def _recipe(told: Mapping[str, Any]) -> dict[str, Any]:
    """What is `auto` is left out, since it is what is found where nothing is said."""
    if told.get("learning_rate_multiplier", AUTO) not in (AUTO, 1, None):
        expected = "'auto', or the rate itself as lr: there is no rate that holds for every method to multiply"
        detail = f"learning_rate_multiplier: expected {expected}, got {str(told['learning_rate_multiplier'])[:40]}"
        raise Unprocessable(detail, param="hyperparameters.learning_rate_multiplier")
    given = {name: value for name, value in told.items() if name != "learning_rate_multiplier"}
    kept = {name: value for name, value in given.items() if name == "search" or value not in (AUTO, None)}
    return {_RECIPE.get(name, name): value for name, value in kept.items()}


def _renamed(location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    theirs = {ours: name for name, ours in _RECIPE.items()}
    return tuple(_OURS.get(str(part), theirs.get(str(part), part)) for part in location)


def _seq(job_id: str, event_id: str) -> int:
    found = _EVENT.fullmatch(event_id)
    if found is None or found[1] != job_id:
        raise NotFound(f"after: expected the id of an event of this job, got {event_id[:100]!r}", param="after")
    return int(found[2])


# --- out --------------------------------------------------------------------------------------------------------------


def told(services: Services, job: Job) -> dict[str, Any]:
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
    """All of a job's; there are as many as epochs, more or less."""
    found: list[Event] = []
    while page := services.jobs.events(job_id, found[-1].seq if found else 0, train.MOST_EVENTS):
        found += page
    return found


def _event(job_id: str, one: Event) -> dict[str, Any]:
    facts = ", ".join(f"{name} {value}" for name, value in one.data.items() if isinstance(value, int | float | str))
    return {
        "id": f"{job_id}-{one.seq}",
        "object": "fine_tuning.job.event",
        "created_at": int(one.at),
        "level": _LEVELS.get(one.type, "info"),
        "type": "metrics" if one.type == "epoch" else "message",
        "message": f"{one.type}: {facts}" if facts else one.type,
        "data": one.data,
    }
