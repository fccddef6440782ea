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
from server.settings import Settings

from .engine_runtime import EngineRuntime, build_engine_runtime
from .services import EngineBindings, build_grpc, build_services, readiness
from .store_probe import StoreProbe
from .stores import close_all, open_authenticator, open_jobs

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
    room: AnyEngine
    app: FastAPI
    store: Store
    jobs: JobStore
    ring: Authenticator
    watch: StoreProbe | None
    grpc: GrpcServer | None
    decoding: ThreadPoolExecutor
    _drain: asyncio.Future[None] | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Warm up and start the engine; afterwards drain the queue, stop the engine, close the stores."""
        await self.room.warm_up()
        if self.grpc is not None:
            log.info("gRPC on port %d", await self.grpc.start())
        self.room.start()
        if self.watch is not None:
            self.watch.start()
        try:
            yield
        finally:
            if self.grpc is not None:
                await self.grpc.stop(self._grace_s())
            await self.room.drain(self._grace_s())
            await self.room.stop()
            if self.watch is not None:
                await self.watch.stop()
            self.decoding.shutdown(wait=False, cancel_futures=True)
            await close_all(self.store, self.jobs, self.ring)

    def leave(self) -> None:
        """The process was asked to end: accept nothing new, and answer or refuse what waits."""
        self.app.state.leaving = True
        self._drain = asyncio.ensure_future(self.room.drain(self.settings.drain_timeout_s))

    def _grace_s(self) -> float:
        return 0.0 if self.room.lost else self.settings.drain_timeout_s


def build_server_over(
    room: AnyEngine,
    side: EngineBindings,
    settings: Settings,
    *,
    ring: Authenticator,
    registry: Registry,
    bundles: Store,
    store: Store,
    first: bool = True,
) -> Server[AnyEngine]:
    """A server over an engine. `store` is a cache over `bundles`. `first`: of several front ends, the one that does
    what only one may do (gRPC's port, probing the stores)."""
    jobs = open_jobs(settings)
    services, decoding = build_services(settings, side, registry=registry, store=store, jobs=jobs)
    app, watch = create_app(services, ring), StoreProbe(bundles, jobs, settings.watch_s) if first else None
    grpc = build_grpc(services, ring) if first else None
    return Server(settings, room, app, store, jobs, ring, watch, grpc, decoding)


def build_server(settings: Settings) -> Server[EngineRuntime]:
    """A whole server in this process. Raises UnsafeBind before anything that takes time."""
    if len(settings.engine_devices) > 1:
        raise ValueError("LENSRACK_DEVICES: several devices need LENSRACK_FRONTS of 1 or more, got 0")
    ring = open_authenticator(settings)
    require_safe_bind(settings, locked=ring.locked)
    room = build_engine_runtime(settings, ring, workers=settings.workers)
    side = EngineBindings(
        room.facts,
        room.residency,
        room.batcher,
        look=partial(look, room.engine),
        rack=room.occupied,
        ready=lambda: readiness(room.facts, settings, room.watchdog.trouble, len(room.workers.pids)),
    )
    return build_server_over(
        room, side, settings, ring=ring, registry=room.registry, bundles=room.bundles, store=room.store
    )
