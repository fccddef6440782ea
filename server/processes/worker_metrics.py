"""How many workers run: known to the process manager, which starts them, and reported by front ends.

The manager writes the figures beside the metrics of the other processes (`server.observability.multiprocess`). They
are not in the common registry of its process, as forks inherit the values there and would report them a second time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from server.observability import metrics
from server.observability.multiprocess import ProcessMetrics

from .child import ForkedProcess

log = logging.getLogger(__name__)

MANAGER: Final = "manager"  # the manager's name among the processes that write metrics


class WorkerMetrics:
    """The metrics of `workers`, as a registry's collector."""

    def __init__(self, workers: Sequence[ForkedProcess], folder: Path) -> None:
        self._workers = workers
        self._written: tuple[int, int] | None = None
        registry = CollectorRegistry()
        registry.register(self)
        self._metrics = ProcessMetrics(folder, MANAGER, registry)

    def write(self) -> None:
        """Write the metrics if they have changed. The manager must go on where the disk is full."""
        figures = self._running(), self._restarts()
        if figures == self._written:
            return
        try:
            self._metrics.write_snapshot()
            self._written = figures
        except OSError as error:
            log.warning("the metrics of workers could not be written: %s", error)

    def collect(self) -> Iterator[Metric]:
        [workers], [restarts] = metrics.WORKERS.describe(), metrics.WORKER_RESTARTS.describe()
        states = GaugeMetricFamily(workers.name, workers.documentation, labels=["state"])
        states.add_metric(["wanted"], len(self._workers))
        states.add_metric(["running"], self._running())
        yield states
        yield CounterMetricFamily(restarts.name, restarts.documentation, value=self._restarts())

    def _running(self) -> int:
        return sum(bool(worker.pid) for worker in self._workers)

    def _restarts(self) -> int:
        return sum(worker.ends for worker in self._workers)


def running_workers(process_metrics: ProcessMetrics) -> int:
    """Return how many workers run, as the manager last wrote it."""
    [workers] = metrics.WORKERS.describe()
    return int(process_metrics.sample(MANAGER, workers.name, state="running"))
