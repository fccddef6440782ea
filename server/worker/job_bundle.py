"""From the result of a fit to the bundle that is stored."""

from __future__ import annotations

from prompts_store import Backbone, Bundle, Manifest, Preprocess
from server import __version__
from server.datasets.dataset import Dataset
from server.engine.spec import Spec
from server.jobs.job import Job
from server.training.fit import FitResult


def build_bundle(
    job: Job, dataset: Dataset, fitted: FitResult, spec: Spec, preprocess: Preprocess, *, parent: str | None = None
) -> Bundle:
    """The bundle of a job's fit. `parent`: the version that was condensed.

    The same job gives the same bytes, so that a repeated attempt stores nothing twice.
    """
    manifest = Manifest(
        task=job.task,
        method=fitted.method.name,
        backbone=Backbone(arch=spec.arch, fingerprint=spec.fingerprint),
        labels=tuple(dataset.labels),
        prompt_lengths=fitted.prompt_lengths,
        preprocess=preprocess,
        metrics=fitted.metrics,
        recipe=fitted.recipe.to_json(),
        dataset=dataset.id,
        parent=parent,
        created_at=job.created_at,
        lensrack_version=__version__,
        pool=fitted.recipe.pool,
    )
    return Bundle.build(manifest, fitted.params)
