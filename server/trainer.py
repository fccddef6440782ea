"""STORY 2: one job, from claim to stored bundle.

    claim ─► read the dataset ─► fit ─► judge ─► put the bundle, move `live` ─► finish
      │           each picture and each step asks the pulse: cancelled? superseded? shutting down?
      └─ a pulse thread renews the lease and carries the progress, however long a step takes

A new version reaches the server through the store alone. What a job cannot survive by trying again (a dataset that is
gone, a loss that diverges) fails it at once; anything else gives the attempt back to the job store, which counts.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prompts_store import Backbone, Bundle, Manifest, Store, StoreUnavailable
from server import __version__
from server.checkpoints import Checkpoints
from server.datasets.dataset import Dataset
from server.datasets.dataset_store import DatasetStore
from server.engine import backbone as engine_backbone
from server.errors import DiskFull, ServiceError, Unavailable
from server.jobs.job import Job, State
from server.jobs.store import JobStore, LeaseLost
from server.methods.method import Method
from server.methods.registry import Registry
from server.publishing import Judge, Publisher
from server.pulse import JobCancelled, Pulse, ShuttingDown
from server.reading import Reader
from server.retention import Retention
from server.training.data import Splits
from server.training.fit import DivergedError, Fitted, fit
from server.training.judge import judge
from server.training.low_priority import low_priority
from server.training.recipe import Recipe, resolve

log = logging.getLogger(__name__)

AWAY_S = 2.0


@dataclass(frozen=True)
class Case:
    """A job with everything it names: what the steps from reading to publishing need."""

    job: Job
    dataset: Dataset
    method: Method
    recipe: Recipe


class Trainer:
    """Works on one job at a time. `stop` ends the current job at its next step and gives it back."""

    def __init__(
        self,
        backbone: engine_backbone.Backbone,
        registry: Registry,
        store: Store,
        jobs: JobStore,
        datasets: DatasetStore,
        *,
        checkpoints: Path,
        worker: str,
        lease_s: float,
        keep_s: float,
        max_image_pixels: int,
    ) -> None:
        self._backbone, self._registry = backbone, registry
        self._jobs, self._datasets = jobs, datasets
        self._worker, self._lease_s = worker, lease_s
        self._checkpoints = Checkpoints(checkpoints)
        self._retention = Retention(jobs, self._checkpoints, keep_s)
        self._publisher = Publisher(store)
        self._reader = Reader(datasets, backbone.spec.geometry, max_image_pixels)
        self.stop = threading.Event()

    def run(self, idle_s: float = 0.25) -> None:
        """Claim and work until `stop`. `idle_s` is how often an idle worker looks for a job.

        A job store that is away is waited for; what was under way when it went is taken over when its lease ends.
        """
        while not self.stop.is_set():
            try:
                self._retention.when_due()
                if not self.work_once():
                    self.stop.wait(idle_s)
            except (Unavailable, DiskFull) as error:
                log.warning("%s; this worker tries again", error.detail)
                self.stop.wait(AWAY_S)

    def work_once(self) -> bool:
        """Work on one job if there is one."""
        job = self._jobs.claim(self._worker, self._lease_s)
        if job is None:
            return False
        log.info("job %s (attempt %d): %s with %s on %s", job.id, job.attempt, job.task, job.method, job.dataset[:12])
        pulse = Pulse(self._jobs, job, self._lease_s, self.stop)
        try:
            with pulse:
                self._work(job, pulse)
        except LeaseLost:
            log.warning("job %s: attempt %d was superseded; its work is dropped", job.id, job.attempt)
        except JobCancelled:
            self._end(job, "cancelled")
        except ShuttingDown:
            self._give_back(job)
        except ServiceError as error:
            self._fail(job, error.code, error.detail, retry=error.status >= 500)
        except StoreUnavailable as error:
            self._fail(job, error.code, error.detail, retry=True)
        except DivergedError as error:
            self._fail(job, "diverged", str(error), retry=False)
        except Exception:
            log.exception("job %s: attempt %d failed", job.id, job.attempt)
            detail = "the attempt failed unexpectedly; the worker's log has the reason"
            self._fail(job, "internal", detail, retry=True)
        if self._retention.over(job.id):  # a job that goes on elsewhere needs its checkpoint
            self._checkpoints.forget(job.id)
        return True

    # --- the steps ----------------------------------------------------------------------------------------------------

    def _work(self, job: Job, pulse: Pulse) -> None:
        started = time.perf_counter()
        case = self._case(job)
        splits = self._reader.splits(case.dataset, case.recipe, pulse.check)
        fitted = self._fit(case, splits, pulse)
        pulse.check()
        bundle = self._bundle(case, fitted)
        outcome = self._publisher.publish(job, bundle, self._judge(case, splits, pulse), pulse)
        seconds = round(time.perf_counter() - started, 1)
        self._finish(job, bundle.version, {**fitted.metrics, **outcome, "seconds": seconds})

    def _case(self, job: Job) -> Case:
        """Raises ServiceError for what the job names and is not there."""
        dataset, method = self._datasets.get(job.dataset), self._registry.get(job.method)
        return Case(job, dataset, method, resolve(method.defaults, job.recipe))

    def _fit(self, case: Case, splits: Splits, pulse: Pulse) -> Fitted:
        with low_priority(self._backbone.device):
            return fit(
                self._backbone,
                case.method,
                splits,
                len(case.dataset.labels),
                case.recipe,
                watch=pulse.watch,
                keep=self._checkpoints.keeper(case.job.id),
                resume=self._checkpoints.read(case.job.id),
            )

    def _bundle(self, case: Case, fitted: Fitted) -> Bundle:
        """The same job makes the same bytes, so a repeated attempt stores nothing twice."""
        spec = self._backbone.spec
        manifest = Manifest(
            task=case.job.task,
            method=case.job.method,
            backbone=Backbone(arch=spec.arch, fingerprint=spec.fingerprint),
            labels=tuple(case.dataset.labels),
            prompt_lengths=fitted.prompt_lengths,
            preprocess=spec.preprocess,
            metrics=fitted.metrics,
            recipe=case.recipe.to_json(),
            dataset=case.dataset.id,
            parent=None,
            created_at=case.job.created_at,
            lensrack_version=__version__,
        )
        return Bundle.build(manifest, fitted.params)

    def _judge(self, case: Case, splits: Splits, pulse: Pulse) -> Judge:
        """Scores any version on this job's validation pictures."""
        batches = self._reader.validation(case.dataset, case.recipe, splits, pulse.check)
        return lambda bundle: judge(bundle, self._backbone, self._registry, batches)

    def _finish(self, job: Job, version: str, metrics: dict[str, Any]) -> None:
        self._jobs.finish(job.id, job.attempt, "succeeded", version=version, metrics=metrics)
        log.info("job %s: %s is %s, validation accuracy %.3f", job.id, job.task, version[:12], metrics["val_accuracy"])

    # --- the other ends -----------------------------------------------------------------------------------------------
    # A worker that was superseded may say nothing more about the job: whatever it had to say is dropped.

    def _end(self, job: Job, state: State) -> None:
        with suppress(LeaseLost):
            self._jobs.finish(job.id, job.attempt, state)
            log.info("job %s: %s", job.id, state)

    def _give_back(self, job: Job) -> None:
        with suppress(LeaseLost):
            self._jobs.release(job.id, job.attempt)
            log.info("job %s: back in the queue, this worker leaves", job.id)

    def _fail(self, job: Job, code: str, detail: str, *, retry: bool) -> None:
        """`retry`: what failed may be away for a moment only, a store or a disk; the job store counts the attempts."""
        with suppress(LeaseLost):
            self._jobs.fail_attempt(job.id, job.attempt, {"code": code, "detail": detail}, retry=retry)
            log.info("job %s: attempt %d failed: %s: %s", job.id, job.attempt, code, detail)
