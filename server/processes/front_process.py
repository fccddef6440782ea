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
from server.app.backbone import BackboneInfo
from server.app.server import Server, build_server_over
from server.app.services import EngineBindings, readiness
from server.app.stores import open_authenticator
from server.batching.fair_share import with_reserve
from server.errors import ServiceError
from server.methods.registry import Registry
from server.observability import metrics
from server.observability.multiprocess import ProcessMetrics, merged_registry
from server.rpc.connection import EngineConnection
from server.rpc.engine_client import RemoteBatcher, RemoteCall, RemoteResidency, take_over_tasks
from server.rpc.engine_pool import BalancedBatcher, BalancedResidency, EnginePool, RemoteEngine
from server.rpc.shared_memory import PixelWriter
from server.settings import Settings

from .engine_socket import COUNTS, LOOK, socket_path
from .worker_metrics import running_workers

log = logging.getLogger(__name__)

CONNECT_S: Final = 5.0  # before the first request is accepted
COUNTS_S: Final = 1.0  # an engine that is busy with something else is told as it stood


def _looked(told: Mapping[str, Any]) -> Any:
    """What the route asks of a `server.engine.attention_maps.AttentionMaps`."""
    return SimpleNamespace(
        **{name: SimpleNamespace(**{**one, "grid": np.asarray(one["grid"])}) for name, one in told.items()}
    )


@dataclass
class RemoteEngines:
    """Engine rooms in other processes, as a front end has them: lines to them, and a ledger of its own counts."""

    engines: EnginePool
    batcher: RemoteBatcher | BalancedBatcher
    ledger: ProcessMetrics
    _writing: asyncio.Task[None] | None = None

    @property
    def lost(self) -> bool:
        """Never: an engine that has ended is forked anew."""
        return False

    async def warm_up(self) -> None:
        """An engine that is away is told of; one that is there is not to be missed."""
        for engine in self.engines.all:
            engine.connection.start()
        with suppress(TimeoutError):
            async with asyncio.timeout(CONNECT_S):
                await asyncio.gather(*(engine.connection.connected() for engine in self.engines.all))

    def start(self) -> None:
        self._writing = asyncio.create_task(self.ledger.write_periodically())

    async def drain(self, timeout_s: float) -> None:
        await self.batcher.drain(timeout_s)

    async def stop(self) -> None:
        for engine in self.engines.all:
            await engine.connection.stop()
        if self._writing is not None:
            self._writing.cancel()
        self.ledger.write_snapshot()


def build_front(
    settings: Settings, facts: BackboneInfo, folder: Path, own: ProcessMetrics, *, first: bool
) -> Server[RemoteEngines]:
    """`first`: see `server.app.server.build_server_over`."""
    torch.set_num_threads(1)
    ring, bundles = open_authenticator(settings), open_store(settings.store_url)
    engines = _far_engines(settings, facts, folder)
    residency, batcher = _pair(engines)
    metrics.scrape_registry, metrics.refresh = merged_registry(own), partial(_counted, engines)
    metrics.bind_gauge(metrics.ENGINE_UP, lambda: not engines.troubles)
    return build_server_over(
        RemoteEngines(engines, batcher, own),
        EngineBindings(
            facts,
            residency,
            batcher,
            look=RemoteCall(LOOK, _looked),
            rack=engines.rack,
            ready=partial(_ready, engines, facts, settings, own),
        ),
        settings,
        ring=ring,
        registry=Registry.installed(),
        bundles=bundles,
        store=CachedStore(bundles, max_bytes=settings.cache_bytes),
        first=first,
    )


def _ready(engines: EnginePool, facts: BackboneInfo, settings: Settings, process_metrics: ProcessMetrics) -> wire.Ready:
    away = [] if len(engines.all) == 1 else engines.troubles
    return readiness(facts, settings, engines.trouble, running_workers(process_metrics), away)


async def _counted(engines: EnginePool) -> None:
    """What engines have counted so far is in the ledger, as far as they answer."""
    with suppress(TimeoutError, ServiceError):
        async with asyncio.timeout(COUNTS_S):
            await engines.each(lambda one: one.connection.call("view", name=COUNTS))


def _far_engines(settings: Settings, facts: BackboneInfo, folder: Path) -> EnginePool:
    def far(number: int, device: str) -> RemoteEngine:
        slots = PixelWriter(with_reserve(settings.max_queue) + 4 * settings.max_batch, facts.spec.image_size)
        connection = EngineConnection(socket_path(folder, number), slots, silence_s=settings.engine_timeout_s)
        batcher = RemoteBatcher(connection, slots, max_batch=settings.max_batch, max_queue=settings.max_queue)
        return RemoteEngine(number, device, connection, RemoteResidency(connection, number), batcher)

    engines = EnginePool([far(*one) for one in enumerate(settings.engine_devices)], max_batch=settings.max_batch)
    for one in engines.all:
        one.connection.on_state = lambda _: take_over_tasks([one.connection.state for one in engines.all])
    return engines


def _pair(engines: EnginePool) -> tuple[RemoteResidency | BalancedResidency, RemoteBatcher | BalancedBatcher]:
    """With one engine there is nothing to choose."""
    if len(engines.all) == 1:
        return engines.all[0].residency, engines.all[0].batcher
    return BalancedResidency(engines), BalancedBatcher(engines)
