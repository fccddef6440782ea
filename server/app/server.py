"""A server: HTTP and gRPC before an engine room, in this process or in others; and the whole of it in one process.

    build_before   an engine room, wherever it is ─► stores · keys · predictor · api · gRPC
    build_server   the engine room of this process, and what is before it

Workers are `server.app.worker`'s; engine rooms in other processes are `server.processes.front_process`'s.
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
    """What a server asks of the engine room behind it: `server.app.engine_runtime.EngineRuntime`, or
    `server.processes.front_process.RemoteEngines`."""

    @property
    def lost(self) -> bool:
        """Whether it will answer nothing any more, so that nobody need wait for it."""

    async def warm_up(self) -> None:
        """Before the first request is accepted."""

    def start(self) -> None: ...
    async def drain(self, timeout_s: float) -> None: ...
    async def stop(self) -> None: ...


AnyEngine = TypeVar("AnyEngine", bound=EngineHandle)


@dataclass
class Server(Generic[AnyEngine]):
    """Everything that a process which speaks HTTP holds. `running` brings it up and takes it down."""

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
        """Warm the engine room up and start it; afterwards drain the queue, stop the room, close the stores."""
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
        """Somebody asked the process to end: from now on nothing new is begun, and who waits is answered or told."""
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
    """`store` is a cache over `bundles`. `first`: of several, the one that does what one alone must do (gRPC's port,
    looking at the stores)."""
    jobs = open_jobs(settings)
    services, decoding = build_services(settings, side, registry=registry, store=store, jobs=jobs)
    app, watch = create_app(services, ring), StoreProbe(bundles, jobs, settings.watch_s) if first else None
    grpc = build_grpc(services, ring) if first else None
    return Server(settings, room, app, store, jobs, ring, watch, grpc, decoding)


def build_server(settings: Settings) -> Server[EngineRuntime]:
    """Raises UnsafeBind before anything that takes time."""
    if len(settings.engine_devices) > 1:
        raise ValueError("LENSRACK_DEVICES: several devices need front ends before them: LENSRACK_FRONTS, got 0")
    ring = open_authenticator(settings)
    require_safe_bind(settings, locked=ring.locked)
    room = build_engine_runtime(settings, ring)
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
