"""The service container: everything that routes call, built once by `server.app.services`.

A route gets its `ServicesOf` scoped to the key of the request, and has no other way to them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

from fastapi import Depends, Request

from lensrack import wire
from prompts_store import Bundle, Store
from server.batching.admission import Queue
from server.datasets.dataset import Example
from server.datasets.dataset_store import DatasetStore
from server.datasets.feedback_store import Added, Page
from server.datasets.upload_store import UploadStore
from server.importing.importer import Importer
from server.jobs.job import Job, Publish, State
from server.jobs.store import Events, Jobs
from server.keys.key import NOBODY, Key
from server.keys.meter import Meter
from server.serving.predictor import Predictor
from server.serving.residency import Residency
from server.settings import Settings

from .follow_ups import FollowUps

Look = Callable[[Any, Any], Any]  # pixels uint8 [S, S, 3] and a seat to a `server.engine.attention_maps.AttentionMaps`


class JobRequests(Protocol):
    """The part of the job store that requests use; the rest is the workers'."""

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
    ) -> Job: ...
    def submitted_with(self, idempotency_key: str, *, tenant: str = "") -> Job | None: ...
    def get(self, job_id: str) -> Job: ...
    def list(
        self,
        *,
        task: str | None = None,
        state: State | None = None,
        cursor: str | None = None,
        limit: int = 50,
        task_prefix: str = "",
    ) -> tuple[Jobs, str | None]: ...
    def cancel(self, job_id: str) -> Job: ...
    def events(self, job_id: str, after: int = 0, limit: int = 1000) -> Events: ...


class FeedbackRequests(Protocol):
    """Feedback as requests use it; see `server.datasets.feedback_store`."""

    def stored_bytes(self, tenant: str) -> int: ...
    def add(self, task: str, pictures: Sequence[bytes], label: str) -> list[Added]: ...
    def page(self, task: str, *, label: str | None = None, before: int | None = None, limit: int = 50) -> Page: ...
    def examples(self, task: str) -> list[tuple[Example, Path]]: ...
    def delete(self, task: str, sha256: str) -> None: ...
    def delete_task(self, task: str) -> None: ...


@dataclass(frozen=True)
class Services:
    """Everything that routes call, scoped to the key of the request: see `server.api.tenancy`.

    tenant        the prefix of its tasks' names, "" for all
    methods       what each does, by name; baselines: the same, and why it cannot be served
    check_bundle  raises ServiceError for a bundle that the backbone or its method cannot serve; slow, call in a thread
    importer      makes bundles of other tools' checkpoints; slow, call in a thread
    rack          describes the device
    look          computes attention maps, in the engine's thread
    export        writes a version as a file for other tools: bundle, format, input, path; slow, call in a thread
    """

    settings: Settings
    predictor: Predictor
    batcher: Queue
    residency: Residency
    store: Store
    jobs: JobRequests
    datasets: DatasetStore
    uploads: UploadStore
    feedback: FeedbackRequests
    ready: Callable[[], wire.Ready]
    rack: Callable[[], Awaitable[wire.Rack]]
    look: Look
    methods: Mapping[str, str]
    baselines: Mapping[str, tuple[str, str]]
    check_bundle: Callable[[Bundle], None]
    importer: Importer
    export: Callable[[Bundle, str, str, Path], None]
    tenant: str = ""
    key: Key = NOBODY
    meter: Meter = field(default_factory=Meter)
    follow_ups: FollowUps = field(default_factory=FollowUps)


async def services_of(request: Request) -> Services:  # a plain function would cost each request a thread
    """Return the services scoped to the request's key."""
    services_by_key: Callable[[Key | None], Services] = request.app.state.services
    return services_by_key(request.state.key)


ServicesOf = Annotated[Services, Depends(services_of)]


def request_id(request: Request) -> str:
    """Return the request's id, which `middleware.request_log` has set."""
    id_: str = request.state.request_id
    return id_
