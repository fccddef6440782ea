"""A server in several processes: engines that compute, and front ends before them. Their concrete parts, wired.

    EngineProcess   store · backbone · rack · residency · engine · batcher · watchdog · workers · desk
    FrontEnd        store · jobs · keys · lines ─► remote residency and batcher · predictor · api

Whoever forks them is `server.house`. What both have in common with a whole server (`server.bootstrap`)
is in `server.engine_room` and `server.front_services`.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from fastapi import FastAPI

from lensrack import wire
from prompts_store import CachedStore, Store, open_store
from server import ledger, metrics
from server.api.app import create_app
from server.batching.shares import room_for
from server.engine import attention
from server.engine_room import EngineRoom, build_engine_room, see_nothing
from server.errors import ServiceError
from server.facts import Facts
from server.front_services import Pair, build_grpc, build_services, readiness
from server.jobs.store import JobStore
from server.keys.ring import KeyRing
from server.ledger import Ledger
from server.link.desk import Desk, Room
from server.link.engines import Engines, FarEngine, SpreadBatcher, SpreadResidency
from server.link.line import Line
from server.link.pixels import Slots
from server.link.remote import Named, RemoteBatcher, RemoteResidency, take_over_tasks
from server.methods.registry import Registry
from server.opening import close_all, open_jobs, open_ring
from server.settings import Settings
from server.watch import Watch
from server.watchdog import EXIT_CODE

if TYPE_CHECKING:
    from server.grpc_front.front import GrpcFront

log = logging.getLogger(__name__)

SOCKET: Final = "engine"  # in the folder that the processes share
CONNECT_S: Final = 5.0  # before the first request is accepted
KEYS_S: Final = 2.0  # between two looks at the tenants' weights
LOOK: Final = "look"
COUNTS: Final = "counts"  # a view that shows nothing: the engine's counts are in the ledger when it is answered
COUNTS_S: Final = 1.0  # an engine that is busy with something else is told as it stood


# --- the engine's process ---------------------------------------------------------------------------------------------


class EngineProcess:
    """Everything but HTTP, on the device of a `number`. `folder` is where the desk listens and the ledger lies."""

    def __init__(self, settings: Settings, folder: Path, ledger: Ledger, number: int = 0) -> None:
        self.settings, self._ledger = settings, ledger
        self._ring = open_ring(settings)
        self.room = build_engine_room(settings, self._ring, number)
        self._desk = Desk(_socket(folder, number), _desk_room(self.room, ledger))
        self._leaving = asyncio.Event()

    async def run(self, ready: Any) -> int:
        """Until a signal comes or the engine is lost; `ready` is called with the facts in JSON. The exit status."""
        room, grace_s = self.room, self.settings.drain_timeout_s
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._leaving.set)
        room.watchdog.on_lost = self._leaving.set
        await asyncio.to_thread(see_nothing, room.engine)
        await self._desk.start()
        room.workers.start()
        room.watchdog.start()
        others = [asyncio.create_task(work) for work in (self._ledger.keep_writing(), self._keep_weights())]
        ready(room.facts.as_json())
        await self._leaving.wait()
        await room.batcher.drain(0.0 if room.watchdog.lost else grace_s)
        await self._desk.stop()
        for task in others:
            task.cancel()
        await room.workers.stop()
        await room.watchdog.stop()
        room.loading.shutdown(wait=False, cancel_futures=True)
        await close_all(room.store, self._ring)
        self._ledger.write()
        return EXIT_CODE if room.watchdog.lost else 0

    async def _keep_weights(self) -> None:
        """Tenants' shares are their keys', which nobody here asks for otherwise."""
        while True:
            await self._ring.refresh()
            await asyncio.sleep(KEYS_S)


def _socket(folder: Path, number: int) -> Path:
    return folder / f"{SOCKET}-{number}"


def _desk_room(room: EngineRoom, ledger: Ledger) -> Room:
    def facts() -> dict[str, Any]:
        return {
            "waiting": len(room.batcher),
            "places": room.batcher.places,
            "retry_after_s": room.batcher.retry_after_s(),
            "trouble": room.batcher.suspended or room.watchdog.trouble,
            "workers": len(room.workers.pids),
            "tasks": metrics.TASKS.placed(),
        }

    def residents() -> dict[str, Any]:
        return {f"{one.seat.task}@{one.seat.version}": [one.bytes, one.pinned] for one in room.residency.occupants()}

    return Room(
        batcher=room.batcher,
        residency=room.residency,
        size=room.facts.spec.image_size,
        asides={LOOK: partial(_look, room)},
        facts=facts,
        residents=residents,
        revision=lambda: room.residency.revision,
        views={"rack": partial(_rack, room), COUNTS: partial(_written, ledger)},
    )


async def _written(ledger: Ledger) -> None:
    ledger.write()


async def _rack(room: EngineRoom) -> Any:
    return (await room.occupied()).model_dump(mode="json")


def _look(room: EngineRoom, pixels: Any, seat: Any) -> Any:
    """In the engine's thread."""
    seen = attention.look(room.engine, pixels, seat)
    return {
        name: {**asdict(one), "grid": one.grid.tolist()}
        for name, one in (("last", seen.last), ("rollout", seen.rollout))
    }


def _looked(told: Mapping[str, Any]) -> Any:
    """What the route asks of a `server.engine.attention.Attention`."""
    return SimpleNamespace(
        **{name: SimpleNamespace(**{**one, "grid": np.asarray(one["grid"])}) for name, one in told.items()}
    )


# --- a front end ------------------------------------------------------------------------------------------------------


@dataclass
class FrontEnd:
    """What a process that speaks HTTP holds. `running` brings it up and takes it down, as a whole server's does."""

    settings: Settings
    app: FastAPI
    engines: Engines
    batcher: RemoteBatcher | SpreadBatcher
    store: Store
    jobs: JobStore
    ring: KeyRing
    watch: Watch | None
    grpc: GrpcFront | None
    decoding: ThreadPoolExecutor
    ledger: Ledger
    _drain: asyncio.Future[None] | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        for engine in self.engines.all:
            engine.line.start()
        with suppress(TimeoutError):  # an engine that is away is told of; one that is there is not to be missed
            async with asyncio.timeout(CONNECT_S):
                await asyncio.gather(*(engine.line.connected() for engine in self.engines.all))
        writing = asyncio.create_task(self.ledger.keep_writing())
        if self.grpc is not None:
            log.info("gRPC on port %d", await self.grpc.start())
        if self.watch is not None:
            self.watch.start()
        try:
            yield
        finally:
            if self.grpc is not None:
                await self.grpc.stop(self.settings.drain_timeout_s)
            await self.batcher.drain(self.settings.drain_timeout_s)
            for engine in self.engines.all:
                await engine.line.stop()
            if self.watch is not None:
                await self.watch.stop()
            writing.cancel()
            self.decoding.shutdown(wait=False, cancel_futures=True)
            await close_all(self.store, self.jobs, self.ring)
            self.ledger.write()

    def leave(self) -> None:
        """From now on nothing new is begun, and who waits is answered or told."""
        self.app.state.leaving = True
        self._drain = asyncio.ensure_future(self.batcher.drain(self.settings.drain_timeout_s))


def build_front(settings: Settings, facts: Facts, folder: Path, own: Ledger, *, first: bool) -> FrontEnd:
    """`first`: of several, the one that does what one alone must do (gRPC's port, looking at the stores)."""
    torch.set_num_threads(1)
    ring, registry = open_ring(settings), Registry.installed()
    bundles = open_store(settings.store_url)
    store, jobs = CachedStore(bundles, max_bytes=settings.cache_bytes), open_jobs(settings)
    engines = _far_engines(settings, facts, folder)
    residency, batcher = _pair(engines)

    def ready() -> wire.Ready:
        workers = sum(int(one.line.mirror.facts.get("workers", 0)) for one in engines.all)
        away = [] if len(engines.all) == 1 else engines.troubles
        return readiness(facts, settings, engines.trouble, workers, away)

    services, decoding = build_services(
        settings,
        facts,
        registry=registry,
        pair=Pair(residency, batcher, Named(LOOK, _looked), engines.rack),
        store=store,
        jobs=jobs,
        ready=ready,
    )
    metrics.shown, metrics.brought_up_to_date = ledger.shown(own), partial(_counted, engines)
    metrics.read_when_asked(metrics.ENGINE_UP, lambda: not engines.troubles)
    app, watch = create_app(services, ring), Watch(bundles, jobs, settings.watch_s) if first else None
    grpc = build_grpc(services, ring) if first else None
    return FrontEnd(settings, app, engines, batcher, store, jobs, ring, watch, grpc, decoding, own)


async def _counted(engines: Engines) -> None:
    """What engines have counted so far is in the ledger, as far as they answer."""
    with suppress(TimeoutError, ServiceError):
        async with asyncio.timeout(COUNTS_S):
            await engines.each(lambda one: one.line.call("view", name=COUNTS))


def _far_engines(settings: Settings, facts: Facts, folder: Path) -> Engines:
    def far(number: int, device: str) -> FarEngine:
        slots = Slots(room_for(settings.max_queue) + 4 * settings.max_batch, facts.spec.image_size)
        line = Line(_socket(folder, number), slots, silence_s=settings.engine_timeout_s)
        batcher = RemoteBatcher(line, slots, max_batch=settings.max_batch, max_queue=settings.max_queue)
        return FarEngine(number, device, line, RemoteResidency(line, number), batcher)

    engines = Engines([far(*one) for one in enumerate(settings.engine_devices)], max_batch=settings.max_batch)
    for one in engines.all:
        one.line.on_state = lambda _: take_over_tasks([one.line.mirror for one in engines.all])
    return engines


def _pair(engines: Engines) -> tuple[RemoteResidency | SpreadResidency, RemoteBatcher | SpreadBatcher]:
    """With one engine there is nothing to choose."""
    if len(engines.all) == 1:
        return engines.all[0].residency, engines.all[0].batcher
    return SpreadResidency(engines), SpreadBatcher(engines)
