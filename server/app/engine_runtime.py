"""The engine runtime: backbone, rack, engine and the queue before it, built and wired."""

from __future__ import annotations

import asyncio
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from lensrack import wire
from prompts_store import CachedStore, Store, open_store
from server.batching.batcher import Batcher
from server.batching.watchdog import Watchdog
from server.engine.backbone import Backbone
from server.engine.engine import Engine
from server.engine.graph_recording import record_buckets
from server.engine.graphs import Graphs, buckets
from server.engine.rack import Rack
from server.engine.recorder import CudaRecorder
from server.engine.residency import Loaded, Residency
from server.keys.authenticator import Authenticator
from server.methods.registry import Registry
from server.serving.preloader import Preloader
from server.settings import Settings

from . import allocator, instrumentation, sample_tasks
from .backbone import UNTRAINED_NOTE, BackboneInfo, load_backbone

log = logging.getLogger(__name__)


@dataclass
class EngineRuntime:
    """An engine with its rack and its queue, and what watches them: all of a server but HTTP and training.

    Call `warm_up`, `start`, then any of its parts, `drain`, `stop`.
    """

    settings: Settings
    backbone: BackboneInfo
    registry: Registry
    bundles: Store
    store: CachedStore
    rack: Rack
    residency: Residency
    preloader: Preloader
    engine: Engine
    batcher: Batcher
    watchdog: Watchdog
    loading: ThreadPoolExecutor

    @property
    def lost(self) -> bool:
        return self.watchdog.lost

    async def warm_up(self) -> None:
        """Run one forward, so that the first request does not pay for lazy set-up."""
        await asyncio.to_thread(run_blank_image, self.engine)

    def start(self) -> None:
        self.watchdog.start()
        self.preloader.start()

    async def drain(self, timeout_s: float) -> None:
        await self.batcher.drain(timeout_s)

    async def stop(self) -> None:
        """After a drain. Its store stays open: whoever opened others closes all of them at once."""
        await self.preloader.stop()
        await self.watchdog.stop()
        self.loading.shutdown(wait=False, cancel_futures=True)

    async def occupied(self) -> wire.Rack:
        """What `GET /rack` says of the device."""
        rack, counts = self.rack, self.residency.counts
        seats = [
            wire.RackSeat(
                slot=one.seat.slot,
                task=one.seat.task,
                version=one.seat.version,
                bytes=one.bytes,
                in_use=one.in_use,
                pinned=one.pinned,
            )
            for one in self.residency.occupants()
        ]
        return wire.Rack(
            slots=rack.slots,
            used_slots=rack.used_slots,
            bytes=rack.capacity * rack.vector_bytes,
            used_bytes=rack.used_vectors * rack.vector_bytes,
            seats=seats,
            hits=counts.hits,
            loads=counts.loads,
            evictions=counts.evictions,
        )


def build_engine_runtime(settings: Settings, authenticator: Authenticator, number: int = 0) -> EngineRuntime:
    """Build the engine of a `number`, from 0. The first of several does what only one may do. Raises ValueError."""
    first = number == 0
    backbone = _load_for_device(settings, number)
    registry = Registry.installed()
    bundles = open_store(settings.store_url)
    if first and settings.sample_tasks and (names := sample_tasks.put(bundles, backbone.spec.fingerprint)):
        log.info("ready tasks: %s", ", ".join(names))
    store = CachedStore(bundles, max_bytes=settings.cache_bytes)
    rack = Rack.sized(
        dim=backbone.spec.dim,
        slots=settings.rack_slots,
        size_bytes=settings.rack_bytes,
        device=backbone.device,
        dtype=backbone.dtype,
    )
    loading = ThreadPoolExecutor(2, thread_name_prefix="load")
    residency = build_residency(rack, registry, store, backbone, loading)
    engine = Engine(backbone, rack, record_graphs(settings, backbone, rack))
    batcher = Batcher(
        engine,
        max_batch=settings.max_batch,
        max_queue=settings.max_queue,
        share=authenticator.weight,
        target_s=settings.target_latency_s,
        wait_s=settings.max_wait_s,
    )
    watchdog = Watchdog(
        batcher, partial(run_blank_image, engine), timeout_s=settings.engine_timeout_s, grace_s=settings.drain_timeout_s
    )
    instrumentation.process(settings, backbone)
    instrumentation.engine_runtime(batcher, rack)
    info = BackboneInfo.of(backbone)
    backbone.free_unpacked_weights()
    allocator.hand_back()
    return EngineRuntime(
        settings,
        info,
        registry,
        bundles,
        store,
        rack,
        residency,
        Preloader(store, residency),
        engine,
        batcher,
        watchdog,
        loading,
    )


def _load_for_device(settings: Settings, number: int) -> Backbone:
    """The backbone of an engine's device. Its threads leave one core to the event loop."""
    devices = settings.engine_devices
    threads = settings.threads or max(1, ((os.cpu_count() or 1) - 1) // len(devices))
    backbone = load_backbone(settings, threads, devices[number])
    if not backbone.spec.trained:
        log.warning(UNTRAINED_NOTE)
    log.info("backbone %s, fingerprint %s…", backbone.spec.arch, backbone.spec.fingerprint[:12])
    return backbone


def record_graphs(settings: Settings, backbone: Backbone, rack: Rack) -> Graphs | None:
    """CUDA graphs where the settings want them, else None. A bucket that cannot be recorded is logged, counted, and
    served the ordinary way."""
    if not settings.cuda_graphs:
        return None
    graphs = record_buckets(backbone, rack, partial(CudaRecorder, backbone.device), buckets(settings.max_batch))
    instrumentation.cuda_graphs(graphs)
    return graphs


def build_residency(
    rack: Rack, registry: Registry, store: Store, backbone: Backbone, pool: ThreadPoolExecutor
) -> Residency:
    def load(task: str, version: str) -> Loaded:
        return registry.load(store.get(task, version), backbone)

    return Residency(
        rack, load, pool, on_load=instrumentation.loaded, on_hit=instrumentation.hit, on_evict=instrumentation.evicted
    )


def run_blank_image(engine: Engine) -> None:
    """Run a forward of one picture of zeros."""
    size = engine.backbone.spec.image_size
    engine.embed([np.zeros((size, size, 3), np.uint8)])
