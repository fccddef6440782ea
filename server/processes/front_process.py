"""A front end's process: HTTP before engines in other processes.

    FarRoom         lines to engines ─► remote residency and batcher

Whoever forks it is `server.processes.manager`. A front end is a `server.app.server.Server` before such a room.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch

from lensrack import wire
from prompts_store import CachedStore, open_store
from server.app.backbone import Facts
from server.app.server import Server, build_before
from server.app.services import EngineSide, readiness
from server.app.stores import open_ring
from server.batching.fair_share import room_for
from server.errors import ServiceError
from server.methods.registry import Registry
from server.observability import metrics
from server.observability.multiprocess import Ledger, shown
from server.rpc.connection import Line
from server.rpc.engine_client import Named, RemoteBatcher, RemoteResidency, take_over_tasks
from server.rpc.engine_pool import Engines, FarEngine, SpreadBatcher, SpreadResidency
from server.rpc.shared_memory import Slots
from server.settings import Settings

from .engine_socket import COUNTS, LOOK, socket_path

log = logging.getLogger(__name__)

CONNECT_S: Final = 5.0  # before the first request is accepted
COUNTS_S: Final = 1.0  # an engine that is busy with something else is told as it stood


def _looked(told: Mapping[str, Any]) -> Any:
    """What the route asks of a `server.engine.attention_maps.Attention`."""
    return SimpleNamespace(
        **{name: SimpleNamespace(**{**one, "grid": np.asarray(one["grid"])}) for name, one in told.items()}
    )


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
    """`first`: see `server.app.server.build_before`."""
    torch.set_num_threads(1)
    ring, bundles = open_ring(settings), open_store(settings.store_url)
    engines = _far_engines(settings, facts, folder)
    residency, batcher = _pair(engines)
    metrics.shown, metrics.brought_up_to_date = shown(own), partial(_counted, engines)
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
        line = Line(socket_path(folder, number), slots, silence_s=settings.engine_timeout_s)
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
