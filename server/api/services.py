"""What the HTTP layer stands on: everything it calls, handed over once by `server.bootstrap`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from fastapi import Depends, Request

from lensrack import wire
from prompts_store import Bundle, Store
from server.batching.batcher import Batcher
from server.datasets.dataset_store import DatasetStore
from server.datasets.feedback_store import FeedbackStore
from server.datasets.upload_store import UploadStore
from server.jobs.store import JobStore
from server.predictor import Predictor
from server.settings import Settings


class Residency(Protocol):
    """Which versions sit on the device; see `server.engine.residency`."""

    async def acquire(self, task: str, version: str) -> Any: ...
    def release(self, seat: Any) -> None: ...
    async def load(self, task: str, version: str) -> None: ...
    async def unload(self, task: str, version: str) -> bool: ...
    def pin(self, task: str, version: str, on: bool) -> bool: ...
    def pinned(self, task: str, version: str) -> bool: ...
    def resident(self, task: str, version: str) -> bool: ...
    def lens_bytes(self, task: str, version: str) -> int: ...


Look = Callable[[Any, Any], Any]  # pixels uint8 [S, S, 3] and a seat to a `server.engine.attention.Attention`


@dataclass(frozen=True)
class Services:
    """`methods` maps a method's name to its meaning in a line. `check_bundle` raises ServiceError for a bundle that the
    running backbone, or the bundle's own method, cannot serve; it may take its time and is called in a thread.
    `rack` tells who sits on the device; `look` belongs to the engine's thread."""

    settings: Settings
    predictor: Predictor
    batcher: Batcher
    residency: Residency
    store: Store
    jobs: JobStore
    datasets: DatasetStore
    uploads: UploadStore
    feedback: FeedbackStore
    ready: Callable[[], wire.Ready]
    rack: Callable[[], wire.Rack]
    look: Look
    methods: Mapping[str, str]
    check_bundle: Callable[[Bundle], None]


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesOf = Annotated[Services, Depends(_services)]


def request_id(request: Request) -> str:
    """This request's id, as the trace middleware chose it."""
    known: str = request.state.request_id
    return known
