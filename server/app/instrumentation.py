"""Feeds the metrics from rooms that know of none: gauges read at a scrape, hooks, caches that count.

The engine and training run on machines without the service's packages, so they only offer hooks and protocols; this
file connects these with `server.observability.metrics`."""

from __future__ import annotations

from functools import partial
from typing import TypeVar

from server import __version__
from server.batching.batcher import Batcher
from server.engine.backbone import Backbone
from server.engine.device_memory import device_memory
from server.engine.graphs import Graphs
from server.engine.rack import Rack
from server.observability import metrics
from server.serving.quarantine import Quarantine
from server.settings import Settings
from server.training.caches.array_file import Array
from server.training.caches.feature_cache import FeatureCache, FeatureKey
from server.training.caches.pixel_cache import PixelCache, Pixels

from .worker_pool import WorkerPool

Entry = TypeVar("Entry")


def process(settings: Settings, backbone: Backbone) -> None:
    """Metrics of a server and of a worker alike: the build, GPU memory."""
    metrics.TASKS.resize(settings.metrics_tasks)
    device, dtype = backbone.device.type, backbone.precision
    metrics.set_build_info(version=__version__, backbone=backbone.spec.arch, device=device, dtype=dtype)
    if backbone.device.type == "cuda":
        metrics.bind_gpu_memory(partial(device_memory, backbone.device), str(backbone.device))


def engine_runtime(batcher: Batcher, rack: Rack) -> None:
    """Gauges of the engine: queue and rack. A process has one engine at most."""
    metrics.bind_gauge(metrics.QUEUE_PLACES, lambda: batcher.places)
    metrics.bind_gauge(metrics.QUEUE_OLDEST_S, batcher.oldest_s)
    metrics.RACK_SLOTS.set(rack.slots)
    metrics.RACK_BYTES.labels("total").set(rack.capacity * rack.vector_bytes)
    metrics.bind_gauge(metrics.RACK_BYTES.labels("used"), lambda: rack.used_vectors * rack.vector_bytes)
    metrics.bind_gauge(metrics.RACK_LENSES, lambda: rack.used_slots)


def worker_pool(workers: WorkerPool) -> None:
    """Gauges of the workers of a server in one process; with front ends the process manager has them."""
    metrics.WORKERS.labels("wanted").set(workers.count)
    metrics.bind_gauge(metrics.WORKERS.labels("running"), lambda: len(workers.pids))


def cuda_graphs(graphs: Graphs) -> None:
    metrics.bind_gauge(metrics.GRAPHS.labels("serving"), lambda: len(graphs.graphs))
    metrics.bind_gauge(metrics.GRAPHS.labels("refused"), lambda: graphs.counts.refused)
    graphs.on_rows = _went


def _went(by_graph: int, beside: int) -> None:
    metrics.GRAPH_ROWS.labels("graph").inc(by_graph)
    metrics.GRAPH_ROWS.labels("beside").inc(beside)


def front(quarantine: Quarantine) -> None:
    metrics.bind_gauge(metrics.QUARANTINED, quarantine.count)


# --- the rack's hooks -------------------------------------------------------------------------------------------------


def loaded(task: str, seconds: float) -> None:
    label = metrics.TASKS.label(task)
    metrics.RACK_LOADS.labels(label).inc()
    metrics.LOAD_S.labels(label).observe(seconds)


def hit(task: str, times: int) -> None:
    metrics.RACK_HITS.labels(metrics.TASKS.label(task)).inc(times)


def evicted(task: str) -> None:
    metrics.RACK_EVICTIONS.labels(metrics.TASKS.label(task)).inc()


# --- a worker's caches ------------------------------------------------------------------------------------------------


class CountedPixels(PixelCache):
    """A cache of decoded pictures that counts hits and misses."""

    def get(self, sha256: str, cut: str) -> Pixels | None:
        return _counted("pixels", super().get(sha256, cut))


class CountedFeatures(FeatureCache):
    """A cache of frozen features that counts hits and misses."""

    def get(self, key: FeatureKey) -> Array | None:
        return _counted("features", super().get(key))


def _counted(cache: str, entry: Entry) -> Entry:
    metrics.CACHE.labels(cache, "miss" if entry is None else "hit").inc()
    return entry
