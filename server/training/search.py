"""`auto`: the search for method and recipe on the validation pictures, within a budget, and the full fit of the best.

    heads on frozen features          every candidate in full: they cost nothing but the features
    prompts, first rung               every candidate for a short schedule; the best third, and the best of each
                                      method, are promoted
    prompts, second rung              three times as long
    the full fit                      the best of the second rung; where a head was better on validation, that head

Successive halving (Jamieson & Talwalkar, AISTATS 2016), each rung a short but whole schedule, warm-up and cosine
included, so that a learning rate is evaluated as it will be used. Candidates are those that the methods suggest
(`Method.candidates`), the most promising first; the budget determines how many are tried, and for how long. They are
ranked by the calibrated negative log-likelihood, which distinguishes recipes where a few dozen validation pictures give
the same accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import Any, Final

import torch

from server.engine.backbone import Backbone
from server.methods.method import Method

from .checkpoint import Checkpoint, OnCheckpoint, ignore_checkpoint
from .co_batching import Fitting
from .condense import condensable
from .data import LabelledImages, Splits, sample
from .fit import DivergedError, FitResult, fitting
from .frozen import FrozenFeatures
from .presets import find_preset, overlaid
from .progress import OnProgress, Progress, Work, ignore_progress
from .recipe import Recipe, resolve
from .token_init import has_prompts

BUDGET: Final = 30_000  # pictures through the backbone
BUDGET_EACH: Final = 100  # for each training picture, where these are few
KEEP_ONE_OF: Final = 3
SHORT: Final = 1_600  # pictures of a first-rung trial: 50 steps of 32
FULL: Final = 9_600  # pictures that a full fit sees at least: 300 steps of 32
MOST_EPOCHS: Final = 100
MOST_VAL: Final = 500  # validation pictures of a trial


@dataclass(frozen=True)
class Candidate:
    method: Method
    recipe: Recipe


@dataclass(frozen=True)
class Tried:
    """A candidate that was tried. `nll`: its validation loss, infinite where it diverged; `trial`: its number."""

    candidate: Candidate
    nll: float
    trial: int


def searching(
    backbone: Backbone,
    methods: Sequence[Method],
    splits: Splits,
    labels: int,
    fixed: Mapping[str, Any],
    *,
    budget: int | None = None,
    on_progress: OnProgress = ignore_progress,
    on_checkpoint: OnCheckpoint = ignore_checkpoint,
    resume: Checkpoint | None = None,
    frozen: FrozenFeatures | None = None,
    on_head: Callable[[FitResult], None] | None = None,
) -> Fitting[FitResult]:
    """Find a recipe among `methods` for `labels` classes and fit it. `fixed`: recipe fields that are not searched.

    `budget`: pictures that may go through the backbone before the full fit; without one it is a hundred times the
    training pictures, and at most 30,000. `on_head` receives the best head, fitted, before the first trial of prompts;
    a search that resumes after that trial does not call it again. The result's metrics hold under `search` all trials,
    and which of them was `chosen` to be fitted in full. Other arguments as for `fit.fitting`.
    """
    state = resume or Checkpoint()
    plan = _Plan.make(backbone, methods, splits, fixed, budget or min(BUDGET, BUDGET_EACH * len(splits.train)))
    frozen = frozen or FrozenFeatures(backbone)
    run = _Search(backbone, splits, labels, plan, on_progress, on_checkpoint, frozen, list(state.trials))
    best = yield from run.try_candidates(on_head)
    return (yield from run.fit_best(best, state))


@dataclass(frozen=True)
class _Plan:
    """The candidates of a search. `short`: training pictures of a first-rung trial."""

    heads: tuple[Candidate, ...]
    prompted: tuple[Candidate, ...]
    short: int
    budget: int

    @classmethod
    def make(
        cls, backbone: Backbone, methods: Sequence[Method], splits: Splits, fixed: Mapping[str, Any], budget: int
    ) -> _Plan:
        """As many candidates as the budget allows, at least two, and at least one of each method."""
        images, val = len(splits.train), min(len(splits.val), MOST_VAL)
        heads: list[list[Candidate | None]] = []
        prompted: list[list[Candidate | None]] = []
        for method in methods:
            (heads if head_only(method, backbone) else prompted).append(_candidates(method, backbone, fixed, images))
        ranked = _distinct(chain.from_iterable(zip_longest(*prompted)))
        left = budget - (min(budget // 3, images) + val if heads else 0)
        full = ranked[0].recipe.epochs * images if ranked else 0
        count, short = _affordable(left, full, val, _method_count(ranked))
        return cls(tuple(_distinct(chain.from_iterable(heads))), tuple(ranked[:count]), short, budget)

    @property
    def promoted(self) -> int:
        """The number of candidates of the second rung."""
        return max(len(self.prompted) // KEEP_ONE_OF, _method_count(self.prompted))

    @property
    def trials(self) -> int:
        return len(self.heads) + len(self.prompted) + (self.promoted if self.prompted else 0)


def _affordable(left: int, full: int, val: int, methods: int) -> tuple[int, int]:
    """How many candidates both rungs can try with `left` pictures, and the training pictures `short` of a first-rung
    trial. A trial also evaluates `val` pictures; `full` are the training pictures of a full fit."""
    methods = max(1, methods)
    fewest = max(2, methods)
    short = (left - (fewest + methods) * val) // (fewest + KEEP_ONE_OF * methods)
    short = max(1, min(SHORT, full // KEEP_ONE_OF, short))
    count = KEEP_ONE_OF * left // (2 * KEEP_ONE_OF * short + (KEEP_ONE_OF + 1) * val)
    if count < KEEP_ONE_OF * methods:
        count = (left - methods * (KEEP_ONE_OF * short + val)) // (short + val)
    return max(fewest, count), short


def _method_count(candidates: Iterable[Candidate]) -> int:
    return len({candidate.method.name for candidate in candidates})


@dataclass
class _Search:
    """The state of a search. `trials`: the figures of the finished trials, in order."""

    backbone: Backbone
    splits: Splits
    labels: int
    plan: _Plan
    on_progress: OnProgress
    on_checkpoint: OnCheckpoint
    frozen: FrozenFeatures
    trials: list[dict[str, Any]]

    def __post_init__(self) -> None:
        train, seed = self.splits.train, 0
        self._val = sample(self.splits.val, MOST_VAL, seed)
        self._for_heads = sample(train, max(self.plan.budget // 3, self.labels), seed)
        self._short = sample(train, self.plan.short, seed)
        self._long = sample(train, KEEP_ONE_OF * self.plan.short, seed)
        self._done = 0
        self._costs = self._trial_costs()

    def try_candidates(self, on_head: Callable[[FitResult], None] | None) -> Fitting[list[Tried]]:
        """Run the remaining trials. Returns the best head and the best candidate of the second rung; only one of them
        where the search has no other."""
        resumed = len(self.trials)
        heads = yield from self._rung(self.plan.heads, 0, self._for_heads, None)
        if on_head and heads and self.plan.prompted and resumed <= len(heads) and heads[0].nll < math.inf:
            on_head((yield from self._preliminary(heads[0].candidate)))
        first = yield from self._rung(self.plan.prompted, 1, self._short, self.plan.short)
        promoted = _promoted([tried.candidate for tried in first], self.plan.promoted)
        second = yield from self._rung(promoted, 2, self._long, KEEP_ONE_OF * self.plan.short)
        return heads[:1] + second[:1]

    def fit_best(self, best: Sequence[Tried], state: Checkpoint) -> Fitting[FitResult]:
        """Fit the best prompts in full, even if the head is ahead: a short schedule may underrate prompts. Where the
        head is better than the full fit, fit the head."""
        head, chosen = best[0], best[-1]
        result = None
        if chosen is not head and chosen.nll < math.inf:
            with suppress(DivergedError):
                result = yield from self._fit(chosen.candidate, self.on_checkpoint, state)
        if result is None or (chosen is not head and _loss(result) > head.nll):
            resumable = (self.on_checkpoint, state) if chosen is head else (ignore_checkpoint, Checkpoint())
            chosen = head
            result = yield from self._fit(head.candidate, *resumable)
        search = {"budget": self.plan.budget, "forward_passes": self._spent(), "trials": self.trials}
        return replace(result, metrics={**result.metrics, "search": {**search, "chosen": chosen.trial}})

    def _preliminary(self, head: Candidate) -> Fitting[FitResult]:
        """The fit of a head on the pictures of its trial, whose features are there already."""
        return fitting(
            self.backbone,
            head.method,
            Splits(self._for_heads, self._val, None),
            self.labels,
            head.recipe,
            on_progress=lambda progress: self.on_progress(replace(self._progress(progress), phase="head", trial=0)),
            frozen=self.frozen,
            each_epoch=False,
        )

    def _fit(self, candidate: Candidate, on_checkpoint: OnCheckpoint, state: Checkpoint) -> Fitting[FitResult]:
        return fitting(
            self.backbone,
            candidate.method,
            self.splits,
            self.labels,
            candidate.recipe,
            on_progress=lambda now: self.on_progress(replace(now, share=self._share(len(self._costs) - 1, now.share))),
            on_checkpoint=lambda now: on_checkpoint(replace(now, trials=self.trials)),
            resume=state,
            frozen=self.frozen,
        )

    def _rung(
        self, candidates: Sequence[Candidate], rung: int, train: LabelledImages, pictures: int | None
    ) -> Fitting[list[Tried]]:
        """Try every candidate on `train`, for `pictures` training pictures instead of its own epochs where that is
        given. Returns the candidates, the lowest validation loss first; the sort is stable."""
        tried = []
        for candidate in candidates:
            if self._done == len(self.trials):
                self.trials.append((yield from self._trial(candidate, rung, train, pictures)))
                self.on_checkpoint(Checkpoint(trials=self.trials))
                self.on_progress(self._progress(Progress(), self.trials[-1]))
            nll = self.trials[self._done]["val_nll"]
            self._done += 1
            tried.append(Tried(candidate, math.inf if nll is None else nll, self._done))
        return sorted(tried, key=lambda one: one.nll)

    def _trial(
        self, candidate: Candidate, rung: int, train: LabelledImages, pictures: int | None
    ) -> Fitting[dict[str, Any]]:
        recipe = candidate.recipe
        if pictures is not None:
            recipe = _shortened(recipe, max(1, round(pictures / len(train))))
        about = {"method": candidate.method.name, "rung": rung, "images": len(train), "val_images": len(self._val)}
        about |= _searched(candidate.method, recipe)
        try:
            result = yield from fitting(
                self.backbone,
                candidate.method,
                Splits(train, self._val, None),
                self.labels,
                recipe,
                on_progress=lambda progress: self.on_progress(self._progress(progress)),
                frozen=self.frozen,
                each_epoch=False,
            )
        except DivergedError:
            return {**about, "val_accuracy": None, "val_interval": None, "val_nll": None, "forward_passes": 0}
        metrics = result.metrics
        return {
            **about,
            "val_accuracy": metrics["val_accuracy"],
            "val_interval": metrics["val"]["interval"],
            "val_nll": metrics["val"]["nll"],
            "forward_passes": 0 if pictures is None else metrics["forward_passes"],
        }

    def _progress(self, progress: Progress, figures: dict[str, Any] | None = None) -> Progress:
        number, total = len(self.trials) + (figures is None), self.plan.trials
        share = self._share(len(self.trials), progress.share)
        return replace(progress.as_trial("search", number, total, figures), share=share)

    def _share(self, step: int, share: float | None) -> float:
        """The share of the whole work at a share of a step: trials are counted from 0, and the full fit is the last."""
        done = sum(self._costs[:step]) + (share or 0.0) * self._costs[step]
        return round(done / sum(self._costs), 4)

    def _trial_costs(self) -> list[float]:
        """The estimated work of every trial and of the full fit, as `Work` counts it."""
        cost, val, plan = Work(), len(self._val), self.plan
        features = float(len(self._for_heads) + val)
        heads = [features, *[features / 50] * len(plan.heads)][: len(plan.heads)]
        first, second = (
            [cost.trained * pictures + cost.evaluated * val] * count
            for pictures, count in ((plan.short, len(plan.prompted)), (KEEP_ONE_OF * plan.short, plan.promoted))
        )
        if not plan.prompted:
            return [*heads, features / 50]
        epoch = cost.trained * len(self.splits.train) + cost.evaluated * len(self.splits.val)
        return [*heads, *first, *second, plan.prompted[0].recipe.epochs * epoch]

    def _spent(self) -> int:
        """Pictures through the backbone: those of the features that all heads share, and those of every other trial."""
        shared = len(self._for_heads) + len(self._val) if self.plan.heads else 0
        return shared + sum(trial["forward_passes"] for trial in self.trials)


def _promoted(ranked: Sequence[Candidate], count: int) -> list[Candidate]:
    """The best candidate of each method and the next best of all: deep prompts learn slowly at first, and a short
    schedule alone would drop them for methods that merely start faster."""
    methods: dict[str, Candidate] = {}
    for candidate in ranked:
        methods.setdefault(candidate.method.name, candidate)
    best = list(methods.values())
    chosen = [*best, *(candidate for candidate in ranked if candidate not in best)][: max(count, len(best))]
    return [candidate for candidate in ranked if candidate in chosen]


def _loss(result: FitResult) -> float:
    return float(result.metrics["val"]["nll"])


def _shortened(recipe: Recipe, epochs: int) -> Recipe:
    """The same schedule in fewer epochs, without early stopping."""
    return replace(recipe, epochs=epochs, warmup_epochs=recipe.warmup_epochs * epochs / recipe.epochs, patience=0)


def _searched(method: Method, recipe: Recipe) -> dict[str, Any]:
    """The fields in which candidates differ: the usual ones, and those of the method's own suggestions."""
    names = {"optimizer", "lr", "weight_decay", "prompts", "epochs"}.union(*method.candidates)
    return {name: value for name, value in recipe.to_json().items() if name in names}


# --- candidates -------------------------------------------------------------------------------------------------------


def head_only(method: Method, backbone: Backbone) -> bool:
    """Whether the method trains only a head, so that its candidates share the frozen features."""
    lengths = method.prompt_lengths(backbone.spec, 1)
    with torch.inference_mode():
        params = method.init(backbone.spec, lengths, 2, torch.Generator())
        cast = {name: value.to(backbone.device, backbone.dtype) for name, value in params.items()}
        return method.lower(backbone, cast, lengths).head_only


def _candidates(method: Method, backbone: Backbone, fixed: Mapping[str, Any], images: int) -> list[Candidate | None]:
    """The candidates of a method, the most promising first. None stands for a suggestion that contradicts `fixed`."""
    fields = _applicable(method, backbone, fixed)
    candidates = [_candidate(method, changes, fields, images) for changes in _suggestions(method, fields)]
    return candidates if any(candidates) else [Candidate(method, resolve(method.defaults, fields))]


def _applicable(method: Method, backbone: Backbone, fixed: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fixed fields that apply to the method: fields about prompts are dropped where it has none. (A job that names
    such a method itself is refused.)"""
    applies = {"init": has_prompts(method, backbone.spec), "condense": condensable(method, backbone.spec)}
    return {name: value for name, value in fixed.items() if applies.get(name, True)}


def _suggestions(method: Method, fixed: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The grid of the preset, or the method's own suggestions."""
    preset = fixed.get("preset")
    return method.candidates if preset is None else find_preset(preset).grid


def _candidate(method: Method, changes: Mapping[str, Any], fixed: Mapping[str, Any], images: int) -> Candidate | None:
    """A method's suggestion with the fixed fields. None where the fixed optimiser is not the suggestion's: a learning
    rate is suggested for its optimiser."""
    fields = {name: value for name, value in fixed.items() if value is not None}
    optimizer = changes.get("optimizer", "adamw")
    if fields.get("optimizer", optimizer) != optimizer:
        return None
    recipe = resolve(method.defaults, overlaid(fields, changes))
    if not fields.keys() & {"epochs", "preset"}:
        recipe = replace(recipe, epochs=max(recipe.epochs, min(MOST_EPOCHS, math.ceil(FULL / images))))
    return Candidate(method, recipe)


def _distinct(candidates: Iterable[Candidate | None]) -> list[Candidate]:
    return list(dict.fromkeys(candidate for candidate in candidates if candidate is not None))
