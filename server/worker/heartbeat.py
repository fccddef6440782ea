"""The heartbeat of a running job: it renews the lease, reports the progress, and says when the job must stop."""

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
    """A client cancelled the job."""


class ShuttingDown(Exception):
    """This worker shuts down; the job goes back to the queue."""


class Heartbeat:
    """Renews a job's lease in a thread, and raises in the job's own thread what must stop it."""

    PERIOD_S = 0.5  # the longest time until a cancellation is noticed; much shorter than a lease

    def __init__(self, jobs: JobStore, job: Job, lease_s: float, stop: threading.Event) -> None:
        self._jobs, self._job, self._lease_s, self._stop = jobs, job, lease_s, stop
        self._progress = Progress()
        self._ended = threading.Event()
        self._cancelled = False
        self._lost: LeaseLost | None = None
        self._epoch_began = time.monotonic()
        # in the job's context, so that its log lines name the job
        self._thread = threading.Thread(
            target=copy_context().run, args=(self._beat_until_end,), name=f"heartbeat-{job.id}", daemon=True
        )

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def check(self) -> None:
        """Raise LeaseLost, JobCancelled or ShuttingDown where the job must stop."""
        if self._lost is not None:
            raise self._lost
        if self._cancelled:
            raise JobCancelled
        if self._stop.is_set():
            raise ShuttingDown

    def wait(self, seconds: float) -> None:
        """Wait, then raise what `check` raises. A shutdown ends the wait."""
        self._stop.wait(seconds)
        self.check()

    def on_progress(self, progress: Progress) -> None:
        """The callback of the job's fit: note the progress, and add an event for each epoch and each trial.

        Raises what `check` raises.
        """
        self._progress = progress
        if progress.trained_images:
            metrics.STEPS.inc()
            metrics.IMAGES.inc(progress.trained_images)
        self.check()
        if progress.epoch_ended:
            self._end_epoch(progress)
        if progress.trial_figures is not None:
            self.emit("trial", {"trial": progress.trial, "trials": progress.trials, **progress.trial_figures})

    def check_only(self, progress: Progress) -> None:
        """The callback of the preliminary fit, whose progress is not reported. Raises what `check` raises."""
        self.check()

    def emit(self, type_: str, data: Mapping[str, Any]) -> None:
        """Add an event to the job. Raises LeaseLost."""
        self._jobs.append_event(self._job.id, self._job.attempt, type_, data)

    def _end_epoch(self, progress: Progress) -> None:
        began, self._epoch_began = self._epoch_began, time.monotonic()
        metrics.EPOCHS.inc()
        tracing.record_span("epoch", self._epoch_began - began, {"lensrack.epoch": progress.epoch})
        self.emit("epoch", _to_wire(progress))

    def beat(self) -> None:
        """Renew the lease and store the progress. Raises LeaseLost."""
        job = self._jobs.heartbeat(self._job.id, self._job.attempt, self._lease_s, _to_wire(self._progress))
        self._cancelled = job.cancel_requested

    def _beat_until_end(self) -> None:
        while not self._ended.wait(min(self.PERIOD_S, self._lease_s / 3)):
            try:
                self.beat()
            except LeaseLost as lost:
                self._lost = lost
                return
            except Exception:  # the store may be back before the lease ends
                metrics.HEARTBEATS_FAILED.inc()
                log.exception("job %s: heartbeat failed", self._job.id)


def _to_wire(progress: Progress) -> dict[str, Any]:
    """The progress as the wire's JobProgress."""
    fields = asdict(progress)
    del fields["epoch_ended"], fields["trial_figures"], fields["trained_images"]
    return fields
