"""A job that leaves only figures: a comparison of several methods, or the fit of a baseline, which is never served."""

from __future__ import annotations

from typing import Any

from server.errors import Unprocessable
from server.jobs.job import Job
from server.methods.baseline import Baseline
from server.methods.registry import COMPARE, Registry
from server.training.baseline_fit import reporting
from server.training.co_batching import Fitting
from server.training.compare import ComparisonInputs, ComparisonRequest, Figures, comparing
from server.training.recipe import RecipeRequest, resolve

from .heartbeat import Heartbeat
from .job_bundle import build_bundle
from .resources import Resources


def is_report(job: Job, registry: Registry) -> bool:
    """Whether a job leaves only figures and no version."""
    return job.method == COMPARE or registry.baseline(job.method) is not None


class ReportJob:
    """One attempt at a comparison or a baseline."""

    def __init__(self, resources: Resources, job: Job, heartbeat: Heartbeat) -> None:
        self._resources, self._job = resources, job
        self._backbone, self._registry = resources.backbone, resources.registry
        self._options: dict[str, Any] = {
            "on_progress": heartbeat.on_progress,
            "on_checkpoint": resources.checkpoints.recorder(job.id),
            "resume": resources.checkpoints.read(job.id),
        }

    def run(self) -> Fitting[Figures]:
        """The job's metrics. Raises whatever ends the attempt: see `trainer`."""
        baseline = self._registry.baseline(self._job.method)
        if baseline is not None:
            return (yield from self._baseline(baseline))
        return {COMPARE: (yield from self._comparison())}

    def _comparison(self) -> Fitting[Figures]:
        dataset, spec = self._resources.datasets.get(self._job.dataset), self._backbone.spec
        fields = self._job.recipe[COMPARE]
        request = ComparisonRequest(tuple(fields["methods"]), tuple(fields["seeds"]), fields["recipe"])
        inputs = ComparisonInputs(
            splits=lambda recipe: self._resources.reader.splits(dataset, recipe),
            labels=tuple(dataset.labels),
            bundle=lambda fitted: build_bundle(self._job, dataset, fitted, spec, spec.preprocess),
            features=self._resources.frozen_features,
        )
        return comparing(self._backbone, self._registry, request, inputs, **self._options)

    def _baseline(self, baseline: Baseline) -> Fitting[Figures]:
        if self._job.publish != "never":
            self._registry.get(baseline.name)  # raises, with the reason why a baseline cannot be published
        dataset = self._resources.datasets.get(self._job.dataset)
        recipe = resolve(baseline.defaults, RecipeRequest.parse(self._job.recipe).fields)
        if recipe.condense is not None or recipe.init != "uniform":
            raise Unprocessable(f"init, condense: expected a method with prompts, got {baseline.name}, which has none")
        result = yield from reporting(
            self._backbone,
            baseline,
            self._resources.reader.splits(dataset, recipe),
            len(dataset.labels),
            recipe,
            frozen=self._resources.frozen_features(),
            **self._options,
        )
        return {**result.metrics, "parameters": result.parameters, "recipe": recipe.to_json()}
