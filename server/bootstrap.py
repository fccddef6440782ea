"""A whole server in one process: an engine room, and HTTP before it.

build_server   engine room · stores · keys · predictor · api · gRPC

Workers are `server.worker`'s; a server in several processes is `server.split`'s.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from fastapi import FastAPI

from prompts_store import Store
from server.api.app import create_app
from server.api.guard import require_safe_bind
from server.batching.batcher import Batcher
from server.engine.attention import look
from server.engine.engine import Engine
from server.engine.residency import Residency
from server.engine_room import build_engine_room, see_nothing
from server.front_services import Pair, build_grpc, build_services, readiness
from server.jobs.store import JobStore
from server.keys.ring import KeyRing
from server.opening import close_all, open_jobs, open_ring
from server.settings import Settings
from server.supervisor import Supervisor
from server.watch import Watch
from server.watchdog import Watchdog

if TYPE_CHECKING:  # its packages are an extra's
    from server.grpc_front.front import GrpcFront

log = logging.getLogger(__name__)


@dataclass
class Server:
    """Everything a serving process holds. `running` brings it up and takes it down."""

    settings: Settings
    app: FastAPI
    engine: Engine
    residency: Residency
    batcher: Batcher
    store: Store
    jobs: JobStore
    ring: KeyRing
    workers: Supervisor
    watch: Watch
    grpc: GrpcFront | None
    watchdog: Watchdog
    pools: tuple[ThreadPoolExecutor, ...]
    _drain: asyncio.Future[None] | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Warm the engine, start the workers; afterwards drain the queue, stop the workers, close the stores."""
        await asyncio.to_thread(self._warm_up)
        if self.grpc is not None:
            log.info("gRPC on port %d", await self.grpc.start())
        self.workers.start()
        self.watch.start()
        self.watchdog.start()
        try:
            yield
        finally:
            if self.grpc is not None:
                await self.grpc.stop(0.0 if self.watchdog.lost else self.settings.drain_timeout_s)
            await self.batcher.drain(0.0 if self.watchdog.lost else self.settings.drain_timeout_s)
            await self.workers.stop()
            await self.watch.stop()
            await self.watchdog.stop()
            for pool in self.pools:
                pool.shutdown(wait=False, cancel_futures=True)
            await close_all(self.store, self.jobs, self.ring)

    def leave(self) -> None:
        """Somebody asked the process to end: from now on nothing new is begun, and who waits is answered or told."""
        self.app.state.leaving = True
        self._drain = asyncio.ensure_future(self.batcher.drain(self.settings.drain_timeout_s))

    def _warm_up(self) -> None:
        """One forward before the first request pays for lazy set-up."""
        see_nothing(self.engine)


def build_server(settings: Settings) -> Server:
    """Raises UnsafeBind before anything that takes time."""
    if len(settings.engine_devices) > 1:
        raise ValueError("LENSRACK_DEVICES: several devices need front ends before them: LENSRACK_FRONTS, got 0")
    ring = open_ring(settings)
    require_safe_bind(settings, locked=ring.locked)
    room = build_engine_room(settings, ring)
    workers, watchdog = room.workers, room.watchdog
    jobs = open_jobs(settings)
    services, decoding = build_services(
        settings,
        room.facts,
        registry=room.registry,
        pair=Pair(room.residency, room.batcher, partial(look, room.engine), room.occupied),
        store=room.store,
        jobs=jobs,
        ready=lambda: readiness(room.facts, settings, watchdog.trouble, len(workers.pids)),
    )
    app, watch = create_app(services, ring), Watch(room.bundles, jobs, settings.watch_s)
    return Server(
        settings,
        app,
        room.engine,
        room.residency,
        room.batcher,
        room.store,
        jobs,
        ring,
        workers,
        watch,
        build_grpc(services, ring),
        watchdog,
        (room.loading, decoding),
    )
