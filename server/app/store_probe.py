"""Probes the stores for metrics: do they answer, and how many jobs are in which state.

Probed every few seconds rather than at each scrape: a store that is away answers only after its own time-out, and a
scrape must neither wait for it nor pile up threads that do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from prompts_store import Store, TaskNotFound
from server.jobs.job import STATES
from server.jobs.store import JobStore
from server.observability import metrics

log = logging.getLogger(__name__)

ABSENT_TASK = "0"  # no such task; "not found" is an answer, too


class StoreProbe:
    """Probes every `period_s` seconds. `bundles` must be the store itself, not a cache over it."""

    def __init__(self, bundles: Store, jobs: JobStore, period_s: float) -> None:
        self._bundles, self._jobs, self._period_s = bundles, jobs, period_s
        self._up: dict[str, bool] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="store-probe")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.to_thread(self.look)
            await asyncio.sleep(self._period_s)

    def look(self) -> None:
        """Probe once and set all gauges. Blocks as long as the stores do."""
        self._record("bundles", self._probe_bundles)
        self._record("jobs", self._probe_jobs)

    def _record(self, store: str, look: Callable[[], None]) -> None:
        try:
            look()
            up = True
        except Exception as error:  # any error means that the store does not answer; the probe goes on
            up = False
            if self._up.get(store, True):
                log.error("the store of %s does not answer: %s", store, getattr(error, "detail", repr(error)))
        if up and not self._up.get(store, True):
            log.info("the store of %s answers again", store)
        self._up[store] = up
        metrics.STORE_UP.labels(store).set(up)

    def _probe_bundles(self) -> None:
        with suppress(TaskNotFound):
            self._bundles.versions(ABSENT_TASK)

    def _probe_jobs(self) -> None:
        counts = self._jobs.counts()
        for state in STATES:
            metrics.JOBS.labels(state).set(counts.get(state, 0))
