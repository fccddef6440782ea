"""The inputs of a fit job: the data set, the method, the recipe and the parent that the job names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from prompts_store import Preprocess
from server.datasets.dataset import Dataset
from server.engine.images.decode import Geometry
from server.jobs.job import Job
from server.methods.method import Method
from server.training.condense import require_condensable
from server.training.parent_version import Parent, Parents
from server.training.recipe import Recipe, RecipeRequest, resolve

from .resources import Resources

AUTO: Final = "auto"  # the method of a job that leaves the choice to the search
DEFAULT_METHOD: Final = "vpt_deep"  # where neither the job nor a search chooses


@dataclass(frozen=True)
class JobInputs:
    """A job with everything it names.

    `method` is None where the search chooses among all methods; `recipe` then has only what does not depend on it.
    `preprocess`: the parent's, else the backbone's.
    """

    job: Job
    dataset: Dataset
    method: Method | None
    request: RecipeRequest
    recipe: Recipe
    parent: Parent | None
    preprocess: Preprocess

    @property
    def geometry(self) -> Geometry:
        how = self.preprocess
        return Geometry.of(how.size, how.interpolation, how.crop_pct, how.crop_mode, how.mean)

    @property
    def classes(self) -> int:
        return len(self.dataset.labels)


def load_inputs(job: Job, resources: Resources, parents: Parents) -> JobInputs:
    """Load everything that a job names. Raises ServiceError for what does not exist or does not fit together."""
    dataset, request = resources.datasets.get(job.dataset), RecipeRequest.parse(job.recipe)
    name = DEFAULT_METHOD if job.method == AUTO and request.search != "auto" else job.method
    method = None if name == AUTO else resources.registry.get(name)
    recipe = resolve(method.defaults if method else {}, request.fields)
    if recipe.condense is not None and method is not None:
        require_condensable(method, resources.backbone.spec)
    parent = parents.get(job.task, recipe, tuple(dataset.labels))
    preprocess = parent.preprocess if parent else resources.backbone.spec.preprocess
    return JobInputs(job, dataset, method, request, recipe, parent, preprocess)
