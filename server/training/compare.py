"""`compare`: several methods on the same pictures, each with the same seeds, and what they reach and cost.

    for each seed, for each method ─► the method's own recipe, with what the comparison fixes ─► fit ─► figures
    for each method                ─► a lens of its shape on a rack ─► time of a forward against the plain ViT's

A seed draws the validation pictures where the dataset has none, the initial parameters and every order. Baselines are
fitted like the others; they have no lens, so they have no bundle and no place in the forward either. The outcome of
every finished fit is part of the checkpoint: what was interrupted goes on with the fit that it was in.
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
from .checkpoint import Checkpoint
from .co_batching import ExclusiveStep, Fitting
from .data import Splits
from .fit import DivergedError, Fitted, Keeper, fitting, nowhere, prompt_lengths, seeded
from .frozen import FrozenFeatures
from .progress import Progress, Watcher, nobody
from .recipe import Recipe, resolve
from .search import head_only

Figures = dict[str, Any]
SEEDS: Final = (0, 1, 2)


@dataclass(frozen=True)
class ComparisonRequest:
    """What is compared. `fields`: recipe fields that hold for all; a number of epochs not for heads alone, whose own
    cost nothing."""

    methods: tuple[str, ...]
    seeds: tuple[int, ...] = SEEDS
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ComparisonInputs:
    """What the fits stand on. `splits`: the pictures as a recipe asks for them; `bundle`: what a fit would be stored
    as; `features`: a fresh memory of the backbone's, so that no fit's tokens outlive it."""

    splits: Callable[[Recipe], Splits]
    labels: tuple[str, ...]
    bundle: Callable[[Fitted], Bundle]
    features: Callable[[], FrozenFeatures]


def comparing(
    backbone: Backbone,
    registry: Registry,
    wish: ComparisonRequest,
    material: ComparisonInputs,
    *,
    watch: Watcher = nobody,
    keep: Keeper = nowhere,
    resume: Checkpoint | None = None,
) -> Fitting[Figures]:
    """Run all fits of a comparison. Returns JSON: `rows`, one a method, and `fits`, one a method and seed.

    Raises Unprocessable (unknown_method, invalid_request) before the first fit. A fit that diverges has no accuracy.
    """
    run = _Comparison(backbone, registry, wish, material, watch, keep)
    asked = [(name, run.recipe(name, seed)) for seed in wish.seeds for name in wish.methods]
    state = resume or Checkpoint()
    run.fits = list(state.trials)
    for name, recipe in asked[len(run.fits) :]:
        run.fits.append((yield from run.fit(name, recipe, state)))
        state = Checkpoint(trials=run.fits)
        keep(state)
        watch(run.progress(Progress(), tried=run.fits[-1]))
    costs = yield from run.costs()
    return {
        "dataset_split": "test" if all(one["test_accuracy"] is not None for one in run.fits) else "val",
        "rows": [run.row(name, costs.get(name)) for name in wish.methods],
        "fits": run.fits,
    }


@dataclass
class _Comparison:
    """One comparison under way. `fits`: what is known so far, in the order in which it is fitted."""

    backbone: Backbone
    registry: Registry
    wish: ComparisonRequest
    material: ComparisonInputs
    watch: Watcher
    keep: Keeper
    fits: list[Figures] = field(default_factory=list)

    def recipe(self, name: str, seed: int) -> Recipe:
        method = self.registry.fittable(name)
        fields = {**self.wish.fields, "seed": seed}
        if self.registry.baseline(name) is None and head_only(self.registry.get(name), self.backbone):
            fields.pop("epochs", None)
        return resolve(method.defaults, fields)

    def fit(self, name: str, recipe: Recipe, state: Checkpoint) -> Fitting[Figures]:
        """`state`: where the first of them goes on."""
        began, cpu = time.perf_counter() - state.spent_s, time.process_time() - state.cpu_s

        def keep(now: Checkpoint) -> None:
            spent_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
            self.keep(replace(now, trials=self.fits, spent_s=spent_s, cpu_s=cpu_s))

        told = {"method": name, "seed": recipe.seed, "lr": recipe.lr, "epochs": recipe.epochs}
        nothing = {"val_accuracy": None, "test_accuracy": None, "parameters": None, "bundle_bytes": None}
        try:
            found = yield from self._fitted(name, recipe, keep, state)
        except DivergedError:
            found = {**nothing, "forward_passes": None}
        spent_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
        return {**told, **found, "fit_s": round(spent_s, 1), "cpu_s": round(cpu_s, 1)}

    def _fitted(self, name: str, recipe: Recipe, keep: Keeper, state: Checkpoint) -> Fitting[Figures]:
        splits, labels = self.material.splits(recipe), len(self.material.labels)
        baseline = self.registry.baseline(name)
        rest: dict[str, Any] = {
            "watch": lambda progress: self.watch(self.progress(progress)),
            "keep": keep,
            "resume": state,
            "frozen": self.material.features(),
            "each_epoch": recipe.patience > 0,
        }
        if baseline is not None:
            reported = yield from reporting(self.backbone, baseline, splits, labels, recipe, **rest)
            return _figures(reported.metrics, reported.parameters, None)
        fitted = yield from fitting(self.backbone, self.registry.get(name), splits, labels, recipe, **rest)
        parameters = sum(value.size for value in fitted.params.values())
        return _figures(fitted.metrics, parameters, len(self.material.bundle(fitted).data))

    def progress(self, progress: Progress, tried: Figures | None = None) -> Progress:
        total = len(self.wish.methods) * len(self.wish.seeds)
        number = min(len(self.fits) + (tried is None), total)
        return replace(progress, epoch_ended=False, eta_s=None, trial=number, trials=total, tried=tried)

    def costs(self) -> Fitting[dict[str, forward_cost.Cost]]:
        found: dict[str, forward_cost.Cost] = {}
        for name in self.wish.methods:
            if self.registry.baseline(name) is None:
                loaded = self._lens_like(name)
                tick = partial(self.watch, self.progress(Progress()))
                work = partial(forward_cost.measured, self.backbone, loaded, tick)
                forward, lens_bytes = (yield ExclusiveStep(partial(_as_tensor, work))).tolist()
                found[name] = forward_cost.Cost(forward, round(lens_bytes))
        return found

    def _lens_like(self, name: str) -> Loaded:
        """A lens of the shape that the fits have led to: what it costs does not depend on its numbers."""
        method, recipe = self.registry.get(name), self.recipe(name, self.wish.seeds[0])
        spec = self.backbone.spec
        lengths = prompt_lengths(spec, method, recipe)
        params = method.init(spec, lengths, len(self.material.labels), seeded(recipe.seed, 0))
        with torch.inference_mode():
            own = {key: value.to(self.backbone.device, self.backbone.dtype) for key, value in params.items()}
            lens = pooling.lower_with_pool(method, self.backbone, own, lengths, recipe.pool)
        how = spec.preprocess
        return Loaded(lens, self.material.labels, spec.geometry, how.mean, how.std)

    def row(self, name: str, cost: forward_cost.Cost | None) -> Figures:
        own = [one for one in self.fits if one["method"] == name]
        baseline: Baseline | None = self.registry.baseline(name)
        return {
            "method": name,
            "servable": baseline is None,
            "fits": len(own),
            "diverged": sum(one["val_accuracy"] is None for one in own),
            **_spread("val_accuracy", own),
            **_spread("test_accuracy", own),
            "parameters": _first("parameters", own),
            "bundle_bytes": _first("bundle_bytes", own),
            "lens_bytes": cost and cost.lens_bytes,
            "forward_cost": cost and cost.forward,
            **{name: round(statistics.mean(one[name] for one in own), 1) for name in ("fit_s", "cpu_s")},
        }


def _as_tensor(work: Callable[[], forward_cost.Cost]) -> torch.Tensor:
    return torch.tensor(work(), dtype=torch.float64)


def _figures(metrics: Mapping[str, Any], parameters: int, bundle_bytes: int | None) -> Figures:
    return {
        "val_accuracy": metrics["val_accuracy"],
        "test_accuracy": metrics.get("test_accuracy"),
        "parameters": parameters,
        "bundle_bytes": bundle_bytes,
        "forward_passes": metrics["forward_passes"],
    }


def _spread(name: str, fits: Sequence[Figures]) -> Figures:
    """Mean and standard deviation over the seeds that came to an end; of a single one there is no deviation."""
    values = [one[name] for one in fits if one[name] is not None]
    mean = round(statistics.mean(values), 6) if values else None
    return {name: mean, f"{name}_std": round(statistics.stdev(values), 6) if len(values) > 1 else None}


def _first(name: str, fits: Sequence[Figures]) -> Any:
    return next((one[name] for one in fits if one[name] is not None), None)
