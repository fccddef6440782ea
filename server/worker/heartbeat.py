"""The pulse of a job under way: it renews the lease, carries the progress, and says when the work must stop."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from contextvars import copy_context
from dataclasses import asdict
from typing import Any

from server.jobs.job import Job
from server.jobs.store import JobStore, LeaseLost
from server.observability import metrics, tracing
from server.training.progress import Progress

log = logging.getLogger(__name__)


class JobCancelled(Exception):
    """The job's owner asked to stop it."""


class ShuttingDown(Exception):
    """This worker is asked to stop; the job goes back to the queue."""


class Heartbeat:
    """Renews a job's lease from a thread of its own, and tells the work when to stop."""

    PERIOD_S = 0.5  # how soon a cancellation is seen; well below any sensible lease

    def __init__(self, jobs: JobStore, job: Job, lease_s: float, stop: threading.Event) -> None:
        self._jobs, self._job, self._lease_s, self._stop = jobs, job, lease_s, stop
        self._progress = Progress()
        self._ended = threading.Event()
        self._cancelled = False
        self._lost: LeaseLost | None = None
        self._epoch_began = time.monotonic()
        # in the job's context, so that its log lines name the job
        self._thread = threading.Thread(
            target=copy_context().run, args=(self._beat,), name=f"pulse-{job.id}", daemon=True
        )

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def check(self) -> None:
        """Raise what ends the job early: LeaseLost, JobCancelled, ShuttingDown."""
        if self._lost is not None:
            raise self._lost
        if self._cancelled:
            raise JobCancelled
        if self._stop.is_set():
            raise ShuttingDown

    def wait(self, seconds: float) -> None:
        """Let so much time pass, or raise what `check` raises."""
        self._stop.wait(seconds)
        self.check()

    def watch(self, progress: Progress) -> None:
        """Take a step's progress along; record each epoch and each trial of a search as an event."""
        self._progress = progress
        if progress.learned:
            metrics.STEPS.inc()
            metrics.IMAGES.inc(progress.learned)
        self.check()
        if progress.epoch_ended:
            self._end_epoch(progress)
        if progress.tried is not None:
            self.tell("trial", {"trial": progress.trial, "trials": progress.trials, **progress.tried})

    def check_only(self, progress: Progress) -> None:
        """Watch work that is not the job's own fit: it can be ended, and shows nothing."""
        self.check()

    def tell(self, type_: str, data: Mapping[str, Any]) -> None:
        """Add an event to the job. Raises LeaseLost."""
        self._jobs.append_event(self._job.id, self._job.attempt, type_, data)

    def _end_epoch(self, progress: Progress) -> None:
        began, self._epoch_began = self._epoch_began, time.monotonic()
        metrics.EPOCHS.inc()
        tracing.record_span("epoch", self._epoch_began - began, {"lensrack.epoch": progress.epoch})
        self.tell("epoch", _shown(progress))

    def beat(self) -> None:
        """Renew the lease and tell the progress. Raises LeaseLost."""
        job = self._jobs.heartbeat(self._job.id, self._job.attempt, self._lease_s, _shown(self._progress))
        self._cancelled = job.cancel_requested

    def _beat(self) -> None:
        while not self._ended.wait(min(self.PERIOD_S, self._lease_s / 3)):
            try:
                self.beat()
            except LeaseLost as lost:
                self._lost = lost
                return
            except Exception:  # the store is away for a moment: the lease decides, not this thread
                metrics.HEARTBEATS_FAILED.inc()
                log.exception("job %s: heartbeat failed", self._job.id)


def _shown(progress: Progress) -> dict[str, Any]:
    """A progress as the wire's JobProgress."""
    shown = asdict(progress)
    del shown["epoch_ended"], shown["tried"], shown["learned"]
    return shown
