"""Prompt Condensation (Kim et al., Do We Really Need a Large Number of Visual Prompts?, arXiv 2305.17223): most of many
prompts contribute little, and those that contribute lie in few layers.

    fitted prompts ─► score each ─► all layers in one list ─► the best k stay ─► refit ─► within ε? ── yes ─► done
                                                                   ▲                       └── no: the next larger k

A prompt's score is the change of the loss without it, to first order, per picture: s = E |Σ_d ∂L/∂P_d · P_d|. The
result is ragged: a layer may keep all of its prompts or none. Every k begins with the parent's parameters, so its
result does not depend on the other k. They are tried in ascending order, and the first that is good enough is the
result; where none is, the parent stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from server.engine.backbone import Backbone
from server.engine.lens import condition
from server.engine.spec import Spec
from server.errors import Unprocessable
from server.methods.method import Method

from .checkpoint import Checkpoint, OnCheckpoint, ignore_checkpoint
from .co_batching import Fitting
from .data import Splits
from .fit import DivergedError, Fit, FitResult, fitting
from .frozen import FrozenFeatures
from .inputs import Inputs
from .metrics import accuracy, nll
from .progress import OnProgress, Progress, ignore_progress
from .recipe import Condense, Recipe, resolve
from .token_init import has_prompts

Figures = dict[str, Any]
REFIT_SHARE = 0.6  # of the fit's epochs: a quarter cost points that this does not (docs/results/condensation.md)


def condensing(
    backbone: Backbone,
    parent: FitResult,
    splits: Splits,
    labels: int,
    *,
    on_progress: OnProgress = ignore_progress,
    on_checkpoint: OnCheckpoint = ignore_checkpoint,
    resume: Checkpoint | None = None,
    frozen: FrozenFeatures | None = None,
) -> Fitting[FitResult]:
    """Reduce the parent's prompts to the fewest that its recipe's `condense` allows. Returns the parent itself where no
    smaller number is good enough.

    The result's metrics hold under `condense` the parent's accuracy, every prompt's score and all trials. Other
    arguments as for `fit.fitting`; after an interruption, `parent` is what `resumed_parent` reads from `resume`. Raises
    Unprocessable (invalid_request) for a parent without prompts.
    """
    require_condensable(parent.method, backbone.spec)
    if not sum(parent.prompt_lengths):
        raise Unprocessable("condense: expected some prompts, got a fit with none")
    run = _Condensing(backbone, parent, splits, labels, on_progress, on_checkpoint, frozen or FrozenFeatures(backbone))
    state = resume if resume is not None and resume.condense else Checkpoint()
    if state.condense:
        run.figures = {**state.condense["told"], "sweep": list(state.condense["told"]["sweep"])}
    else:
        run.figures = yield from run.examine_parent()
    return (yield from run.sweep(state))


def condensable(method: Method, spec: Spec) -> bool:
    """Whether single prompts of the method can be removed: no other parameter's shape depends on their number."""
    lengths = method.prompt_lengths(spec, 2)
    full, empty = (method.shapes(spec, prompts, 2) for prompts in (lengths, (0,) * len(lengths)))
    return has_prompts(method, spec) and {**full, "prompts": ()} == {**empty, "prompts": ()}


def require_condensable(method: Method, spec: Spec) -> None:
    """Raises Unprocessable (invalid_request) for a method that cannot be condensed."""
    if not condensable(method, spec):
        raise Unprocessable(f"condense: expected a method whose prompts can go one by one, got {method.name}")


def resumed_parent(resume: Checkpoint | None, method: Callable[[str], Method]) -> FitResult | None:
    """The parent of the condensation that a checkpoint was taken in; None where the checkpoint is of another step.

    `method` returns a method by its name.
    """
    if resume is None or not resume.condense:
        return None
    record = resume.condense["parent"]
    parent_method = method(record["method"])
    params = {name: value.numpy() for name, value in resume.parent.items()}
    recipe, lengths = resolve(parent_method.defaults, record["recipe"]), tuple(record["prompt_lengths"])
    return FitResult(parent_method, recipe, params, lengths, record["metrics"])


@dataclass
class _Condensing:
    """The state of a condensation. `figures`: its part of the result's metrics."""

    backbone: Backbone
    parent: FitResult
    splits: Splits
    labels: int
    on_progress: OnProgress
    on_checkpoint: OnCheckpoint
    frozen: FrozenFeatures

    def __post_init__(self) -> None:
        assert self.parent.recipe.condense is not None
        self.how: Condense = self.parent.recipe.condense
        self.recipe = refit_recipe(self.parent.recipe)
        self.counts = counts(sum(self.parent.prompt_lengths), self.how.keep)
        self.figures: Figures = {}

    def examine_parent(self) -> Fitting[Figures]:
        """The parent's accuracy and the score of each of its prompts."""
        parent = self.parent
        run = Fit(
            self.backbone, parent.method, self.recipe, parent.prompt_lengths, self.frozen, on_progress=self._report
        )
        yield from run.begin(self.splits.train, self.labels, parent, None)
        val = yield from run.inputs(self.splits.val)
        logits = yield from run.logits(val)
        train = yield from run.inputs(self.splits.train)
        score = yield from scores(run, train)
        layers = score.split(list(parent.prompt_lengths))
        return {
            "version": self.how.version,
            "epsilon": self.how.epsilon,
            "prompts": sum(parent.prompt_lengths),
            "prompt_lengths": list(parent.prompt_lengths),
            "val_accuracy": accuracy(logits, self.splits.val.targets),
            "val_nll": round(nll(logits, self.splits.val.targets), 6),
            "scores": [[float(f"{value:.6g}") for value in layer] for layer in layers],
            "sweep": [],
            "forward_passes": run.passes,
            "kept": None,
        }

    def sweep(self, state: Checkpoint) -> Fitting[FitResult]:
        """Refit with ascending numbers of prompts until one is good enough. The first refit resumes from `state`."""
        for count in self.counts[len(self.figures["sweep"]) :]:
            refit = yield from self._refit(cut(self.parent, self._scores(), count), state)
            state = Checkpoint()
            self._record_trial(count, refit)
            if refit is not None and self._good_enough(refit):
                self.figures["kept"] = count
                return replace(refit, recipe=self.parent.recipe, metrics=self._metrics(refit.metrics))
        return replace(self.parent, metrics=self._metrics(self.parent.metrics))

    def _refit(self, start: FitResult, state: Checkpoint) -> Fitting[FitResult | None]:
        """The refit of `start`; None where its loss diverges."""
        self._lengths = start.prompt_lengths
        self._checkpoint(state)
        try:
            return (
                yield from fitting(
                    self.backbone,
                    start.method,
                    self.splits,
                    self.labels,
                    self.recipe,
                    on_progress=self._report,
                    on_checkpoint=self._checkpoint,
                    resume=state,
                    frozen=self.frozen,
                    start=start,
                    each_epoch=False,
                )
            )
        except DivergedError:
            return None

    def _record_trial(self, count: int, refit: FitResult | None) -> None:
        trial: Figures = {"kept": count, "prompt_lengths": list(self._lengths), "epochs": self.recipe.epochs}
        trial |= {"val_accuracy": None, "val_nll": None, "forward_passes": 0}
        if refit is not None:
            metrics = refit.metrics
            trial |= {name: metrics[name] for name in ("val_accuracy", "forward_passes")}
            trial["val_nll"] = metrics["val"]["nll"]
        self.figures["forward_passes"] += trial["forward_passes"]
        reported = {**trial, "method": self.parent.method.name, "lr": self.recipe.lr}
        self.on_progress(self._progress(Progress(), reported))
        self.figures["sweep"].append(trial)

    def _good_enough(self, refit: FitResult) -> bool:
        lost = self.figures["val_accuracy"] - refit.metrics["val_accuracy"]
        return bool(lost <= self.how.epsilon + 1e-9)  # accuracies are rounded

    def _scores(self) -> Tensor:
        """The stored scores of all prompts, [Σp]."""
        return torch.tensor([score for layer in self.figures["scores"] for score in layer], dtype=torch.float64)

    def _metrics(self, metrics: Figures) -> Figures:
        """The result's metrics: with those of the search and the fit that preceded in the same job."""
        before = {} if self.how.version else self.parent.metrics
        passes = before.get("forward_passes", 0) + self.figures["forward_passes"]
        search = {name: before[name] for name in ("search",) if name in before}
        return {**metrics, **search, "forward_passes": passes, "condense": self.figures}

    # --- checkpoint and progress --------------------------------------------------------------------------------------

    def _checkpoint(self, now: Checkpoint) -> None:
        parent = self.parent
        record = {
            "method": parent.method.name,
            "recipe": parent.recipe.to_json(),
            "prompt_lengths": list(parent.prompt_lengths),
            "metrics": parent.metrics,
        }
        tensors = {name: torch.tensor(value) for name, value in parent.params.items()}
        self.on_checkpoint(replace(now, parent=tensors, condense={"parent": record, "told": self.figures}))

    def _report(self, progress: Progress) -> None:
        self.on_progress(self._progress(progress))

    def _progress(self, progress: Progress, figures: Figures | None = None) -> Progress:
        number, total = len(self.figures.get("sweep", ())) + 1, len(self.counts)
        return progress.as_trial("condense", number, total, figures)


def refit_recipe(recipe: Recipe) -> Recipe:
    """The recipe of a refit: the same schedule in fewer epochs, without early stopping."""
    assert recipe.condense is not None
    epochs = recipe.condense.epochs or max(1, round(REFIT_SHARE * recipe.epochs))
    warmup = recipe.warmup_epochs * epochs / recipe.epochs
    return replace(recipe, epochs=epochs, warmup_epochs=warmup, patience=0, init="uniform")


def counts(prompts: int, shares: Sequence[float]) -> list[int]:
    """The numbers of prompts to try, in ascending order: at least one, and never all."""
    rounded = sorted({max(1, round(share * prompts)) for share in shares})
    return [count for count in rounded if count < prompts]


def cut(parent: FitResult, score: Tensor, count: int) -> FitResult:
    """The parent with only its `count` prompts of highest score [Σp], in their order; of equal scores the first."""
    order = torch.sort(score, descending=True, stable=True).indices
    kept = torch.zeros(len(score), dtype=torch.bool)
    kept[order[:count]] = True
    lengths = tuple(int(layer.sum()) for layer in kept.split(list(parent.prompt_lengths)))
    params = {**parent.params, "prompts": parent.params["prompts"][kept.numpy()]}
    return replace(parent, params=params, prompt_lengths=lengths)


def scores(run: Fit, train: Inputs) -> Fitting[Tensor]:
    """Each prompt's score [Σp] in float64: the mean over the training pictures of |Σ_d ∂L/∂P_d · P_d|.

    Every row of a batch has its own copy of the prompts, [B, Σp, D], as for prompt dropout, so that one backward gives
    the gradient of each picture separately.
    """
    prompts = run.params["prompts"].detach()
    total = torch.zeros(len(prompts), dtype=torch.float64)
    batches = torch.arange(len(train.targets)).split(run.recipe.batch_size)
    with closing(train.read([index.numpy() for index in batches])) as pixels:
        for index, batch in zip(batches, pixels, strict=True):
            copies = prompts.expand(len(index), -1, -1).clone().requires_grad_(True)
            lens, targets = run.lens({**run.params, "prompts": copies}), train.targets[index].to(copies.device)
            request = run.request(train, index, batch, condition(lens, len(index)))
            yield replace(request, loss=partial(run.loss, lens=lens, targets=targets))  # the mean over the batch's rows
            assert copies.grad is not None
            products = (copies.grad.double() * prompts.double()).sum(-1).abs()  # [B, Σp]
            total += products.sum(0).cpu() * len(index)
            run.tick()
    for value in run.params.values():
        value.grad = None
    if not math.isfinite(float(total.sum())):
        raise DivergedError("the loss of the fit to be condensed is not finite")
    return total / len(train.targets)
