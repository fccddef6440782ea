"""A job that leaves a version.

inputs ─► search or fit ─────────► condense ─► bundle ─► store ─► `live` moves, as the job's policy says
    │  └─ or the parent version ─────▲
    ├─ quick: a head on frozen features is published first
    └─ auto:  so is the search's best head, unless a better version is live
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from prompts_store import Bundle
from server.jobs.job import Job
from server.training.co_batching import Fitting
from server.training.condense import condensing, resumed_parent
from server.training.evaluate import Score, evaluate
from server.training.fit import FitResult, fitting
from server.training.recipe import resolve
from server.training.search import searching

from .heartbeat import Heartbeat
from .job_bundle import build_bundle
from .job_inputs import JobInputs
from .publisher import Outcome, Publisher
from .resources import Resources

PRELIMINARY_METHOD: Final = "linear"


class FitJob:
    """One attempt at a job that leaves a version: search, fit, condense, publish."""

    def __init__(self, resources: Resources, publisher: Publisher, inputs: JobInputs, heartbeat: Heartbeat) -> None:
        self._backbone, self._registry, self._reader = resources.backbone, resources.registry, resources.reader
        self._checkpoints, self._publisher = resources.checkpoints, publisher
        self._inputs, self._heartbeat = inputs, heartbeat
        self._splits = resources.reader.splits(inputs.dataset, inputs.recipe, inputs.geometry)
        self._frozen = resources.frozen_features(inputs.preprocess)

    def run(self) -> Fitting[tuple[str, dict[str, Any]]]:
        """The job's version and its metrics. Raises whatever ends the attempt: see `trainer`."""
        if self._inputs.request.search == "quick":
            yield from self._publish_quick_head()
        fitted = yield from self._condensed()
        self._heartbeat.check()
        self._heartbeat.enter_phase("publish")
        version, outcome = self._publish(fitted)
        return version, {**fitted.metrics, **outcome}

    def evaluate(self, bundle: Bundle) -> Score:
        """The score of any version on this job's validation pictures."""
        batches = self._reader.validation(self._inputs.dataset, self._inputs.recipe, self._heartbeat.check)
        return evaluate(bundle, self._backbone, self._registry, batches)

    # --- the steps ----------------------------------------------------------------------------------------------------

    def _publish_quick_head(self) -> Fitting[None]:
        """Fit and publish a head on frozen features, in seconds, so that the task answers during the full fit."""
        method = self._registry.get(PRELIMINARY_METHOD)
        if method is self._inputs.method:
            return
        full = self._inputs.recipe
        recipe = resolve(method.defaults, {"seed": full.seed, "validation": full.validation})
        result = yield from fitting(
            self._backbone,
            method,
            self._splits,
            self._inputs.classes,
            recipe,
            on_progress=self._heartbeat.on_preliminary_progress,
            frozen=self._frozen,
        )
        self._publish_preliminary(result, self._inputs.job)

    def _publish_search_head(self, head: FitResult) -> None:
        """Publish the best head of a search. Nobody asked for it, so it does not replace a live version that is
        better."""
        job = self._inputs.job
        self._publish_preliminary(head, replace(job, publish="if_better") if job.publish == "always" else job)

    def _publish_preliminary(self, head: FitResult, job: Job) -> None:
        inputs = self._inputs
        marked = replace(head, metrics={**head.metrics, "preliminary": True})
        bundle = build_bundle(inputs.job, inputs.dataset, marked, self._backbone.spec, inputs.preprocess)
        self._publisher.publish(job, bundle, self.evaluate, self._heartbeat)

    def _condensed(self) -> Fitting[FitResult]:
        """The result of the fit, condensed where the recipe says so. A condensation begins with the parent version, or
        with the job's own fit, which an interrupted condensation has in its checkpoint."""
        inputs, resume = self._inputs, self._checkpoints.read(self._inputs.job.id)
        options: dict[str, Any] = {
            "on_progress": self._heartbeat.on_progress,
            "on_checkpoint": self._checkpoints.recorder(inputs.job.id),
            "resume": resume,
            "frozen": self._frozen,
        }
        result = inputs.parent.fitted if inputs.parent else resumed_parent(resume, self._registry.get)
        if result is None:
            result = yield from self._fit(options)
        if result.recipe.condense is None:
            return result
        return (yield from condensing(self._backbone, result, self._splits, inputs.classes, **options))

    def _fit(self, options: dict[str, Any]) -> Fitting[FitResult]:
        """The full fit, after a search where the job asks for one."""
        inputs, request = self._inputs, self._inputs.request
        if inputs.method is not None and request.search != "auto":
            return fitting(self._backbone, inputs.method, self._splits, inputs.classes, inputs.recipe, **options)
        methods = self._registry.searched if inputs.method is None else [inputs.method]
        options = {**options, "budget": request.budget}
        if inputs.method is None and request.search == "auto":
            options["on_head"] = self._publish_search_head
        return searching(self._backbone, methods, self._splits, inputs.classes, request.fields, **options)

    def _publish(self, fitted: FitResult) -> tuple[str, Outcome]:
        """The version, and what the job's metrics say about publishing it. The parent version where that could not be
        condensed."""
        inputs = self._inputs
        if inputs.parent is not None and fitted.metrics["condense"]["kept"] is None:
            self._heartbeat.emit("kept", {"version": inputs.parent.version, "reason": "not_condensed"})
            return inputs.parent.version, {"published": False}
        parent = inputs.parent.version if inputs.parent else None
        bundle = build_bundle(inputs.job, inputs.dataset, fitted, self._backbone.spec, inputs.preprocess, parent=parent)
        return bundle.version, self._publisher.publish(inputs.job, bundle, self.evaluate, self._heartbeat)
