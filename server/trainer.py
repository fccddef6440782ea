"""STORY 2: one job, from claim to stored bundle.

    claim ─► read the dataset ─► fit ─► put the bundle ─► move `live` ─► finish
      │           each picture and each step asks the pulse: cancelled? superseded? shutting down?
      └─ a pulse thread renews the lease and carries the progress, however long a step takes

A new version reaches the server through the store alone. What a job cannot survive by trying again (a dataset that is
gone, a loss that diverges) fails it at once; anything else gives the attempt back to the job store, which counts.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prompts_store import ANY, Backbone, Bundle, Manifest, Store, Target
from server import __version__
from server.datasets.dataset import Dataset, Example
from server.datasets.dataset_store import DatasetStore
from server.engine import backbone as engine_backbone
from server.errors import ServiceError, Unavailable
from server.jobs.job import FINISHED, Job, State
from server.jobs.store import JobStore, LeaseLost
from server.methods.registry import Registry
from server.training import checkpoint
from server.training.checkpoint import Checkpoint
from server.training.data import Pictures, Source, Splits, hold_out, read_pictures
from server.training.fit import DivergedError, Fitted, Progress, fit
from server.training.recipe import Recipe, resolve

log = logging.getLogger(__name__)

LIVE = "live"
CHECKPOINT_S = 1.0
AWAY_S = 2.0


class JobCancelled(Exception):
    """The job's owner asked to stop it."""


class ShuttingDown(Exception):
    """This worker is asked to stop; the job goes back to the queue."""


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
        max_image_pixels: int,
    ) -> None:
        self._backbone, self._registry = backbone, registry
        self._store, self._jobs, self._datasets = store, jobs, datasets
        self._checkpoints, self._worker = checkpoints, worker
        self._lease_s, self._max_pixels = lease_s, max_image_pixels
        self.stop = threading.Event()

    def run(self, idle_s: float = 0.25) -> None:
        """Claim and work until `stop`. `idle_s` is how often an idle worker looks for a job.

        A job store that is away is waited for; what was under way when it went is taken over when its lease ends.
        """
        while not self.stop.is_set():
            try:
                if not self.work_once():
                    self.stop.wait(idle_s)
            except Unavailable as error:
                log.warning("%s; this worker tries again", error.detail)
                self.stop.wait(AWAY_S)

    def work_once(self) -> bool:
        """Work on one job if there is one."""
        job = self._jobs.claim(self._worker, self._lease_s)
        if job is None:
            return False
        log.info("job %s (attempt %d): %s with %s on %s", job.id, job.attempt, job.task, job.method, job.dataset[:12])
        pulse = _Pulse(self._jobs, job, self._lease_s, self.stop)
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
        except DivergedError as error:
            self._fail(job, "diverged", str(error), retry=False)
        except Exception:
            log.exception("job %s: attempt %d failed", job.id, job.attempt)
            detail = "the attempt failed unexpectedly; the worker's log has the reason"
            self._fail(job, "internal", detail, retry=True)
        self._forget_checkpoint(job)
        return True

    def _forget_checkpoint(self, job: Job) -> None:
        """A job that has ended needs none any more; one that goes on elsewhere does."""
        if self._jobs.get(job.id).state in FINISHED:
            self._checkpoint(job).unlink(missing_ok=True)

    def _work(self, job: Job, pulse: _Pulse) -> None:
        started = time.perf_counter()
        dataset = self._datasets.get(job.dataset)
        method = self._registry.get(job.method)
        recipe = resolve(method.defaults, job.recipe)
        splits = self._read(dataset, recipe, pulse)
        fitted = fit(
            self._backbone,
            method,
            splits,
            len(dataset.labels),
            recipe,
            watch=pulse.watch,
            keep=self._keeper(job),
            resume=checkpoint.read(self._checkpoint(job)),
        )
        pulse.check()
        version = self._publish(job, dataset, recipe, fitted, pulse)
        metrics = {**fitted.metrics, "seconds": round(time.perf_counter() - started, 1)}
        self._jobs.finish(job.id, job.attempt, "succeeded", version=version, metrics=metrics)
        log.info("job %s: %s is %s, validation accuracy %.3f", job.id, job.task, version[:12], metrics["val_accuracy"])

    def _checkpoint(self, job: Job) -> Path:
        return self._checkpoints / f"{job.id}.safetensors"

    def _keeper(self, job: Job) -> Callable[[Checkpoint], None]:
        """Writes a fit's state down, but not more often than every `CHECKPOINT_S`: some epochs take milliseconds."""
        written = time.monotonic()

        def keep(state: Checkpoint) -> None:
            nonlocal written
            if time.monotonic() - written >= CHECKPOINT_S:
                checkpoint.write(self._checkpoint(job), state)
                written = time.monotonic()

        return keep

    def _read(self, dataset: Dataset, recipe: Recipe, pulse: _Pulse) -> Splits:
        train, val, test = (
            self._pictures(dataset, [e for e in dataset.examples if e.split == split], pulse)
            for split in ("train", "val", "test")
        )
        if not len(val):
            train, val = hold_out(train, recipe.validation, recipe.seed)
        return Splits(train, val, test if len(test) else None)

    def _pictures(self, dataset: Dataset, examples: Sequence[Example], pulse: _Pulse) -> Pictures:
        targets = {label: index for index, label in enumerate(dataset.labels)}
        sources = [
            Source(lambda sha256=example.sha256: self._datasets.read(sha256), targets[example.label])  # type: ignore[misc]
            for example in examples
        ]
        return read_pictures(sources, self._backbone.spec.geometry, max_pixels=self._max_pixels, on_picture=pulse.check)

    def _publish(self, job: Job, dataset: Dataset, recipe: Recipe, fitted: Fitted, pulse: _Pulse) -> str:
        """Store the bundle and point `live` at it. The same job makes the same bytes, so a repeated attempt repeats
        nothing; the heartbeat in between is the fence that keeps a superseded worker out."""
        spec = self._backbone.spec
        manifest = Manifest(
            task=job.task,
            method=job.method,
            backbone=Backbone(arch=spec.arch, fingerprint=spec.fingerprint),
            labels=tuple(dataset.labels),
            prompt_lengths=fitted.prompt_lengths,
            preprocess=spec.preprocess,
            metrics=fitted.metrics,
            recipe=recipe.to_json(),
            dataset=dataset.id,
            parent=None,
            created_at=job.created_at,
            lensrack_version=__version__,
        )
        version = self._store.put(Bundle.build(manifest, fitted.params))
        pulse.beat()
        self._store.set_alias(job.task, LIVE, (Target(version, 1.0),), expect=ANY)
        self._jobs.append_event(job.id, job.attempt, "published", {"version": version, "alias": LIVE})
        return version

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


class _Pulse:
    """Renews a job's lease from a thread of its own, and tells the fit when to stop."""

    PERIOD_S = 0.5  # how soon a cancellation is seen; well below any sensible lease

    def __init__(self, jobs: JobStore, job: Job, lease_s: float, stop: threading.Event) -> None:
        self._jobs, self._job, self._lease_s, self._stop = jobs, job, lease_s, stop
        self._progress = Progress()
        self._ended = threading.Event()
        self._cancelled = False
        self._lost: LeaseLost | None = None
        self._thread = threading.Thread(target=self._beat, name=f"pulse-{job.id}", daemon=True)

    def __enter__(self) -> _Pulse:
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

    def watch(self, progress: Progress) -> None:
        """Take a step's progress along; record each epoch as an event."""
        self._progress = progress
        self.check()
        if progress.epoch_ended:
            self._jobs.append_event(self._job.id, self._job.attempt, "epoch", _shown(progress))

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
                log.exception("job %s: heartbeat failed", self._job.id)


def _shown(progress: Progress) -> dict[str, Any]:
    """A progress as the wire's JobProgress."""
    shown = asdict(progress)
    del shown["epoch_ended"]
    return shown
