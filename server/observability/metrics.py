"""Every metric name once. Labels are few and bounded: a task is a label only while it is among the busiest.

A server and a worker are two processes with a registry each: what only the other one feeds stays at zero. Gauges that
somebody has to look at (stores, jobs) are `server.app.store_probe`'s; those that can be read off at any moment are
read when Prometheus asks, see `server.app.instrumentation`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.samples import Sample

from .task_labels import TaskLabels

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for every series, which no dashboard asks for

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)  # process_resident_memory_bytes, process_cpu_seconds_total, process_open_fds, …

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_FEW_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)  # for series that there are many of
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
DECODE_S = _histogram("decode_seconds", "Time in which a request's images became pixels.")
QUEUE_S = _histogram("queue_seconds", "Time a row waited.")
FORWARD_S = _histogram("forward_seconds", "Time of one forward.")
BATCH_ROWS = _histogram("batch_rows", "Rows in a forward.", buckets=_COUNTS)
BATCH_TASKS = _histogram("batch_tasks", "Distinct lenses in a forward.", buckets=_COUNTS)
BATCH_LIMIT = _gauge("batch_limit_rows", "Most rows that the next forward may have.")
QUEUE_ROWS = _gauge("queue_rows", "Rows waiting for the engine.")
QUEUE_PLACES = _gauge("queue_places", "Rows that may wait at this moment; beyond it the answer is 429.")
QUEUE_OLDEST_S = _gauge("queue_oldest_seconds", "How long the oldest waiting row has waited; 0 when none waits.")
TASK_ROWS = _counter("task_rows_total", "Rows by task and how they ended.", "task", "outcome")
TASK_S = _histogram("task_seconds", "Time from a task's question to its labels.", "task", buckets=_FEW_SECONDS)

GRAPHS = _gauge("cuda_graphs", "CUDA graphs of the forward, by state: serving, refused.", "state")
GRAPH_ROWS = _counter("cuda_graph_rows_total", "Trunk rows by the way they went: graph, beside.", "way")
ENGINE_UP = _gauge("engine_up", "0 while an engine hangs, fails at everything that it is asked, or is away.")
ENGINE_UP.set(1)  # where no engine is watched, as in a worker, none is down

# --- the rack ---------------------------------------------------------------------------------------------------------
RACK_LENSES = _gauge("rack_lenses", "Lenses resident on the device.")
RACK_SLOTS = _gauge("rack_slots", "Lenses that may be resident.")
RACK_BYTES = _gauge("rack_bytes", "Device memory of the rack, by state: used, total.", "state")
RACK_HITS = _counter("rack_hits_total", "Requests whose lens was resident or on its way.", "task")
RACK_LOADS = _counter("rack_loads_total", "Lenses made resident.", "task")
RACK_EVICTIONS = _counter("rack_evictions_total", "Lenses evicted to make room.", "task")
QUARANTINED = _gauge("quarantined_versions", "Versions that could not be loaded and are not asked for again for now.")
LOAD_S = _histogram("rack_load_seconds", "Store to resident lens.", "task", buckets=_FEW_SECONDS)

# --- what the server stands on ----------------------------------------------------------------------------------------
BUILD = _gauge("build_info", "Always 1: what runs.", "version", "backbone", "device", "dtype")
STORE_UP = _gauge("store_up", "1 while the store answers, by store: bundles, jobs.", "store")
JOBS = _gauge("jobs", "Jobs in the job store by state.", "state")
WORKERS = _gauge("workers", "Worker processes of this server, by state: running, wanted.", "state")
WORKER_RESTARTS = _counter("worker_restarts_total", "Workers that died and were started again.")
GPU_BYTES = _gauge(
    "gpu_memory_bytes", "Memory of a CUDA device, by kind: allocated, reserved, free, total.", "device", "kind"
)

# --- training, fed by workers -----------------------------------------------------------------------------------------
WORKER_BUSY = _gauge("worker_jobs", "Jobs that this worker is fitting.")
ATTEMPTS = _counter("job_attempts_total", "Attempts at jobs by how they ended.", "outcome")
ATTEMPT_S = _histogram("job_attempt_seconds", "Time of an attempt by how it ended.", "outcome", buckets=_JOB_SECONDS)
LEASES_LOST = _counter("job_leases_lost_total", "Leases that ran out, by who saw it: holder, successor.", "seen_by")
HEARTBEATS_FAILED = _counter("job_heartbeats_failed_total", "Heartbeats that the job store did not take.")
EPOCHS = _counter("training_epochs_total", "Epochs ended, those of a search's trials included.")
STEPS = _counter("training_steps_total", "Optimiser steps.")
IMAGES = _counter("training_images_total", "Training images seen by optimiser steps, once for each epoch.")
CACHE = _counter("cache_requests_total", "Looks into a cache: pixels, features.", "cache", "result")

# a series that is there from the start: the first failure of a process is a step from 0 to 1, which `increase` can see
_KNOWN: Final[tuple[tuple[Counter, tuple[tuple[str, ...], ...]], ...]] = (
    (ROWS, (("answered",), ("refused",), ("failed",), ("expired",), ("departed",))),
    (ATTEMPTS, (("succeeded",), ("failed",), ("retried",), ("cancelled",), ("released",), ("superseded",))),
    (LEASES_LOST, (("holder",), ("successor",))),
    (CACHE, (("pixels", "hit"), ("pixels", "miss"), ("features", "hit"), ("features", "miss"))),
)

_BY_TASK: Final = (TASK_ROWS, TASK_S, RACK_HITS, RACK_LOADS, RACK_EVICTIONS, LOAD_S)


def _forget(task: str) -> None:
    for metric in _BY_TASK:
        metric.remove_by_labels({"task": task})


def _begin_at_zero() -> None:
    for counter, known in _KNOWN:
        for labels in known:
            counter.labels(*labels)


def samples(metric: Counter | Histogram) -> list[Sample]:
    """A metric's samples as a scrape would show them, other processes' of the same server included."""
    wanted = next(iter(metric.collect())).name
    return [sample for family in exposed.collect() if family.name == wanted for sample in family.samples]


async def _nothing_to_wait_for() -> None:
    pass


_begin_at_zero()
exposed: CollectorRegistry = REGISTRY  # what a scrape tells; in a server of several processes that of all of them
refresh: Callable[[], Awaitable[None]] = _nothing_to_wait_for  # `exposed`, before it is told
TASKS = TaskLabels(50, _forget)  # LENSRACK_METRICS_TASKS


def bind_gauge(gauge: Gauge, read: Callable[[], float]) -> None:
    """The gauge's value is whatever `read` says at the moment of a scrape."""
    gauge.set_function(read)


def build(**facts: Any) -> None:
    BUILD.clear()
    BUILD.labels(**facts).set(1)


def _one(read: Callable[[], Mapping[str, int]], kind: str) -> float:
    return read()[kind]


def gpu_memory(read: Callable[[], Mapping[str, int]], device: str) -> None:
    """`read` says how many bytes of `device` are allocated, reserved, free and there in all."""
    for kind in ("allocated", "reserved", "free", "total"):
        bind_gauge(GPU_BYTES.labels(device, kind), partial(_one, read, kind))
