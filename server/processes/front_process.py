"""A server in several processes: engines that compute, and front ends before them. Their concrete parts, wired.

    EngineProcess   store · backbone · rack · residency · engine · batcher · watchdog · workers · desk
    FarRoom         lines to engines ─► remote residency and batcher          what a front end has before it instead

Whoever forks them is `server.house`. A front end is a `server.bootstrap.Server` before such a room.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch

from lensrack import wire
from prompts_store import CachedStore, open_store
from server import ledger, metrics
from server.batching.shares import room_for
from server.bootstrap import Server, build_before
from server.engine import attention_maps
from server.engine_room import EngineRoom, build_engine_room
from server.errors import ServiceError
from server.facts import Facts
from server.front_services import EngineSide, readiness
from server.ledger import Ledger
from server.link.desk import Desk, Room
from server.link.engines import Engines, FarEngine, SpreadBatcher, SpreadResidency
from server.link.line import Line
from server.link.pixels import Slots
from server.link.remote import Named, RemoteBatcher, RemoteResidency, take_over_tasks
from server.methods.registry import Registry
from server.opening import close_all, open_ring
from server.settings import Settings
from server.watchdog import EXIT_CODE

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
        await room.warm_up()
        await self._desk.start()
        room.start()
        others = [asyncio.create_task(work) for work in (self._ledger.keep_writing(), self._keep_weights())]
        ready(room.facts.as_json())
        await self._leaving.wait()
        await room.drain(0.0 if room.lost else grace_s)
        await self._desk.stop()
        for task in others:
            task.cancel()
        await room.stop()
        await close_all(room.store, self._ring)
        self._ledger.write()
        return EXIT_CODE if room.lost else 0

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
    seen = attention_maps.look(room.engine, pixels, seat)
    return {
        name: {**asdict(one), "grid": one.grid.tolist()}
        for name, one in (("last", seen.last), ("rollout", seen.rollout))
    }


def _looked(told: Mapping[str, Any]) -> Any:
    """What the route asks of a `server.engine.attention_maps.Attention`."""
    return SimpleNamespace(
        **{name: SimpleNamespace(**{**one, "grid": np.asarray(one["grid"])}) for name, one in told.items()}
    )


# --- a front end ------------------------------------------------------------------------------------------------------


@dataclass
class FarRoom:
    """Engine rooms in other processes, as a front end has them: lines to them, and a ledger of its own counts."""

    engines: Engines
    batcher: RemoteBatcher | SpreadBatcher
    ledger: Ledger
    _writing: asyncio.Task[None] | None = None

    @property
    def lost(self) -> bool:
        """Never: an engine that has ended is forked anew."""
        return False

    async def warm_up(self) -> None:
        """An engine that is away is told of; one that is there is not to be missed."""
        for engine in self.engines.all:
            engine.line.start()
        with suppress(TimeoutError):
            async with asyncio.timeout(CONNECT_S):
                await asyncio.gather(*(engine.line.connected() for engine in self.engines.all))

    def start(self) -> None:
        self._writing = asyncio.create_task(self.ledger.keep_writing())

    async def drain(self, timeout_s: float) -> None:
        await self.batcher.drain(timeout_s)

    async def stop(self) -> None:
        for engine in self.engines.all:
            await engine.line.stop()
        if self._writing is not None:
            self._writing.cancel()
        self.ledger.write()


def build_front(settings: Settings, facts: Facts, folder: Path, own: Ledger, *, first: bool) -> Server[FarRoom]:
    """`first`: see `server.bootstrap.build_before`."""
    torch.set_num_threads(1)
    ring, bundles = open_ring(settings), open_store(settings.store_url)
    engines = _far_engines(settings, facts, folder)
    residency, batcher = _pair(engines)
    metrics.shown, metrics.brought_up_to_date = ledger.shown(own), partial(_counted, engines)
    metrics.read_when_asked(metrics.ENGINE_UP, lambda: not engines.troubles)
    return build_before(
        FarRoom(engines, batcher, own),
        EngineSide(
            facts,
            residency,
            batcher,
            look=Named(LOOK, _looked),
            rack=engines.rack,
            ready=partial(_ready, engines, facts, settings),
        ),
        settings,
        ring=ring,
        registry=Registry.installed(),
        bundles=bundles,
        store=CachedStore(bundles, max_bytes=settings.cache_bytes),
        first=first,
    )


def _ready(engines: Engines, facts: Facts, settings: Settings) -> wire.Ready:
    workers = sum(int(one.line.mirror.facts.get("workers", 0)) for one in engines.all)
    away = [] if len(engines.all) == 1 else engines.troubles
    return readiness(facts, settings, engines.trouble, workers, away)


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
