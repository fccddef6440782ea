"""The loop of a worker: it claims jobs, runs several in one batch, and reports how each attempt ended.

    claim ─┬─► inputs ─► search, fit, condense ─► evaluate ─► publish ─► version ─┐     fit_job
           └─► comparison, baseline ─► figures ───────────────────────────────────┴─► finish     report_job
      │            at each picture and step: cancelled? superseded? shutting down?
      └─ heartbeat: a thread that renews the lease and reports the progress            heartbeat

    cancelled ─► finish · shutting down ─► release · superseded ─► nothing · any error ─► fail, with or without a retry

A job is a generator that yields requests for the backbone and never runs it, so that several jobs share each forward
and backward (`training.co_batching`). A new version reaches the server through the store alone. An error that another
attempt would meet again (a data set that is gone, a loss that diverges) fails the job at once; any other returns the
job to the queue, and the job store counts the attempts.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Final

from prompts_store import Store, StoreUnavailable
from server.errors import DiskFull, ServiceError, Unavailable
from server.jobs.job import Job
from server.jobs.lifecycle import LEASE_EXPIRED
from server.jobs.store import JobStore, LeaseLost
from server.observability import logs, metrics, tracing
from server.training import co_batching
from server.training.co_batching import Fitting
from server.training.fit import DivergedError
from server.training.low_priority import low_priority
from server.training.parent_version import Parents

from .context import in_separate_context
from .fit_job import FitJob
from .heartbeat import Heartbeat, JobCancelled, ShuttingDown
from .job_inputs import load_inputs
from .publisher import Publisher
from .report_job import ReportJob, is_report
from .resources import Resources
from .retention import Retention

log = logging.getLogger(__name__)

STORE_RETRY_S = 2.0
JOIN_S: Final = 0.5  # how often running jobs look for another one

SUPERSEDED: Final = "superseded"


class Trainer:
    """Runs jobs, at most `at_once` of them in one batch. `stop` ends each at its next step and returns it to the queue.

    `lease_s`: the lease of a claimed job. `keep_s`: how long finished jobs are kept; 0: forever.
    """

    def __init__(
        self,
        resources: Resources,
        store: Store,
        jobs: JobStore,
        *,
        worker: str,
        lease_s: float,
        keep_s: float,
        at_once: int = 1,
        stop: threading.Event | None = None,
    ) -> None:
        self._resources, self._jobs = resources, jobs
        self._worker, self._lease_s, self._at_once = worker, lease_s, at_once
        self._publisher = Publisher(store)
        self._parents = Parents(store, resources.registry, resources.backbone.spec)
        self._retention = Retention(jobs, resources.checkpoints, keep_s)
        self._running = 0
        self._looked_for_jobs = -math.inf
        self.stop = stop or threading.Event()

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self, idle_s: float = 0.25) -> None:
        """Claim and run jobs until `stop`. `idle_s` is how often an idle worker looks for a job.

        While the job store is unavailable, it is tried again. A job that was running then is taken over by any worker
        when its lease ends.
        """
        failing = ""
        while not self.stop.is_set():
            try:
                self._retention.when_due()
                if not self.work_once():
                    self.stop.wait(idle_s)
                failing = ""
            except (Unavailable, DiskFull) as error:
                if error.detail != failing:  # once, however long it lasts
                    log.warning("%s; this worker tries again every %g s", error.detail, STORE_RETRY_S)
                failing = error.detail
                self.stop.wait(STORE_RETRY_S)

    def work_once(self) -> bool:
        """Run a job, and all that join it, until none is running. Returns False where no job was waiting."""
        first = self._claim()
        if first is None:
            return False
        self._looked_for_jobs = -math.inf
        backbone = self._resources.backbone
        with low_priority(backbone.device):
            outcomes = co_batching.run(backbone, [self._attempt(first), *self._joining()], self._joining)
        for outcome in outcomes:
            if outcome is not None:
                raise outcome  # an attempt whose end could not be reported to the job store
        return True

    def _joining(self) -> Iterator[Fitting[None]]:
        """Waiting jobs for which there is room beside the running ones, at most every `JOIN_S`."""
        now = time.monotonic()
        if not 0 < self._running < self._at_once or now - self._looked_for_jobs < JOIN_S or self.stop.is_set():
            return
        self._looked_for_jobs = now
        with suppress(Unavailable, DiskFull):  # the running jobs meet the same error, and report it
            self._retention.when_due()
            while self._running < self._at_once and (job := self._claim()):
                yield self._attempt(job)

    def _claim(self) -> Job | None:
        job = self._jobs.claim(self._worker, self._lease_s)
        if job is not None:
            self._running += 1
            if _is_takeover(job):
                metrics.LEASES_LOST.labels("successor").inc()
        return job

    # --- one attempt --------------------------------------------------------------------------------------------------

    def _attempt(self, job: Job) -> Fitting[None]:
        """The steps of one attempt, whatever its end, with log lines and a trace of its own."""
        return in_separate_context(self._traced(job))

    def _traced(self, job: Job) -> Fitting[None]:
        began = time.monotonic()
        about = {"lensrack.job": job.id, "lensrack.task": job.task, "lensrack.method": job.method}
        with (
            logs.context(logs.JOB_ID, job.id),
            tracing.span("job", {**about, "lensrack.attempt": job.attempt}),
            metrics.WORKER_BUSY.track_inprogress(),
        ):
            outcome = yield from self._outcome(job)
        metrics.ATTEMPTS.labels(outcome).inc()
        metrics.ATTEMPT_S.labels(outcome).observe(time.monotonic() - began)

    def _outcome(self, job: Job) -> Fitting[str]:
        """How the attempt ended: one of the job's final states, `retried`, `released` or `superseded`."""
        log.info("job %s (attempt %d): %s with %s on %s", job.id, job.attempt, job.task, job.method, job.dataset[:12])
        heartbeat = Heartbeat(self._jobs, job, self._lease_s, self.stop)
        try:
            with heartbeat:
                yield from self._work(job, heartbeat)
            outcome = "succeeded"
        except Exception as error:
            outcome = self._end_early(job, error)
        finally:
            self._running -= 1
        if self._retention.is_over(job.id):  # another attempt needs the checkpoint
            self._resources.checkpoints.forget(job.id)
        return outcome

    def _work(self, job: Job, heartbeat: Heartbeat) -> Fitting[None]:
        started = time.perf_counter()
        if is_report(job, self._resources.registry):
            figures = yield from ReportJob(self._resources, job, heartbeat).run()
            self._finish(job, None, {**figures, "published": False}, started)
            return
        version, figures = yield from self._fit_job(job, heartbeat).run()
        self._finish(job, version, figures, started)

    def _fit_job(self, job: Job, heartbeat: Heartbeat) -> FitJob:
        inputs = load_inputs(job, self._resources, self._parents)
        return FitJob(self._resources, self._publisher, inputs, heartbeat)

    # --- the ends of an attempt ---------------------------------------------------------------------------------------
    # A worker that was superseded can change nothing about the job any more: its results are dropped.

    def _finish(self, job: Job, version: str | None, figures: Mapping[str, Any], started: float) -> None:
        seconds = round(time.perf_counter() - started, 1)
        self._jobs.finish(job.id, job.attempt, "succeeded", version=version, metrics={**figures, "seconds": seconds})
        log.info("job %s: %s succeeded after %.0f s: %s", job.id, job.task, seconds, _summary(version, figures))

    def _end_early(self, job: Job, error: Exception) -> str:
        """Report the end of an attempt that raised `error`. Called while the error is being handled."""
        match error:
            case LeaseLost():
                return self._supersede(job)
            case JobCancelled():
                return self._cancel(job)
            case ShuttingDown():
                return self._release(job)
            case ServiceError():
                return self._fail(job, error.code, error.detail, retry=error.status >= 500)
            case StoreUnavailable():
                return self._fail(job, error.code, error.detail, retry=True)
        if isinstance(error, DivergedError):
            code, detail, retry = "diverged", str(error), False
        else:
            log.exception("job %s: attempt %d failed", job.id, job.attempt)
            code, detail, retry = "internal", "the attempt failed unexpectedly; the worker's log has the reason", True
        return self._fail(job, code, detail, retry=retry)

    def _supersede(self, job: Job) -> str:
        log.warning("job %s: attempt %d was superseded; its work is dropped", job.id, job.attempt)
        metrics.LEASES_LOST.labels("holder").inc()
        return SUPERSEDED

    def _cancel(self, job: Job) -> str:
        with suppress(LeaseLost):
            self._jobs.finish(job.id, job.attempt, "cancelled")
            log.info("job %s: cancelled", job.id)
            return "cancelled"
        return SUPERSEDED

    def _release(self, job: Job) -> str:
        with suppress(LeaseLost):
            self._jobs.release(job.id, job.attempt)
            log.info("job %s: back in the queue, this worker shuts down", job.id)
            return "released"
        return SUPERSEDED

    def _fail(self, job: Job, code: str, detail: str, *, retry: bool) -> str:
        """`retry`: for errors that may pass, as of a store or a disk. The job store counts the attempts."""
        with suppress(LeaseLost):
            after = self._jobs.fail_attempt(job.id, job.attempt, {"code": code, "detail": detail}, retry=retry)
            took_s = time.time() - (after.started_at or time.time())
            ended = "failed" if after.finished else f"attempt {job.attempt} failed, and another follows,"
            log.info("job %s: %s %s after %.0f s: %s: %s", job.id, job.task, ended, took_s, code, detail)
            return after.state if after.finished else "retried"
        return SUPERSEDED


def _summary(version: str | None, figures: Mapping[str, Any]) -> str:
    if version is None:
        return "figures only"
    accuracy = figures.get("val_accuracy")  # an imported version that could not be condensed has none
    return f"version {version[:12]}" + ("" if accuracy is None else f", validation accuracy {accuracy:.1%}")


def _is_takeover(job: Job) -> bool:
    """Whether this attempt follows one whose lease expired. Unknown, and False, for a job that keeps an older error."""
    error = job.error or {"code": "", "detail": ""}
    return error["code"] == LEASE_EXPIRED and f"attempt {job.attempt - 1} " in error["detail"]
