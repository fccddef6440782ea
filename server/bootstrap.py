"""The only file that names concrete backends and wires them.

build_server   stores · backbone · rack · residency · engine · batcher · predictor · api
build_worker   stores · backbone · trainer
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from fastapi import FastAPI
from numpy.typing import NDArray

from lensrack import wire
from prompts_store import CachedStore, Store, open_store
from server import measured, metrics, sample_tasks
from server.api import services as api
from server.api.app import Services, create_app
from server.api.guard import require_safe_bind
from server.api.tenancy import narrowing
from server.batching.batcher import Batcher
from server.datasets.dataset_store import DatasetStore
from server.datasets.feedback_store import FeedbackStore
from server.datasets.upload_store import UploadStore
from server.engine import backbone as eye
from server.engine.attention import look
from server.engine.engine import Engine
from server.engine.graphs import Graphs, buckets
from server.engine.graphs import recorded as graphs_of
from server.engine.rack import Rack
from server.engine.recorder import CudaRecorder
from server.engine.residency import Loaded, Residency
from server.errors import NotInstalled
from server.importing.format import Width
from server.importing.importer import Eye, Importer
from server.jobs.redis_store import RedisJobStore
from server.jobs.sqlite_store import SqliteJobStore
from server.jobs.store import JobStore
from server.keys.keys_file import KeysFile
from server.keys.meter import Meter
from server.keys.ring import KeyRing
from server.keys.url import open_keys
from server.measured import CountedFeatures, CountedPixels
from server.methods.registry import Registry
from server.predictor import Limits, Predictor, Queue
from server.settings import Settings
from server.supervisor import Supervisor
from server.trainer import Means, Trainer
from server.training.low_priority import cap_memory
from server.training.stored_images import Decoder
from server.watch import Watch
from server.watchdog import Watchdog

if TYPE_CHECKING:  # its packages are an extra's
    from server.grpc_front.front import GrpcFront

log = logging.getLogger(__name__)

CLOSE_S = 2.0
UNTRAINED_NOTE = (
    "the backbone is `untrained`: a small stand-in with random weights, fit for trying things out; "
    "set LENSRACK_BACKBONE to a trained one for answers worth having"
)


def load_backbone(
    settings: Settings, threads: int, device: str | None = None, *, training: bool = False
) -> eye.Backbone:
    """On LENSRACK_DEVICE unless another is given. `training`: never in 8 bits."""
    torch.set_num_threads(threads)
    return eye.load(
        settings.backbone,
        settings.backbone_weights,
        device=device or settings.device,
        dtype="auto" if training and settings.dtype == eye.FLOAT8 else settings.dtype,
        packed=settings.packed,
    )


def open_jobs(settings: Settings) -> JobStore:
    scheme, separator, path = settings.jobs_url.partition("://")
    if scheme in {"redis", "rediss"}:
        return RedisJobStore(settings.jobs_url)
    if scheme == "sqlite":
        return SqliteJobStore(Path(path))
    got = f"{scheme}://…" if separator else "another form"  # a URL may hold a password
    raise ValueError(f"LENSRACK_JOBS: expected sqlite://FILE or redis://…, got {got}")


def open_ring(settings: Settings) -> KeyRing:
    """The keys that this server asks for, read once. Raises ValueError and ServiceError."""
    file = KeysFile(settings.keys_file) if settings.keys_file is not None else None
    ring = KeyRing(open_keys(settings.keys_url), file)
    ring.load()
    return ring


def open_meter(settings: Settings) -> Meter:
    """Limits are counted where the keys are."""
    url = settings.keys_url
    return Meter(url if url.startswith(("redis://", "rediss://")) else None)


def open_datasets(settings: Settings) -> DatasetStore:
    return DatasetStore(
        settings.datasets_dir,
        max_images=settings.max_dataset_images,
        max_unpacked_bytes=settings.max_unpacked_bytes,
        max_image_pixels=settings.max_image_pixels,
    )


def open_uploads(settings: Settings) -> UploadStore:
    return UploadStore(
        settings.datasets_dir / "resumable", max_bytes=settings.max_dataset_bytes, expiry_s=settings.upload_expiry_s
    )


def open_feedback(settings: Settings) -> FeedbackStore:
    return FeedbackStore(
        settings.datasets_dir / "feedback",
        max_images=settings.max_feedback_images,
        max_image_pixels=settings.max_image_pixels,
    )


class Closable(Protocol):
    def close(self) -> None: ...


async def close_all(*stores: Closable) -> None:
    """A store that hangs is not waited for: whoever asked this process to end has a deadline."""
    closing = [asyncio.ensure_future(asyncio.to_thread(one.close)) for one in stores]
    await asyncio.wait(closing, timeout=CLOSE_S)


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


def build_grpc(services: Services, ring: KeyRing) -> GrpcFront | None:
    """None where no port is set. Raises NotInstalled."""
    settings = services.settings
    if not settings.grpc_port:
        return None
    try:
        from server.grpc_front.front import GrpcFront
    except ImportError as error:
        raise NotInstalled(f"LENSRACK_GRPC_PORT needs the extra `grpc`, which brings {error.name}") from error
    return GrpcFront(narrowing(services), ring, settings, settings.grpc_port)


def see_nothing(engine: Engine) -> None:
    """A forward of one picture of zeros."""
    size = engine.backbone.spec.image_size
    engine.embed([np.zeros((size, size, 3), np.uint8)])


@dataclass(frozen=True)
class Facts:
    """What the HTTP side needs to know of the backbone, and no more: `names` are its parameters' shapes."""

    spec: eye.Spec
    device: str
    dtype: str
    names: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, backbone: eye.Backbone) -> Facts:
        state = backbone.model.state_dict()
        names = {name: tuple(tensor.shape) for name, tensor in state.items()}
        return cls(backbone.spec, str(backbone.device), backbone.precision, names)


@dataclass
class EngineRoom:
    """Backbone, rack, engine and the one queue before it, with what watches them: all of a server but HTTP."""

    settings: Settings
    facts: Facts
    registry: Registry
    bundles: Store
    store: CachedStore
    rack: Rack
    residency: Residency
    engine: Engine
    batcher: Batcher
    watchdog: Watchdog
    workers: Supervisor
    loading: ThreadPoolExecutor


def build_engine_room(settings: Settings, ring: KeyRing, number: int = 0) -> EngineRoom:
    """The engine of a `number`, from 0; the first of several does what one alone must do. Raises ValueError."""
    first, devices = number == 0, settings.engine_devices
    threads = settings.threads or max(1, ((os.cpu_count() or 1) - 1) // len(devices))
    backbone = load_backbone(settings, threads, devices[number])
    if not backbone.spec.trained:
        log.warning(UNTRAINED_NOTE)
    log.info("backbone %s, fingerprint %s…", backbone.spec.arch, backbone.spec.fingerprint[:12])
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
        share=ring.weight,
        target_s=settings.target_latency_s,
        wait_s=settings.max_wait_s,
    )
    watchdog = Watchdog(
        batcher, partial(see_nothing, engine), timeout_s=settings.engine_timeout_s, grace_s=settings.drain_timeout_s
    )
    workers = supervise(settings, settings.workers if first else 0)
    measured.process(settings, backbone)
    measured.engine_room(settings, batcher, rack, workers)
    return EngineRoom(
        settings,
        Facts.of(backbone),
        registry,
        bundles,
        store,
        rack,
        residency,
        engine,
        batcher,
        watchdog,
        workers,
        loading,
    )


def record_graphs(settings: Settings, backbone: eye.Backbone, rack: Rack) -> Graphs | None:
    """None where they are not asked for. What cannot be recorded is logged and counted, and goes the ordinary way."""
    if not settings.cuda_graphs:
        return None
    graphs = graphs_of(backbone, rack, partial(CudaRecorder, backbone.device), buckets(settings.max_batch))
    measured.cuda_graphs(graphs)
    return graphs


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
        pair=Pair(
            room.residency, room.batcher, partial(look, room.engine), partial(occupied, room.rack, room.residency)
        ),
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


@dataclass(frozen=True)
class Pair:
    """The engine's side as HTTP sees it, in this process or in another; `look` and `rack` go with it."""

    residency: api.Residency
    batcher: Queue
    look: api.Look
    rack: Callable[[], Awaitable[wire.Rack]]


def build_services(
    settings: Settings,
    facts: Facts,
    *,
    registry: Registry,
    pair: Pair,
    store: Store,
    jobs: JobStore,
    ready: Callable[[], wire.Ready],
) -> tuple[Services, ThreadPoolExecutor]:
    """All that routes call, and the threads that decode."""
    decoding = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
    predictor = Predictor(
        store,
        pair.residency,
        pair.batcher,
        decoding,
        limits=Limits(
            settings.max_images,
            settings.max_image_pixels,
            settings.max_tasks_per_request,
            settings.scaled_decode or math.inf,
        ),
        geometry=facts.spec.geometry,
        fingerprint=facts.spec.fingerprint,
    )
    measured.front(predictor.quarantine)
    services = Services(
        settings=settings,
        predictor=predictor,
        batcher=pair.batcher,
        residency=pair.residency,
        store=store,
        jobs=jobs,
        datasets=open_datasets(settings),
        uploads=open_uploads(settings),
        feedback=open_feedback(settings),
        ready=ready,
        rack=pair.rack,
        look=pair.look,
        methods=registry.meanings,
        baselines={name: (one.meaning, one.why) for name, one in registry.baselines.items()},
        check_bundle=lambda bundle: registry.check(bundle, facts.spec),
        importer=importer_for(facts, registry),
        meter=open_meter(settings),
    )
    return services, decoding


def build_residency(
    rack: Rack, registry: Registry, store: Store, backbone: eye.Backbone, pool: ThreadPoolExecutor
) -> Residency:
    def load(task: str, version: str) -> Loaded:
        return registry.load(store.get(task, version), backbone)

    return Residency(rack, load, pool, on_load=measured.loaded, on_hit=measured.hit, on_evict=measured.evicted)


def build_importer(backbone: eye.Backbone, registry: Registry) -> Importer:
    return importer_for(Facts.of(backbone), registry)


def importer_for(facts: Facts, registry: Registry) -> Importer:
    spec = facts.spec

    def fingerprint_of(arrays: Mapping[str, NDArray[np.float32]]) -> str:
        return eye.fingerprint(spec.arch, {name: torch.tensor(array) for name, array in arrays.items()})

    width = Width(spec.dim, spec.depth, facts.names)
    own = Eye(spec.arch, spec.fingerprint, width, spec.preprocess, fingerprint_of)
    return Importer(own, lambda bundle: registry.check(bundle, spec))


async def occupied(rack: Rack, residency: Residency) -> wire.Rack:
    """What `GET /rack` says of the device."""
    seats = [
        wire.RackSeat(
            slot=one.seat.slot,
            task=one.seat.task,
            version=one.seat.version,
            bytes=one.bytes,
            in_use=one.in_use,
            pinned=one.pinned,
        )
        for one in residency.occupants()
    ]
    counts = residency.counts
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


def readiness(facts: Facts, settings: Settings, trouble: str, workers: int, away: Sequence[str] = ()) -> wire.Ready:
    """What /readyz says: what is seen with, and whether everything that should run does; `trouble` is the engine's.
    `away`: what is wrong with some of several engines, while others answer."""
    spec = facts.spec
    notes = [note for note in (trouble, *away, "" if spec.trained else UNTRAINED_NOTE) if note]
    if settings.scaled_decode:
        notes.append(f"JPEGs are decoded at reduced size, from {settings.scaled_decode:g} times what is needed on")
    if workers < settings.workers:
        notes.append(f"{workers} of {settings.workers} workers are running: training may wait")
    return wire.Ready(
        ready=not trouble,
        backbone=wire.Backbone(
            arch=spec.arch,
            fingerprint=spec.fingerprint,
            trained=spec.trained,
            device=facts.device,
            dtype=facts.dtype,
            image_size=spec.image_size,
            depth=spec.depth,
            dim=spec.dim,
        ),
        notes=notes,
        checks={"engine": trouble or "; ".join(away) or "ok", "workers": f"{workers} of {settings.workers}"},
    )


def supervise(settings: Settings, count: int) -> Supervisor:
    """Workers are this program again. They find the same packages and the same home, wherever they start."""
    root, port = str(Path(__file__).resolve().parents[1]), settings.worker_metrics_port
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (root, str(Path(root) / "client"), os.environ.get("PYTHONPATH")))),
        "LENSRACK_HOME": str(settings.home.resolve()),
    }
    return Supervisor(
        [sys.executable, "-m", "server", "work", "--until-stdin-closes"],
        count,
        env=env,
        grace_s=settings.drain_timeout_s,
        on_restart=metrics.WORKER_RESTARTS.inc,
        own_env=lambda number: {"LENSRACK_WORKER_METRICS_PORT": str(port + number if port else 0)},
    )


def build_worker(settings: Settings, name: str) -> Trainer:
    cores = os.cpu_count() or 1
    threads = settings.worker_threads or max(1, cores // 2)
    backbone = load_backbone(settings, threads, settings.worker_device, training=True)
    cap_memory(backbone.device, settings.worker_gpu_memory)
    measured.process(settings, backbone)
    if not backbone.spec.trained:
        log.warning(UNTRAINED_NOTE)
    datasets = open_datasets(settings)
    return Trainer(
        open_means(settings, datasets, backbone),
        open_store(settings.store_url),
        open_jobs(settings),
        datasets,
        worker=name,
        lease_s=settings.lease_s,
        keep_s=settings.jobs_keep_s,
        at_once=settings.worker_jobs,
    )


def open_means(settings: Settings, datasets: DatasetStore, backbone: eye.Backbone) -> Means:
    pixels = CountedPixels(
        settings.pixel_cache_dir, disk_bytes=settings.pixel_cache_bytes, memory_bytes=settings.pixel_memory_bytes
    )
    pool = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
    return Means(
        backbone,
        Registry.installed(),
        Decoder(datasets.read, backbone.spec.geometry, settings.max_image_pixels, pixels, pool),
        CountedFeatures(settings.feature_cache_dir, settings.feature_cache_bytes),
        settings.home.resolve() / "checkpoints",
    )
