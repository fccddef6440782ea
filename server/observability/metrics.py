"""All metrics, defined once. Labels are bounded: only the busiest tasks are labels.

Server and worker are processes with a registry each; a metric that only the other sets stays at zero. Gauges that need
a query (stores, jobs) are set by `server.app.store_probe`; those that can be read at any moment are read at each
scrape, see `server.app.instrumentation`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.samples import Sample

from .task_labels import TaskLabels

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which no dashboard uses

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)  # process_resident_memory_bytes, process_cpu_seconds_total, process_open_fds, …

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_FEW_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)  # for metrics with a series for each task
_JOB_SECONDS: Final = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 4 * 3600.0, 24 * 3600.0)
_COUNTS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def _counter(name: str, meaning: str, *labels: str) -> Counter:
    return Counter(f"lensrack_{name}", meaning, labels, registry=REGISTRY)


def _gauge(name: str, meaning: str, *labels: str) -> Gauge:
    return Gauge(f"lensrack_{name}", meaning, labels, registry=REGISTRY)


def _histogram(name: str, meaning: str, *labels: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
    return Histogram(f"lensrack_{name}", meaning, labels, buckets=buckets, registry=REGISTRY)


# --- HTTP -------------------------------------------------------------------------------------------------------------
REQUESTS = _counter("requests_total", "HTTP requests by route template, method, status.", "route", "method", "status")
REQUEST_S = _histogram("request_seconds", "HTTP request time by route template.", "route")
REQUEST_BYTES = _counter("request_bytes_total", "Bytes of request bodies, uploads among them, by route.", "route")

# --- a prediction, step by step ---------------------------------------------------------------------------------------
ROWS = _counter("rows_total", "Rows by how they ended.", "outcome")
DECODE_S = _histogram("decode_seconds", "Time to decode and resize a request's images.")
QUEUE_S = _histogram("queue_seconds", "Time a row waited in the queue.")
FORWARD_S = _histogram("forward_seconds", "Time of one forward.")
BATCH_ROWS = _histogram("batch_rows", "Rows in a forward.", buckets=_COUNTS)
BATCH_TASKS = _histogram("batch_tasks", "Distinct lenses in a forward.", buckets=_COUNTS)
BATCH_LIMIT = _gauge("batch_limit_rows", "Most rows in the next forward.")
QUEUE_ROWS = _gauge("queue_rows", "Rows waiting for the engine.")
QUEUE_PLACES = _gauge("queue_places", "Most rows that may wait at present; beyond it requests get 429.")
QUEUE_OLDEST_S = _gauge("queue_oldest_seconds", "Age of the oldest waiting row; 0 when none waits.")
TASK_ROWS = _counter("task_rows_total", "Rows by task and how they ended.", "task", "outcome")
TASK_S = _histogram("task_seconds", "Time from a task's request to its answer.", "task", buckets=_FEW_SECONDS)

GRAPHS = _gauge("cuda_graphs", "CUDA graphs of the forward, by state: serving, refused.", "state")
GRAPH_ROWS = _counter("cuda_graph_rows_total", "Trunk rows by path: graph, or beside (the ordinary forward).", "way")
ENGINE_UP = _gauge("engine_up", "0 while an engine hangs, fails at every batch, or is not connected.")
ENGINE_UP.set(1)  # stays 1 in processes without an engine, such as workers

# --- the rack ---------------------------------------------------------------------------------------------------------
RACK_LENSES = _gauge("rack_lenses", "Lenses resident on the device.")
RACK_SLOTS = _gauge("rack_slots", "Most lenses that can be resident.")
RACK_BYTES = _gauge("rack_bytes", "Device memory of the rack, by state: used, total.", "state")
RACK_HITS = _counter("rack_hits_total", "Requests whose lens was resident or being loaded.", "task")
RACK_LOADS = _counter("rack_loads_total", "Lenses made resident.", "task")
RACK_EVICTIONS = _counter("rack_evictions_total", "Lenses evicted to make room.", "task")
QUARANTINED = _gauge("quarantined_versions", "Versions that could not be loaded and are not retried for now.")
LOAD_S = _histogram(
    "rack_load_seconds", "Time to load a lens from the store to the device.", "task", buckets=_FEW_SECONDS
)

# --- the server and its stores ----------------------------------------------------------------------------------------
BUILD = _gauge(
    "build_info", "Always 1; the labels describe the running server.", "version", "backbone", "device", "dtype"
)
STORE_UP = _gauge("store_up", "1 while the store answers, by store: bundles, jobs.", "store")
JOBS = _gauge("jobs", "Jobs in the job store by state.", "state")
WORKERS = _gauge("workers", "Worker processes of this server, by state: running, wanted.", "state")
WORKER_RESTARTS = _counter("worker_restarts_total", "Workers that died and were started again.")
GPU_BYTES = _gauge(
    "gpu_memory_bytes", "Memory of a CUDA device, by kind: allocated, reserved, free, total.", "device", "kind"
)

# --- training, fed by workers -----------------------------------------------------------------------------------------
WORKER_BUSY = _gauge("worker_jobs", "Jobs that the worker is fitting.")
ATTEMPTS = _counter("job_attempts_total", "Attempts at jobs by how they ended.", "outcome")
ATTEMPT_S = _histogram(
    "job_attempt_seconds", "Time of an attempt at a job by how it ended.", "outcome", buckets=_JOB_SECONDS
)
LEASES_LOST = _counter(
    "job_leases_lost_total", "Leases that expired, by the worker that noticed: holder, successor.", "seen_by"
)
HEARTBEATS_FAILED = _counter("job_heartbeats_failed_total", "Heartbeats that the job store did not accept.")
EPOCHS = _counter("training_epochs_total", "Epochs completed, those of a search's trials included.")
STEPS = _counter("training_steps_total", "Optimiser steps.")
IMAGES = _counter("training_images_total", "Training images seen by optimiser steps, once for each epoch.")
CACHE = _counter("cache_requests_total", "Lookups in a cache: pixels, features.", "cache", "result")

# series created at the start, so that the first failure is a step from 0 to 1, which `increase` sees
_FROM_START: Final[tuple[tuple[Counter, tuple[tuple[str, ...], ...]], ...]] = (
    (ROWS, (("answered",), ("refused",), ("failed",), ("expired",), ("departed",))),
    (ATTEMPTS, (("succeeded",), ("failed",), ("retried",), ("cancelled",), ("released",), ("superseded",))),
    (LEASES_LOST, (("holder",), ("successor",))),
    (CACHE, (("pixels", "hit"), ("pixels", "miss"), ("features", "hit"), ("features", "miss"))),
)

_BY_TASK: Final = (TASK_ROWS, TASK_S, RACK_HITS, RACK_LOADS, RACK_EVICTIONS, LOAD_S)


def _remove_task(task: str) -> None:
    for metric in _BY_TASK:
        metric.remove_by_labels({"task": task})


def _create_series() -> None:
    for counter, label_sets in _FROM_START:
        for labels in label_sets:
            counter.labels(*labels)


def samples(metric: Counter | Histogram) -> list[Sample]:
    """A metric's samples as in a scrape, those of the server's other processes included."""
    name = next(iter(metric.collect())).name
    return [sample for family in scrape_registry.collect() if family.name == name for sample in family.samples]


async def _no_refresh() -> None:
    pass


_create_series()
scrape_registry: CollectorRegistry = REGISTRY  # what a scrape shows: merged where the server has several processes
refresh: Callable[[], Awaitable[None]] = _no_refresh  # called before each scrape
TASKS = TaskLabels(50, _remove_task)  # LENSRACK_METRICS_TASKS


def bind_gauge(gauge: Gauge, read: Callable[[], float]) -> None:
    """Read the gauge's value from `read` at each scrape."""
    gauge.set_function(read)


def set_build_info(**labels: Any) -> None:
    """Set the labels of `lensrack_build_info`: version, backbone, device, dtype."""
    BUILD.clear()
    BUILD.labels(**labels).set(1)


def _value(read: Callable[[], Mapping[str, int]], kind: str) -> float:
    return read()[kind]


def bind_gpu_memory(read: Callable[[], Mapping[str, int]], device: str) -> None:
    """Read GPU_BYTES of `device` from `read` at each scrape: bytes allocated, reserved, free, and total."""
    for kind in ("allocated", "reserved", "free", "total"):
        bind_gauge(GPU_BYTES.labels(device, kind), partial(_value, read, kind))
