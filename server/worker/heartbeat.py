"""The heartbeat of a running job: it renews the lease, reports the progress, and says when the job must stop."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from contextvars import copy_context
from dataclasses import asdict, replace
from typing import Any

from server.jobs.job import Job
from server.jobs.store import JobStore, LeaseLost
from server.observability import metrics, tracing
from server.training.progress import Progress, ShareClock

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
        self._progress, self._reported, self._share_clock = Progress(), time.monotonic(), ShareClock()
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
        self._note(progress)
        if progress.trained_images:
            metrics.STEPS.inc()
            metrics.IMAGES.inc(progress.trained_images)
        self.check()
        if progress.epoch_ended:
            self._end_epoch(progress)
        if progress.trial_figures is not None:
            self.emit("trial", {"trial": progress.trial, "trials": progress.trials, **progress.trial_figures})

    def on_preliminary_progress(self, progress: Progress) -> None:
        """The callback of the preliminary fit, whose epochs are no events. Raises what `check` raises."""
        self._note(replace(progress, phase="head", epoch_ended=False, share=None))
        self.check()

    def enter_phase(self, phase: str) -> None:
        """Note a phase in which no fit reports progress, such as `publish`."""
        self._note(replace(self._progress, phase=phase, eta_s=None))

    def _note(self, progress: Progress) -> None:
        if progress.phase != self._progress.phase:  # each has a rate of its own; cached features are there at once
            self._share_clock = ShareClock()
        if progress.eta_s is None and progress.share is not None and progress.phase != "publish":
            progress = replace(progress, eta_s=self._share_clock.eta_s(progress.share))
        self._progress, self._reported = progress, time.monotonic()

    def emit(self, type_: str, data: Mapping[str, Any]) -> None:
        """Add an event to the job. Raises LeaseLost."""
        self._jobs.append_event(self._job.id, self._job.attempt, type_, data)

    def _end_epoch(self, progress: Progress) -> None:
        began, self._epoch_began = self._epoch_began, time.monotonic()
        metrics.EPOCHS.inc()
        tracing.record_span("epoch", self._epoch_began - began, {"lensrack.epoch": progress.epoch})
        self.emit("epoch", _to_wire(progress))

    def beat(self) -> None:
        """Renew the lease and store the progress, which so costs no write of its own. Raises LeaseLost."""
        progress, age_s = self._progress, time.monotonic() - self._reported
        if progress.eta_s is not None:  # it goes on falling while a long step runs
            progress = replace(progress, eta_s=round(max(0.0, progress.eta_s - age_s), 1))
        job = self._jobs.heartbeat(self._job.id, self._job.attempt, self._lease_s, _to_wire(progress))
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
