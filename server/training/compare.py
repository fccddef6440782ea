"""`compare`: fits several methods on the same pictures with the same seeds, and reports accuracy and cost.

    for each seed, for each method ─► the method's own recipe, with the comparison's fields ─► fit ─► figures
    for each method                ─► a lens of its shape on a rack ─► time of a forward against the plain ViT's

A seed draws the validation pictures where the dataset has none, the initial parameters and every order. Baselines are
fitted like the other methods; they have no lens, and so neither a bundle nor a forward cost. The checkpoint holds the
figures of all finished fits: an interrupted comparison resumes in the fit that was interrupted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import torch

from prompts_store import Bundle
from server.engine.backbone import Backbone
from server.engine.residency import Loaded
from server.methods import pooling
from server.methods.baseline import Baseline
from server.methods.registry import Registry

from . import forward_cost
from .baseline_fit import reporting
from .checkpoint import Checkpoint, OnCheckpoint, ignore_checkpoint
from .co_batching import ExclusiveStep, Fitting
from .data import Splits
from .fit import DivergedError, FitResult, fitting, prompt_lengths, seeded
from .frozen import FrozenFeatures
from .progress import OnProgress, Progress, ignore_progress
from .recipe import Recipe, resolve
from .search import head_only

Figures = dict[str, Any]
SEEDS: Final = (0, 1, 2)


@dataclass(frozen=True)
class ComparisonRequest:
    """The methods and seeds of a comparison. `fields`: recipe fields of all fits; `epochs` does not apply to methods
    that train only a head, whose epochs cost nothing."""

    methods: tuple[str, ...]
    seeds: tuple[int, ...] = SEEDS
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ComparisonInputs:
    """What the fits need. `splits`: the pictures, split as a recipe says; `bundle`: the bundle of a fit, whose size is
    reported; `features`: makes a fresh `FrozenFeatures`, so that the tokens of a fit are freed with it."""

    splits: Callable[[Recipe], Splits]
    labels: tuple[str, ...]
    bundle: Callable[[FitResult], Bundle]
    features: Callable[[], FrozenFeatures]


def comparing(
    backbone: Backbone,
    registry: Registry,
    request: ComparisonRequest,
    inputs: ComparisonInputs,
    *,
    on_progress: OnProgress = ignore_progress,
    on_checkpoint: OnCheckpoint = ignore_checkpoint,
    resume: Checkpoint | None = None,
) -> Fitting[Figures]:
    """Run all fits of a comparison. Returns JSON: `rows`, one per method, and `fits`, one per method and seed.

    Raises Unprocessable (unknown_method, invalid_request) before the first fit. A fit that diverges has no accuracy.
    """
    run = _Comparison(backbone, registry, request, inputs, on_progress, on_checkpoint)
    planned = [(name, run.recipe(name, seed)) for seed in request.seeds for name in request.methods]
    state = resume or Checkpoint()
    run.fits = list(state.trials)
    for name, recipe in planned[len(run.fits) :]:
        run.fits.append((yield from run.fit(name, recipe, state)))
        state = Checkpoint(trials=run.fits)
        on_checkpoint(state)
        on_progress(run.progress(Progress(), figures=run.fits[-1]))
    costs = yield from run.costs()
    return {
        "dataset_split": "test" if all(fit["test_accuracy"] is not None for fit in run.fits) else "val",
        "rows": [run.row(name, costs.get(name)) for name in request.methods],
        "fits": run.fits,
    }


@dataclass
class _Comparison:
    """The state of a comparison. `fits`: the figures of the finished fits, in order."""

    backbone: Backbone
    registry: Registry
    request: ComparisonRequest
    inputs: ComparisonInputs
    on_progress: OnProgress
    on_checkpoint: OnCheckpoint
    fits: list[Figures] = field(default_factory=list)

    def recipe(self, name: str, seed: int) -> Recipe:
        method = self.registry.fittable(name)
        fields = {**self.request.fields, "seed": seed}
        if self.registry.baseline(name) is None and head_only(self.registry.get(name), self.backbone):
            fields.pop("epochs", None)
        return resolve(method.defaults, fields)

    def fit(self, name: str, recipe: Recipe, state: Checkpoint) -> Fitting[Figures]:
        """The figures of one fit, which resumes from `state`."""
        began, cpu = time.perf_counter() - state.spent_s, time.process_time() - state.cpu_s

        def on_checkpoint(now: Checkpoint) -> None:
            spent_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
            self.on_checkpoint(replace(now, trials=self.fits, spent_s=spent_s, cpu_s=cpu_s))

        about = {"method": name, "seed": recipe.seed, "lr": recipe.lr, "epochs": recipe.epochs}
        try:
            figures = yield from self._fit_figures(name, recipe, on_checkpoint, state)
        except DivergedError:
            figures = dict.fromkeys(_FIT_FIGURES)
        spent_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
        return {**about, **figures, "fit_s": round(spent_s, 1), "cpu_s": round(cpu_s, 1)}

    def _fit_figures(
        self, name: str, recipe: Recipe, on_checkpoint: OnCheckpoint, state: Checkpoint
    ) -> Fitting[Figures]:
        splits, labels = self.inputs.splits(recipe), len(self.inputs.labels)
        baseline = self.registry.baseline(name)
        options: dict[str, Any] = {
            "on_progress": lambda progress: self.on_progress(self.progress(progress)),
            "on_checkpoint": on_checkpoint,
            "resume": state,
            "frozen": self.inputs.features(),
            "each_epoch": recipe.patience > 0,
        }
        if baseline is not None:
            result = yield from reporting(self.backbone, baseline, splits, labels, recipe, **options)
            return _figures(result.metrics, result.parameters, None)
        fitted = yield from fitting(self.backbone, self.registry.get(name), splits, labels, recipe, **options)
        parameters = sum(value.size for value in fitted.params.values())
        return _figures(fitted.metrics, parameters, len(self.inputs.bundle(fitted).data))

    def progress(self, progress: Progress, figures: Figures | None = None) -> Progress:
        """The progress of a fit as that of the comparison; `figures` are those of a fit that has just ended."""
        total = len(self.request.methods) * len(self.request.seeds)
        number = min(len(self.fits) + (figures is None), total)
        return progress.as_trial("compare", number, total, figures)

    def costs(self) -> Fitting[dict[str, forward_cost.Cost]]:
        """The forward cost of every servable method, by name."""
        costs: dict[str, forward_cost.Cost] = {}
        for name in self.request.methods:
            if self.registry.baseline(name) is None:
                loaded = self._lens_like(name)
                tick = partial(self.on_progress, self.progress(Progress()))
                work = partial(forward_cost.measure, self.backbone, loaded, tick)
                forward, lens_bytes = (yield ExclusiveStep(partial(_as_tensor, work))).tolist()
                costs[name] = forward_cost.Cost(forward, round(lens_bytes))
        return costs

    def _lens_like(self, name: str) -> Loaded:
        """A lens of the same shape as the fitted ones, with random parameters: its cost does not depend on them."""
        method, recipe = self.registry.get(name), self.recipe(name, self.request.seeds[0])
        spec = self.backbone.spec
        lengths = prompt_lengths(spec, method, recipe)
        params = method.init(spec, lengths, len(self.inputs.labels), seeded(recipe.seed, 0))
        with torch.inference_mode():
            cast = {key: value.to(self.backbone.device, self.backbone.dtype) for key, value in params.items()}
            lens = pooling.lower_with_pool(method, self.backbone, cast, lengths, recipe.pool)
        how = spec.preprocess
        return Loaded(lens, self.inputs.labels, spec.geometry, how.mean, how.std)

    def row(self, name: str, cost: forward_cost.Cost | None) -> Figures:
        """The figures of a method over all seeds."""
        fits = [fit for fit in self.fits if fit["method"] == name]
        baseline: Baseline | None = self.registry.baseline(name)
        return {
            "method": name,
            "servable": baseline is None,
            "fits": len(fits),
            "diverged": sum(fit["val_accuracy"] is None for fit in fits),
            **_spread("val_accuracy", fits),
            **_spread("test_accuracy", fits),
            "parameters": _first("parameters", fits),
            "bundle_bytes": _first("bundle_bytes", fits),
            "lens_bytes": cost and cost.lens_bytes,
            "forward_cost": cost and cost.forward,
            **{name: round(statistics.mean(fit[name] for fit in fits), 1) for name in ("fit_s", "cpu_s")},
        }


def _as_tensor(work: Callable[[], forward_cost.Cost]) -> torch.Tensor:
    return torch.tensor(work(), dtype=torch.float64)


_FIT_FIGURES: Final = ("val_accuracy", "test_accuracy", "parameters", "bundle_bytes", "forward_passes")


def _figures(metrics: Mapping[str, Any], parameters: int, bundle_bytes: int | None) -> Figures:
    return {
        "val_accuracy": metrics["val_accuracy"],
        "test_accuracy": metrics.get("test_accuracy"),
        "parameters": parameters,
        "bundle_bytes": bundle_bytes,
        "forward_passes": metrics["forward_passes"],
    }


def _spread(name: str, fits: Sequence[Figures]) -> Figures:
    """Mean and standard deviation over the fits that did not diverge; the deviation of a single fit is None."""
    values = [fit[name] for fit in fits if fit[name] is not None]
    mean = round(statistics.mean(values), 6) if values else None
    return {name: mean, f"{name}_std": round(statistics.stdev(values), 6) if len(values) > 1 else None}


def _first(name: str, fits: Sequence[Figures]) -> Any:
    return next((fit[name] for fit in fits if fit[name] is not None), None)
