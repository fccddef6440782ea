"""Builds a server: HTTP and gRPC in front of an engine, in this process or in others.

    build_server_over   an engine, wherever it runs ─► stores · keys · predictor · api · gRPC
    build_server        all of it in this process

Workers are built in `server.app.worker`, front ends of engines in other processes in `server.processes.front_process`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from fastapi import FastAPI

from prompts_store import Store
from server.api.app import create_app
from server.api.binding import require_safe_bind
from server.engine.attention_maps import look
from server.jobs.store import JobStore
from server.keys.authenticator import Authenticator
from server.methods.registry import Registry
from server.observability import metrics
from server.settings import Settings

from . import instrumentation
from .engine_runtime import EngineRuntime, build_engine_runtime
from .services import EngineBindings, build_grpc, build_services, readiness
from .store_probe import StoreProbe
from .stores import close_all, open_authenticator, open_jobs
from .worker_pool import WorkerPool

if TYPE_CHECKING:  # its packages are an extra's
    from server.api.oip.grpc.server import GrpcServer

log = logging.getLogger(__name__)


class EngineHandle(Protocol):
    """The engine behind a server: `server.app.engine_runtime.EngineRuntime`, or
    `server.processes.front_process.RemoteEngines`."""

    @property
    def lost(self) -> bool:
        """Whether the engine will answer nothing any more, so that a drain need not wait for it."""

    async def warm_up(self) -> None:
        """Make the engine ready, before the first request is accepted."""

    def start(self) -> None: ...
    async def drain(self, timeout_s: float) -> None: ...
    async def stop(self) -> None: ...


AnyEngine = TypeVar("AnyEngine", bound=EngineHandle)


@dataclass
class Server(Generic[AnyEngine]):
    """All parts of a process that serves HTTP. `running` starts and stops them."""

    settings: Settings
    engine: AnyEngine
    app: FastAPI
    store: Store
    jobs: JobStore
    authenticator: Authenticator
    probe: StoreProbe | None
    grpc: GrpcServer | None
    decoding: ThreadPoolExecutor
    workers: WorkerPool | None = None  # where no process manager starts them
    _drain: asyncio.Future[None] | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Warm up and start the engine; afterwards drain the queue, stop the engine, close the stores."""
        await self.engine.warm_up()
        if self.grpc is not None:
            log.info("gRPC on port %d", await self.grpc.start())
        self.engine.start()
        for part in (self.workers, self.probe):
            if part is not None:
                part.start()
        try:
            yield
        finally:
            if self.grpc is not None:
                await self.grpc.stop(self._grace_s())
            await self.engine.drain(self._grace_s())
            if self.workers is not None:
                await self.workers.stop()
            await self.engine.stop()
            if self.probe is not None:
                await self.probe.stop()
            self.decoding.shutdown(wait=False, cancel_futures=True)
            await close_all(self.store, self.jobs, self.authenticator)

    def leave(self) -> None:
        """The process was asked to end: accept nothing new, and answer or refuse what waits."""
        self.app.state.leaving = True
        self._drain = asyncio.ensure_future(self.engine.drain(self.settings.drain_timeout_s))

    def _grace_s(self) -> float:
        return 0.0 if self.engine.lost else self.settings.drain_timeout_s


def build_server_over(
    engine: AnyEngine,
    bindings: EngineBindings,
    settings: Settings,
    *,
    authenticator: Authenticator,
    registry: Registry,
    bundles: Store,
    store: Store,
    first: bool = True,
) -> Server[AnyEngine]:
    """A server over an engine. `store` is a cache over `bundles`. `first`: of several front ends, the one that does
    what only one may do (gRPC's port, probing the stores)."""
    jobs = open_jobs(settings)
    services, decoding = build_services(settings, bindings, registry=registry, store=store, jobs=jobs)
    app = create_app(services, authenticator)
    probe = StoreProbe(bundles, jobs, settings.watch_s) if first else None
    grpc = build_grpc(services, authenticator) if first else None
    return Server(settings, engine, app, store, jobs, authenticator, probe, grpc, decoding)


def build_server(settings: Settings) -> Server[EngineRuntime]:
    """A whole server in this process. Raises UnsafeBind before anything that takes time."""
    if len(settings.engine_devices) > 1:
        raise ValueError("LENSRACK_DEVICES: several devices need LENSRACK_FRONTS of 1 or more, got 0")
    authenticator = open_authenticator(settings)
    require_safe_bind(settings, locked=authenticator.locked)
    runtime = build_engine_runtime(settings, authenticator)
    workers = WorkerPool(settings, settings.workers, on_restart=metrics.WORKER_RESTARTS.inc)
    instrumentation.worker_pool(workers)
    bindings = EngineBindings(
        runtime.backbone,
        runtime.residency,
        runtime.batcher,
        look=partial(look, runtime.engine),
        rack=runtime.occupied,
        ready=lambda: readiness(runtime.backbone, settings, runtime.watchdog.trouble, len(workers.pids)),
    )
    server = build_server_over(
        runtime,
        bindings,
        settings,
        authenticator=authenticator,
        registry=runtime.registry,
        bundles=runtime.bundles,
        store=runtime.store,
    )
    server.workers = workers
    return server
