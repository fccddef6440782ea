"""Feedback over HTTP: correct labels of images, collected until they are frozen into a dataset to train on."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from typing import Annotated, Final

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

import prompts_store as stored
from lensrack import wire
from server.api import params
from server.api.middleware.root_path import located
from server.api.services import Services, ServicesOf
from server.datasets.dataset import MIN_TRAIN, Dataset
from server.datasets.feedback_store import Added
from server.datasets.formats.feedback_log import FeedbackEntry
from server.datasets.label import known_label, label_of
from server.datasets.lineage import rare_labels
from server.errors import BadRequest, Conflict, NotFound, Unprocessable

from . import datasets, predict

router = APIRouter(tags=["feedback"])

LABELS_SHOWN: Final = 20

Label = Annotated[str, Query(description="What the pictures show.")]
NewLabel = Annotated[bool, Query(description="The label may be one that the live version does not know.")]
Cursor = Annotated[str | None, Query(pattern="^[0-9]{1,18}$")]


@router.post("/tasks/{task}/feedback", status_code=201, openapi_extra={"requestBody": predict.IMAGES})
async def give_feedback(
    *,
    request: Request,
    response: Response,
    services: ServicesOf,
    task: params.TaskOf,
    label: Label,
    new_label: NewLabel = False,
) -> wire.Feedback:
    """Label pictures. The latest label of a picture counts; 200 where all had these labels already."""
    images = await predict.read_images(request, services)
    if len(images) > services.settings.max_images:
        raise Unprocessable(f"images: expected 1 to {services.settings.max_images}, got {len(images)}")
    give = partial(_give, services, task, images, label, new_label)
    # it decodes pictures as well
    added, warnings = await request.app.state.thumbnails.run(services.tenant, give)
    if all(item.previous == item.entry.label for item in added):
        response.status_code = 200
    items = [_item(item.entry, item.previous) for item in added]
    return wire.Feedback(task=task, items=items, warnings=warnings)


@router.get("/tasks/{task}/feedback")
async def list_feedback(
    *,
    services: ServicesOf,
    task: params.TaskOf,
    label: Annotated[str | None, Query(description="Only pictures of this label.")] = None,
    cursor: Cursor = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
) -> wire.FeedbackPage:
    """How much feedback each label has, and a page of it, newest first. `next` is the cursor of the following page."""
    await asyncio.to_thread(services.store.aliases, task)  # raises TaskNotFound
    before = None if cursor is None else int(cursor)
    page = await asyncio.to_thread(services.feedback.page, task, label=label, before=before, limit=limit)
    return wire.FeedbackPage(
        task=task,
        images=sum(page.counts.values()),
        labels=dict(page.counts),
        items=[_item(entry) for entry in page.entries],
        next=None if page.next is None else str(page.next),
        warnings=await asyncio.to_thread(_rare_labels, services, task, page.counts),
    )


@router.delete("/tasks/{task}/feedback/{sha256}", status_code=204)
async def withdraw_feedback(services: ServicesOf, task: params.TaskOf, sha256: str) -> None:
    """Forget a picture and its label. Datasets that hold the picture keep it."""
    await asyncio.to_thread(services.feedback.delete, task, sha256)


@router.post(
    "/tasks/{task}/feedback/dataset",
    status_code=201,
    responses={201: {"headers": {"Location": {"schema": {"type": "string"}}}}},
)
async def freeze_feedback(
    *,
    request: Request,
    response: Response,
    services: ServicesOf,
    task: params.TaskOf,
    name: Annotated[str, Query(max_length=200, description="What people call it.")] = "",
    parent: Annotated[str | None, Query(description="A dataset; without it, the live version's.")] = None,
) -> wire.Dataset:
    """A dataset of what the live version was fitted on and of all feedback, which corrects it: to train on next.

    `skipped` lists feedback that was left out: that of a new class with a single picture. 409 nothing_new where the
    feedback changes nothing, with the same list.
    """
    dataset = await asyncio.to_thread(_freeze, services, task, name, parent)
    response.headers["Location"] = located(request, f"/datasets/{dataset.id}")
    return datasets.to_wire(dataset)


# --- in threads -------------------------------------------------------------------------------------------------------


def _give(
    services: Services, task: str, images: Sequence[bytes], label: str, new_label: bool
) -> tuple[list[Added], list[wire.DatasetWarning]]:
    known = _live(services, task).labels
    name = label if label in known or new_label else known_label(label, known)
    if name is None or name not in known:
        _check_label(label)
    if name is None:
        raise _unknown_label(label, known)
    added = services.feedback.add(task, images, name)
    counts = {} if name in known else services.feedback.page(task, limit=1).counts
    return added, _rare_labels(services, task, {label: count for label, count in counts.items() if label == name})


def _unknown_label(name: str, known: Sequence[str]) -> Unprocessable:
    """The error for a label that may be a typing error; its extra `nearest` is the known label that is most alike."""
    labels = ", ".join(known[:LABELS_SHOWN]) + (", …" if len(known) > LABELS_SHOWN else "")
    by_folded = {label.casefold(): label for label in known}
    nearest = [by_folded[folded] for folded in get_close_matches(name.casefold(), by_folded, n=1)]
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    detail = f"label: expected one of {labels}; or new_label=true, got {name!r}{hint}"
    return Unprocessable(detail, code="unknown_label", nearest=nearest[0] if nearest else None)


def _rare_labels(services: Services, task: str, counts: Mapping[str, int]) -> list[wire.DatasetWarning]:
    """A warning for each label of the feedback that the live version does not have and that has too few pictures to
    become a class."""
    rare = {label: count for label, count in counts.items() if count < MIN_TRAIN}
    if not rare:
        return []
    with suppress(stored.AliasNotFound, stored.VersionNotFound):  # without a live version, no label is known
        rare = {label: count for label, count in rare.items() if label not in _live(services, task).labels}
    return [wire.DatasetWarning.model_validate(found, from_attributes=True) for found in rare_labels(rare)]


def _freeze(services: Services, task: str, name: str, parent: str | None) -> Dataset:
    origin = parent or _live(services, task).dataset
    if origin is None:
        detail = f"nothing says on which dataset the live version of {task!r} was fitted; name one with ?parent="
        raise Conflict(detail, code="no_parent_dataset")
    more = services.feedback.examples(task)
    if not more:
        raise Conflict(f"task {task!r} has no feedback yet", code="no_feedback")
    try:
        return services.datasets.extend(origin, more, name=name)
    except NotFound as error:
        if parent is not None:
            raise
        detail = f"the dataset {origin[:12]} of the live version does not exist any more; name another with ?parent="
        raise Conflict(detail, code="no_parent_dataset") from error


def _live(services: Services, task: str) -> stored.Manifest:
    """The manifest of the live version; of a split alias, of the heaviest."""
    aliases = services.store.aliases(task)
    if "live" not in aliases:
        raise stored.AliasNotFound(task, "live")
    version = aliases["live"].heaviest
    for info in services.store.versions(task):
        if info.version == version:
            return info.manifest
    raise stored.VersionNotFound(task, version)


def _check_label(label: str) -> None:
    try:
        label_of(label)
    except BadRequest as error:
        raise Unprocessable(f"label: expected 1 to 200 printable characters, got {label[:40]!r}") from error


def _item(entry: FeedbackEntry, previous: str | None = None) -> wire.FeedbackItem:
    return wire.FeedbackItem(
        sha256=entry.sha256,
        label=entry.label,
        previous=previous,
        bytes=entry.bytes,
        width=entry.width,
        height=entry.height,
        at=entry.at,
    )
