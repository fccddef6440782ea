"""`auto`: the recipe and the method are found on the validation pictures, within a budget, and then fitted in full.

    heads on frozen features          every candidate to its end: they cost nothing but the features
    prompts, first rung               every candidate for a short schedule; of each three the best goes on, and of
                                      each method
    prompts, second rung              three times as long
    the full fit                      the best of the second rung; a head that was better on validation is kept instead

Successive halving (Jamieson & Talwalkar, AISTATS 2016), each rung a short but whole schedule, warm-up and cosine
included, so that a learning rate is judged as it will be used. Candidates are what the methods themselves suggest
(`Method.candidates`), the likeliest first; how many take part, and for how long, is what the budget allows. What is
compared is the calibrated negative log-likelihood: it tells recipes apart where a few dozen validation pictures give
the same accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import Any, Final

import torch

from server.engine.backbone import Backbone
from server.methods.method import Method

from .checkpoint import Checkpoint
from .co_batching import Fitting
from .condense import condensable
from .data import LabelledImages, Splits, sample
from .fit import DivergedError, Fitted, Keeper, fitting, nowhere
from .frozen import FrozenFeatures
from .presets import beneath, published
from .progress import Progress, Watcher, nobody
from .recipe import Recipe, resolve
from .token_init import has_prompts

BUDGET: Final = 30_000  # pictures through the backbone
BUDGET_EACH: Final = 100  # for each training picture, where these are few
KEEP_ONE_OF: Final = 3
SHORT: Final = 1_600  # pictures of a first-rung trial: 50 steps of 32
FULL: Final = 9_600  # pictures that a full fit sees at least: 300 steps of 32
MOST_EPOCHS: Final = 100
MOST_VAL: Final = 500  # pictures that a trial is judged on


@dataclass(frozen=True)
class Candidate:
    method: Method
    recipe: Recipe


def searching(
    backbone: Backbone,
    methods: Sequence[Method],
    splits: Splits,
    labels: int,
    fixed: Mapping[str, Any],
    *,
    budget: int | None = None,
    watch: Watcher = nobody,
    keep: Keeper = nowhere,
    resume: Checkpoint | None = None,
    frozen: FrozenFeatures | None = None,
) -> Fitting[Fitted]:
    """Find a recipe among `methods` for `labels` classes and fit it. `fixed`: recipe fields that are not searched.

    `budget`: pictures that may go through the backbone before the full fit; without one it is a hundred times the
    training pictures, and at most 30,000. The outcome's metrics tell under `search`
    what was tried. Otherwise as `fit.fitting`.
    """
    state = resume or Checkpoint()
    plan = _Plan.of(backbone, methods, splits, fixed, budget or min(BUDGET, BUDGET_EACH * len(splits.train)))
    run = _Search(backbone, splits, labels, plan, watch, keep, frozen or FrozenFeatures(backbone), list(state.trials))
    best = yield from run.tried()
    return (yield from run.fitted(best, state))


@dataclass(frozen=True)
class _Plan:
    """What is tried, and for how many pictures."""

    heads: tuple[Candidate, ...]
    prompted: tuple[Candidate, ...]
    short: int
    budget: int

    @classmethod
    def of(
        cls, backbone: Backbone, methods: Sequence[Method], splits: Splits, fixed: Mapping[str, Any], budget: int
    ) -> _Plan:
        """As many candidates as the budget has room for, each looked at for `short` pictures and judged on the
        validation pictures, and the survivors for three times as many; two of them however small it is."""
        images, judged = len(splits.train), min(len(splits.val), MOST_VAL)
        heads: list[list[Candidate | None]] = []
        prompted: list[list[Candidate | None]] = []
        for method in methods:
            held = _held(method, backbone, fixed)
            own = [_candidate(method, changes, held, images) for changes in _suggested(method, held)]
            if not any(own):  # nothing that is suggested goes with what is fixed
                own = [Candidate(method, resolve(method.defaults, held))]
            (heads if head_only(method, backbone) else prompted).append(own)
        ranked = _distinct(chain.from_iterable(zip_longest(*prompted)))
        left = budget - (min(budget // 3, images) + judged if heads else 0)
        full = ranked[0].recipe.epochs * images if ranked else 0
        kinds = max(1, len({candidate.method.name for candidate in ranked}))
        fewest = max(2, kinds)
        short = (left - (fewest + kinds) * judged) // (fewest + KEEP_ONE_OF * kinds)
        short = max(1, min(SHORT, full // KEEP_ONE_OF, short))
        count = KEEP_ONE_OF * left // (2 * KEEP_ONE_OF * short + (KEEP_ONE_OF + 1) * judged)
        if count < KEEP_ONE_OF * kinds:
            count = (left - kinds * (KEEP_ONE_OF * short + judged)) // (short + judged)
        count = max(fewest, count)
        return cls(tuple(_distinct(chain.from_iterable(heads))), tuple(ranked[:count]), short, budget)

    @property
    def survivors(self) -> int:
        return max(len(self.prompted) // KEEP_ONE_OF, len({candidate.method.name for candidate in self.prompted}))

    @property
    def trials(self) -> int:
        return len(self.heads) + len(self.prompted) + (self.survivors if self.prompted else 0)


@dataclass
class _Search:
    """One search under way. `trials`: what is known so far, in the order in which it is tried."""

    backbone: Backbone
    splits: Splits
    labels: int
    plan: _Plan
    watch: Watcher
    keep: Keeper
    frozen: FrozenFeatures
    trials: list[dict[str, Any]]

    def __post_init__(self) -> None:
        train, seed = self.splits.train, 0
        self._val = sample(self.splits.val, MOST_VAL, seed)
        self._for_heads = sample(train, max(self.plan.budget // 3, self.labels), seed)
        self._short = sample(train, self.plan.short, seed)
        self._long = sample(train, KEEP_ONE_OF * self.plan.short, seed)
        self._done = 0

    def tried(self) -> Fitting[list[tuple[Candidate, float]]]:
        """Run the trials that are still to do. Returns the best head and the best of the second rung, as far as there
        are any, with what they gave."""
        heads = yield from self._rung(self.plan.heads, 0, self._for_heads, None)
        first = yield from self._rung(self.plan.prompted, 1, self._short, self.plan.short)
        going_on = _survivors([candidate for candidate, _ in first], self.plan.survivors)
        last = yield from self._rung(going_on, 2, self._long, KEEP_ONE_OF * self.plan.short)
        return heads[:1] + last[:1]

    def fitted(self, best: Sequence[tuple[Candidate, float]], state: Checkpoint) -> Fitting[Fitted]:
        """The full fit of the best prompts, which a short schedule may have wronged; where the head is better after
        all, the head's."""
        (head, of_head), (chosen, of_chosen) = best[0], best[-1]
        found = None
        if chosen is not head and of_chosen < math.inf:
            with suppress(DivergedError):
                found = yield from self._full(chosen, self.keep, state)
        if found is None or (chosen is not head and _score(found) > of_head):
            kept = (self.keep, state) if chosen is head else (nowhere, Checkpoint())
            found = yield from self._full(head, *kept)
        told = {"budget": self.plan.budget, "forward_passes": self._spent(), "trials": self.trials}
        return replace(found, metrics={**found.metrics, "search": told})

    def _full(self, candidate: Candidate, keep: Keeper, state: Checkpoint) -> Fitting[Fitted]:
        return fitting(
            self.backbone,
            candidate.method,
            self.splits,
            self.labels,
            candidate.recipe,
            watch=self.watch,
            keep=lambda now: keep(replace(now, trials=self.trials)),
            resume=state,
            frozen=self.frozen,
        )

    def _rung(
        self, candidates: Sequence[Candidate], rung: int, train: LabelledImages, look: int | None
    ) -> Fitting[list[tuple[Candidate, float]]]:
        """Every candidate tried on `train`, for `look` pictures where that is given. Best first, the earlier of equals
        before the later."""
        scores = []
        for candidate in candidates:
            if self._done == len(self.trials):
                self.trials.append((yield from self._trial(candidate, rung, train, look)))
                self.keep(Checkpoint(trials=self.trials))
                self.watch(self._progress(Progress(), tried=self.trials[-1]))
            nll = self.trials[self._done]["val_nll"]
            scores.append((candidate, math.inf if nll is None else nll))
            self._done += 1
        return sorted(scores, key=lambda one: one[1])

    def _trial(
        self, candidate: Candidate, rung: int, train: LabelledImages, look: int | None
    ) -> Fitting[dict[str, Any]]:
        recipe = candidate.recipe if look is None else _shortened(candidate.recipe, max(1, round(look / len(train))))
        told = {"method": candidate.method.name, "rung": rung, "images": len(train), **_searched(recipe)}
        try:
            found = yield from fitting(
                self.backbone,
                candidate.method,
                Splits(train, self._val, None),
                self.labels,
                recipe,
                watch=lambda progress: self.watch(self._progress(progress)),
                frozen=self.frozen,
                each_epoch=False,
            )
        except DivergedError:
            return {**told, "val_accuracy": None, "val_nll": None, "forward_passes": 0}
        own = found.metrics
        return {
            **told,
            "val_accuracy": own["val_accuracy"],
            "val_nll": own["val"]["nll"],
            "forward_passes": 0 if look is None else own["forward_passes"],
        }

    def _progress(self, progress: Progress, tried: dict[str, Any] | None = None) -> Progress:
        trial = len(self.trials) + (tried is None)
        return replace(progress, epoch_ended=False, eta_s=None, trial=trial, trials=self.plan.trials, tried=tried)

    def _spent(self) -> int:
        """The features that all heads share, and what every other trial took."""
        shared = len(self._for_heads) + len(self._val) if self.plan.heads else 0
        return shared + sum(trial["forward_passes"] for trial in self.trials)


def _survivors(ranked: Sequence[Candidate], count: int) -> list[Candidate]:
    """The best of each method, whatever its rank, and the next best of all: deep prompts learn slowly at first, and a
    short schedule alone would drop them for what merely starts faster."""
    methods: dict[str, Candidate] = {}
    for candidate in ranked:
        methods.setdefault(candidate.method.name, candidate)
    leading = list(methods.values())
    kept = [*leading, *(one for one in ranked if one not in leading)][: max(count, len(leading))]
    return [one for one in ranked if one in kept]


def _score(found: Fitted) -> float:
    return float(found.metrics["val"]["nll"])


def _shortened(recipe: Recipe, epochs: int) -> Recipe:
    """The same schedule in fewer epochs; too short for patience."""
    return replace(recipe, epochs=epochs, warmup_epochs=recipe.warmup_epochs * epochs / recipe.epochs, patience=0)


def _searched(recipe: Recipe) -> dict[str, Any]:
    wanted = ("optimizer", "lr", "weight_decay", "prompts", "epochs")
    return {name: value for name, value in recipe.to_json().items() if name in wanted}


def head_only(method: Method, backbone: Backbone) -> bool:
    """Whether it trains nothing before the head: its candidates share the frozen features."""
    lengths = method.prompt_lengths(backbone.spec, 1)
    with torch.inference_mode():
        params = method.init(backbone.spec, lengths, 2, torch.Generator())
        own = {name: value.to(backbone.device, backbone.dtype) for name, value in params.items()}
        return method.lower(backbone, own, lengths).head_only


def _held(method: Method, backbone: Backbone, fixed: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is fixed and means something to the method: what is said about prompts is passed over where there are none.
    A job that names such a method itself is refused."""
    known = {"init": has_prompts(method, backbone.spec), "condense": condensable(method, backbone.spec)}
    return {name: value for name, value in fixed.items() if known.get(name, True)}


def _suggested(method: Method, fixed: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """A preset's own grid, or what the method suggests."""
    preset = fixed.get("preset")
    return method.candidates if preset is None else published(preset).grid


def _candidate(method: Method, changes: Mapping[str, Any], fixed: Mapping[str, Any], images: int) -> Candidate | None:
    """A method's suggestion with what the job has fixed. None where the two do not go together: a learning rate is
    suggested for its optimiser."""
    held = {name: value for name, value in fixed.items() if value is not None}
    if held.get("optimizer", changes.get("optimizer", "adamw")) != changes.get("optimizer", "adamw"):
        return None
    recipe = resolve(method.defaults, beneath(held, changes))
    if not held.keys() & {"epochs", "preset"}:
        recipe = replace(recipe, epochs=max(recipe.epochs, min(MOST_EPOCHS, math.ceil(FULL / images))))
    return Candidate(method, recipe)


def _distinct(candidates: Iterable[Candidate | None]) -> list[Candidate]:
    return list(dict.fromkeys(one for one in candidates if one is not None))
