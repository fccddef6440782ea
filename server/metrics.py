"""Every metric name once. Labels are few and bounded: no task name becomes a label."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for every series, which no dashboard asks for

REGISTRY = CollectorRegistry()

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

REQUESTS = Counter(
    "lensrack_requests_total",
    "HTTP requests by route template, method and status.",
    ["route", "method", "status"],
    registry=REGISTRY,
)
REQUEST_S = Histogram(
    "lensrack_request_seconds", "HTTP request time by route template.", ["route"], buckets=_SECONDS, registry=REGISTRY
)
ROWS = Counter("lensrack_rows_total", "Rows by how they ended.", ["outcome"], registry=REGISTRY)
QUEUE_ROWS = Gauge("lensrack_queue_rows", "Rows waiting for the engine.", registry=REGISTRY)
QUEUE_S = Histogram("lensrack_queue_seconds", "Time a row waited.", buckets=_SECONDS, registry=REGISTRY)
BATCH_ROWS = Histogram(
    "lensrack_batch_rows", "Rows in a forward.", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256), registry=REGISTRY
)
BATCH_TASKS = Histogram(
    "lensrack_batch_tasks",
    "Distinct lenses in a forward.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    registry=REGISTRY,
)
FORWARD_S = Histogram("lensrack_forward_seconds", "Time of one forward.", buckets=_SECONDS, registry=REGISTRY)
RACK_LENSES = Gauge("lensrack_rack_lenses", "Lenses resident on the device.", registry=REGISTRY)
RACK_LOADS = Counter("lensrack_rack_loads_total", "Lenses made resident.", registry=REGISTRY)
RACK_EVICTIONS = Counter("lensrack_rack_evictions_total", "Lenses evicted to make room.", registry=REGISTRY)
LOAD_S = Histogram("lensrack_rack_load_seconds", "Store to resident lens.", buckets=_SECONDS, registry=REGISTRY)
WORKER_RESTARTS = Counter(
    "lensrack_worker_restarts_total", "Workers that died and were started again.", registry=REGISTRY
)
