"""A front end's process: HTTP, with the engines in other processes.

    RemoteEngines      connections to the engines ─► remote residency and batcher

`server.processes.manager` forks it. A front end is a `server.app.server.Server` over `RemoteEngines`.
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
COUNTS_S: Final = 1.0  # longest wait for an engine's latest counts; after it those of its last write are shown


def _attention_maps(reply: Mapping[str, Any]) -> Any:
    """Return what the route reads of a `server.engine.attention_maps.AttentionMaps`."""
    return SimpleNamespace(
        **{name: SimpleNamespace(**{**fields, "grid": np.asarray(fields["grid"])}) for name, fields in reply.items()}
    )


@dataclass
class RemoteEngines:
    """Engines in other processes, as a front end uses them, and the metrics of this process."""

    engines: EnginePool
    batcher: RemoteBatcher | BalancedBatcher
    process_metrics: ProcessMetrics
    _write_task: asyncio.Task[None] | None = None

    @property
    def lost(self) -> bool:
        """Always false: the process manager restarts an engine that has ended."""
        return False

    async def warm_up(self) -> None:
        """Wait up to 5 s for the engines to connect. `/readyz` names those that have not."""
        for engine in self.engines.all:
            engine.connection.start()
        with suppress(TimeoutError):
            async with asyncio.timeout(CONNECT_S):
                await asyncio.gather(*(engine.connection.connected() for engine in self.engines.all))

    def start(self) -> None:
        self._write_task = asyncio.create_task(self.process_metrics.write_periodically())

    async def drain(self, timeout_s: float) -> None:
        await self.batcher.drain(timeout_s)

    async def stop(self) -> None:
        for engine in self.engines.all:
            await engine.connection.stop()
        if self._write_task is not None:
            self._write_task.cancel()
        self.process_metrics.write_snapshot()


def build_front(
    settings: Settings, backbone: BackboneInfo, folder: Path, process_metrics: ProcessMetrics, *, first: bool
) -> Server[RemoteEngines]:
    """Build a server over the engines whose sockets are in `folder`. `first`: see `build_server_over`."""
    torch.set_num_threads(1)
    authenticator, bundles = open_authenticator(settings), open_store(settings.store_url)
    engines = _engine_pool(settings, backbone, folder)
    residency, batcher = _residency_and_batcher(engines)
    metrics.scrape_registry, metrics.refresh = merged_registry(process_metrics), partial(_refresh_counts, engines)
    metrics.bind_gauge(metrics.ENGINE_UP, lambda: not engines.troubles)
    return build_server_over(
        RemoteEngines(engines, batcher, process_metrics),
        EngineBindings(
            backbone,
            residency,
            batcher,
            look=RemoteCall(LOOK, _attention_maps),
            rack=engines.rack,
            ready=partial(_ready, engines, backbone, settings, process_metrics),
        ),
        settings,
        authenticator=authenticator,
        registry=Registry.installed(),
        bundles=bundles,
        store=CachedStore(bundles, max_bytes=settings.cache_bytes),
        first=first,
    )


def _ready(
    engines: EnginePool, backbone: BackboneInfo, settings: Settings, process_metrics: ProcessMetrics
) -> wire.Ready:
    away = [] if len(engines.all) == 1 else engines.troubles
    return readiness(backbone, settings, engines.trouble, running_workers(process_metrics), away)


async def _refresh_counts(engines: EnginePool) -> None:
    """Have the engines write what they have counted so far; those that do not answer in time are left out."""
    with suppress(TimeoutError, ServiceError):
        async with asyncio.timeout(COUNTS_S):
            await engines.each(lambda engine: engine.connection.call("view", name=COUNTS))


def _engine_pool(settings: Settings, backbone: BackboneInfo, folder: Path) -> EnginePool:
    def connect(number: int, device: str) -> RemoteEngine:
        slots = PixelWriter(with_reserve(settings.max_queue) + 4 * settings.max_batch, backbone.spec.image_size)
        connection = EngineConnection(socket_path(folder, number), slots, silence_s=settings.engine_timeout_s)
        batcher = RemoteBatcher(connection, slots, max_batch=settings.max_batch, max_queue=settings.max_queue)
        return RemoteEngine(number, device, connection, RemoteResidency(connection, number), batcher)

    engines = EnginePool([connect(*each) for each in enumerate(settings.engine_devices)], max_batch=settings.max_batch)
    for engine in engines.all:
        engine.connection.on_state = lambda _: take_over_tasks([each.connection.state for each in engines.all])
    return engines


def _residency_and_batcher(
    engines: EnginePool,
) -> tuple[RemoteResidency | BalancedResidency, RemoteBatcher | BalancedBatcher]:
    """Return the pair of the only engine, or one that balances over several."""
    if len(engines.all) == 1:
        return engines.all[0].residency, engines.all[0].batcher
    return BalancedResidency(engines), BalancedBatcher(engines)
