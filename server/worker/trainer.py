"""STORY 2: one job, from claim to stored bundle.

    claim ─► read the dataset ─► search, fit ─► judge ─► put the bundle, move `live` ─► finish
                        │ a comparison, a baseline ─► only the figures ──────────────────▲
      │           each picture and each step asks the pulse: cancelled? superseded? shutting down?
      └─ a pulse thread renews the lease and carries the progress, however long a step takes

A job is a generator that asks for the backbone and never runs it, so several may share each forward and backward
(`training.together`). A new version reaches the server through the store alone. What a job cannot survive by trying
again (a dataset that is gone, a loss that diverges) fails it at once; anything else gives the attempt back to the job
store, which counts.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prompts_store import Backbone, Bundle, Manifest, Preprocess, Store, StoreUnavailable
from server import __version__
from server.datasets.dataset import Dataset
from server.datasets.dataset_store import DatasetStore
from server.engine import backbone as engine_backbone
from server.engine.images.decode import Geometry
from server.errors import DiskFull, ServiceError, Unavailable, Unprocessable
from server.jobs.job import Job, State
from server.jobs.lifecycle import SILENT
from server.jobs.store import JobStore, LeaseLost
from server.methods.baseline import Baseline
from server.methods.method import Method
from server.methods.registry import COMPARE, Registry
from server.observability import logs, metrics, tracing
from server.training import co_batching
from server.training.baseline_fit import reporting
from server.training.caches.feature_cache import Features
from server.training.co_batching import Fitting
from server.training.compare import ComparisonInputs, ComparisonRequest, comparing
from server.training.condense import condensing, refuse, under_way
from server.training.data import Splits
from server.training.evaluate import evaluate
from server.training.fit import DivergedError, Fitted, fitting
from server.training.frozen import FrozenFeatures
from server.training.low_priority import low_priority
from server.training.parent_version import Parent, Parents
from server.training.recipe import Recipe, RecipeRequest, resolve
from server.training.search import searching
from server.training.stored_images import Decoder

from .checkpoints import Checkpoints
from .context import in_separate_context
from .dataset_reader import DatasetReader
from .heartbeat import Heartbeat, JobCancelled, ShuttingDown
from .publisher import Evaluate, Outcome, Publisher
from .retention import Retention

log = logging.getLogger(__name__)

AWAY_S = 2.0
JOIN_S = 0.5  # how often a batch of jobs looks for another one

AUTO = "auto"  # the method of a job that leaves the choice to a search
UNSEARCHED = "vpt_deep"  # what is fitted where neither the job nor a search has chosen
PRELIMINARY = "linear"
SUPERSEDED = "superseded"


@dataclass(frozen=True)
class JobInputs:
    """A job with everything it names: what the steps from reading to publishing need.

    `method` is None where a search chooses among all; `recipe` then tells what does not depend on it.
    """

    job: Job
    dataset: Dataset
    method: Method | None
    wanted: RecipeRequest
    recipe: Recipe
    parent: Parent | None
    preprocess: Preprocess


@dataclass(frozen=True)
class Resources:
    """What a worker's fits share: the backbone, the methods, where pictures are decoded and what is remembered."""

    backbone: engine_backbone.Backbone
    registry: Registry
    decoder: Decoder
    features: Features
    checkpoints: Path


class Trainer:
    """Works on jobs, `at_once` of them in one batch. `stop` ends each at its next step and gives it back."""

    def __init__(
        self,
        means: Resources,
        store: Store,
        jobs: JobStore,
        datasets: DatasetStore,
        *,
        worker: str,
        lease_s: float,
        keep_s: float,
        at_once: int = 1,
    ) -> None:
        self._backbone, self._registry = means.backbone, means.registry
        self._jobs, self._datasets = jobs, datasets
        self._worker, self._lease_s, self._at_once = worker, lease_s, at_once
        self._checkpoints = Checkpoints(means.checkpoints)
        self._retention = Retention(jobs, self._checkpoints, keep_s)
        self._publisher = Publisher(store)
        self._parents = Parents(store, means.registry, means.backbone.spec)
        self._reader, self._features = DatasetReader(means.decoder), means.features
        self._under_way = 0
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
        """Work on a job, and on those that there is room for beside it, until none is under way; false without any."""
        first = self._claim()
        if first is None:
            return False
        looked = -math.inf

        def joining() -> Iterator[Fitting[None]]:
            nonlocal looked
            if 0 < self._under_way < self._at_once and time.monotonic() - looked >= JOIN_S and not self.stop.is_set():
                looked = time.monotonic()
                with suppress(Unavailable, DiskFull):  # whoever is under way finds out for himself
                    self._retention.when_due()
                    while self._under_way < self._at_once and (job := self._claim()):
                        yield self._worked(job)

        with low_priority(self._backbone.device):
            outcomes = co_batching.run(self._backbone, [self._worked(first), *joining()], joining)
        for outcome in outcomes:
            if outcome is not None:
                raise outcome  # not a job's failure, which was told to the store: the store itself did not hear it
        return True

    def _claim(self) -> Job | None:
        job = self._jobs.claim(self._worker, self._lease_s)
        if job is not None:
            self._under_way += 1
            if _taken_over(job):
                metrics.LEASES_LOST.labels("successor").inc()
        return job

    def _worked(self, job: Job) -> Fitting[None]:
        """One job to its end, whatever that is, with log lines and a trace of its own."""
        return in_separate_context(self._attempt(job))

    def _attempt(self, job: Job) -> Fitting[None]:
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
        """How the attempt ended: a state of the job's, `retried`, `released` or `superseded`."""
        log.info("job %s (attempt %d): %s with %s on %s", job.id, job.attempt, job.task, job.method, job.dataset[:12])
        pulse = Heartbeat(self._jobs, job, self._lease_s, self.stop)
        try:
            with pulse:
                yield from self._work(job, pulse)
            outcome = "succeeded"
        except LeaseLost:
            log.warning("job %s: attempt %d was superseded; its work is dropped", job.id, job.attempt)
            metrics.LEASES_LOST.labels("holder").inc()
            outcome = SUPERSEDED
        except JobCancelled:
            outcome = self._end(job, "cancelled")
        except ShuttingDown:
            outcome = self._give_back(job)
        except ServiceError as error:
            outcome = self._fail(job, error.code, error.detail, retry=error.status >= 500)
        except StoreUnavailable as error:
            outcome = self._fail(job, error.code, error.detail, retry=True)
        except DivergedError as error:
            outcome = self._fail(job, "diverged", str(error), retry=False)
        except Exception:
            log.exception("job %s: attempt %d failed", job.id, job.attempt)
            detail = "the attempt failed unexpectedly; the worker's log has the reason"
            outcome = self._fail(job, "internal", detail, retry=True)
        finally:
            self._under_way -= 1
        if self._retention.over(job.id):  # a job that goes on elsewhere needs its checkpoint
            self._checkpoints.forget(job.id)
        return outcome

    # --- the steps ----------------------------------------------------------------------------------------------------

    def _work(self, job: Job, pulse: Heartbeat) -> Fitting[None]:
        started = time.perf_counter()
        if job.method == COMPARE:
            found = yield from self._compared(job, pulse)
            self._tell(job, found, started)
            return
        baseline = self._registry.baseline(job.method)
        if baseline is not None:
            found = yield from self._reported(job, baseline, pulse)
            self._tell(job, found, started)
            return
        case = self._case(job)
        how = case.preprocess
        geometry = Geometry.of(how.size, how.interpolation, how.crop_pct, how.crop_mode, how.mean)
        splits = self._reader.splits(case.dataset, case.recipe, geometry)
        frozen = FrozenFeatures(self._backbone, self._features, how)
        if case.wanted.search == "quick":
            yield from self._preliminary(case, splits, frozen, pulse)
        fitted = yield from self._fitted(case, splits, frozen, pulse)
        pulse.check()
        version, outcome = self._publish(case, fitted, pulse)
        seconds = round(time.perf_counter() - started, 1)
        self._finish(job, version, {**fitted.metrics, **outcome, "seconds": seconds})

    def _compared(self, job: Job, pulse: Heartbeat) -> Fitting[dict[str, Any]]:
        """The table of a comparison; nothing is stored. A finished fit is not fitted again by the next attempt."""
        dataset = self._datasets.get(job.dataset)
        asked = job.recipe[COMPARE]
        nothing, own = RecipeRequest.of({}), self._backbone.spec.preprocess
        wish = ComparisonRequest(tuple(asked["methods"]), tuple(asked["seeds"]), asked["recipe"])
        material = ComparisonInputs(
            splits=lambda recipe: self._reader.splits(dataset, recipe),
            labels=tuple(dataset.labels),
            bundle=lambda fitted: self._bundle(
                JobInputs(job, dataset, None, nothing, fitted.recipe, None, own), fitted
            ),
            features=lambda: FrozenFeatures(self._backbone, self._features),
        )
        keep, resume = self._checkpoints.keeper(job.id), self._checkpoints.read(job.id)
        return {
            COMPARE: (
                yield from comparing(
                    self._backbone, self._registry, wish, material, watch=pulse.watch, keep=keep, resume=resume
                )
            )
        }

    def _reported(self, job: Job, baseline: Baseline, pulse: Heartbeat) -> Fitting[dict[str, Any]]:
        """The figures of a baseline, which is not stored."""
        if job.publish != "never":
            self._registry.get(baseline.name)  # says why that cannot be
        dataset, wanted = self._datasets.get(job.dataset), RecipeRequest.of(job.recipe)
        recipe = resolve(baseline.defaults, wanted.fields)
        if recipe.condense is not None or recipe.init != "uniform":
            raise Unprocessable(f"init, condense: expected a method with prompts, got {baseline.name}, which has none")
        found = yield from reporting(
            self._backbone,
            baseline,
            self._reader.splits(dataset, recipe),
            len(dataset.labels),
            recipe,
            watch=pulse.watch,
            keep=self._checkpoints.keeper(job.id),
            resume=self._checkpoints.read(job.id),
            frozen=FrozenFeatures(self._backbone, self._features),
        )
        return {**found.metrics, "parameters": found.parameters, "recipe": recipe.to_json()}

    def _tell(self, job: Job, found: dict[str, Any], started: float) -> None:
        """The end of a job that leaves no version."""
        seconds = round(time.perf_counter() - started, 1)
        self._jobs.finish(job.id, job.attempt, "succeeded", metrics={**found, "published": False, "seconds": seconds})
        log.info("job %s: %s with %s is told", job.id, job.task, job.method)

    def _case(self, job: Job) -> JobInputs:
        """Raises ServiceError for what the job names and is not there."""
        dataset, wanted = self._datasets.get(job.dataset), RecipeRequest.of(job.recipe)
        name = UNSEARCHED if job.method == AUTO and wanted.search != "auto" else job.method
        method = None if name == AUTO else self._registry.get(name)
        recipe = resolve(method.defaults if method else {}, wanted.fields)
        if recipe.condense is not None and method is not None:
            refuse(method, self._backbone.spec)
        parent = self._parents.get(job.task, recipe, tuple(dataset.labels))
        preprocess = parent.preprocess if parent else self._backbone.spec.preprocess
        return JobInputs(job, dataset, method, wanted, recipe, parent, preprocess)

    def _preliminary(self, case: JobInputs, splits: Splits, frozen: FrozenFeatures, pulse: Heartbeat) -> Fitting[None]:
        """A head on the frozen features, in seconds: the task answers while the full fit goes on."""
        method = self._registry.get(PRELIMINARY)
        if method is case.method:
            return
        recipe = resolve(method.defaults, {"seed": case.recipe.seed, "validation": case.recipe.validation})
        classes = len(case.dataset.labels)
        found = yield from fitting(
            self._backbone, method, splits, classes, recipe, watch=pulse.check_only, frozen=frozen
        )
        self._publish(case, replace(found, metrics={**found.metrics, "preliminary": True}), pulse)

    def _fitted(self, case: JobInputs, splits: Splits, frozen: FrozenFeatures, pulse: Heartbeat) -> Fitting[Fitted]:
        """What the job fits, or begins with, and what is left of it where it is to be condensed."""
        resume, classes = self._checkpoints.read(case.job.id), len(case.dataset.labels)
        rest: dict[str, Any] = {"watch": pulse.watch, "keep": self._checkpoints.keeper(case.job.id)}
        rest |= {"resume": resume, "frozen": frozen}
        found = case.parent.fitted if case.parent else under_way(resume, self._registry.get)
        if found is None:
            found = yield from self._fresh(case, splits, classes, rest)
        if found.recipe.condense is None:
            return found
        return (yield from condensing(self._backbone, found, splits, classes, **rest))

    def _fresh(self, case: JobInputs, splits: Splits, classes: int, rest: dict[str, Any]) -> Fitting[Fitted]:
        if case.wanted.search == "auto" or case.method is None:  # the second says the same to the type checker
            methods = self._registry.searched if case.method is None else [case.method]
            fields, budget = case.wanted.fields, case.wanted.budget
            return searching(self._backbone, methods, splits, classes, fields, budget=budget, **rest)
        return fitting(self._backbone, case.method, splits, classes, case.recipe, **rest)

    def _publish(self, case: JobInputs, fitted: Fitted, pulse: Heartbeat) -> tuple[str, Outcome]:
        """The version, and what became of it: that which was to be condensed, where it could not be."""
        if case.parent is not None and fitted.metrics["condense"]["kept"] is None:
            pulse.tell("kept", {"version": case.parent.version, "reason": "not_condensed"})
            return case.parent.version, {"published": False}
        bundle = self._bundle(case, fitted)
        return bundle.version, self._publisher.publish(case.job, bundle, self._judge(case, pulse), pulse)

    def _judge(self, case: JobInputs, pulse: Heartbeat) -> Evaluate:
        """Scores any version on this job's validation pictures."""
        batches = self._reader.validation(case.dataset, case.recipe, pulse.check)
        return lambda bundle: evaluate(bundle, self._backbone, self._registry, batches)

    def _bundle(self, case: JobInputs, fitted: Fitted) -> Bundle:
        """The same job makes the same bytes, so a repeated attempt stores nothing twice."""
        spec = self._backbone.spec
        manifest = Manifest(
            task=case.job.task,
            method=fitted.method.name,
            backbone=Backbone(arch=spec.arch, fingerprint=spec.fingerprint),
            labels=tuple(case.dataset.labels),
            prompt_lengths=fitted.prompt_lengths,
            preprocess=case.preprocess,
            metrics=fitted.metrics,
            recipe=fitted.recipe.to_json(),
            dataset=case.dataset.id,
            parent=case.parent.version if case.parent else None,
            created_at=case.job.created_at,
            lensrack_version=__version__,
            pool=fitted.recipe.pool,
        )
        return Bundle.build(manifest, fitted.params)

    def _finish(self, job: Job, version: str, metrics: dict[str, Any]) -> None:
        self._jobs.finish(job.id, job.attempt, "succeeded", version=version, metrics=metrics)
        log.info("job %s: %s is %s, validation accuracy %.3f", job.id, job.task, version[:12], metrics["val_accuracy"])

    # --- the other ends -----------------------------------------------------------------------------------------------
    # A worker that was superseded may say nothing more about the job: whatever it had to say is dropped.

    def _end(self, job: Job, state: State) -> str:
        with suppress(LeaseLost):
            self._jobs.finish(job.id, job.attempt, state)
            log.info("job %s: %s", job.id, state)
            return state
        return SUPERSEDED

    def _give_back(self, job: Job) -> str:
        with suppress(LeaseLost):
            self._jobs.release(job.id, job.attempt)
            log.info("job %s: back in the queue, this worker leaves", job.id)
            return "released"
        return SUPERSEDED

    def _fail(self, job: Job, code: str, detail: str, *, retry: bool) -> str:
        """`retry`: what failed may be away for a moment only, a store or a disk; the job store counts the attempts."""
        with suppress(LeaseLost):
            after = self._jobs.fail_attempt(job.id, job.attempt, {"code": code, "detail": detail}, retry=retry)
            log.info("job %s: attempt %d failed: %s: %s", job.id, job.attempt, code, detail)
            return after.state if after.finished else "retried"
        return SUPERSEDED


def _taken_over(job: Job) -> bool:
    """Whether this attempt is there because the one before fell silent. A job that had told of an error before keeps
    that one, so of such a job it is not known."""
    error = job.error or {"code": "", "detail": ""}
    return error["code"] == SILENT and f"attempt {job.attempt - 1} " in error["detail"]
