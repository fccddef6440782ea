"""Prompt Condensation (Kim et al., Do We Really Need a Large Number of Visual Prompts?, arXiv 2305.17223): most prompts
of a long list matter little, and those that matter lie in few layers.

    fitted prompts ─► score each ─► all layers in one list ─► the best k stay ─► refit ─► within ε? ── yes ─► done
                                                                   ▲                       └── no: the next larger k

A prompt's score is what the loss would change by without it, to first order, picture by picture:
s = E |Σ_d ∂L/∂P_d · P_d|. What is left is ragged: a layer may keep all of its prompts or none. Every k begins with the
parent's parameters, so a k's outcome does not depend on which others were tried. The first that is good enough is the
smallest; where none is, the parent stays.
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

from .checkpoint import Checkpoint
from .co_batching import Fitting
from .data import Splits
from .fit import DivergedError, Fit, Fitted, Keeper, fitting, nowhere
from .frozen import FrozenFeatures
from .inputs import Inputs
from .metrics import accuracy, nll
from .progress import Progress, Watcher, nobody
from .recipe import Condense, Recipe, resolve
from .token_init import has_prompts

Told = dict[str, Any]
REFIT_SHARE = 0.6  # of the fit's epochs: a quarter cost points that this does not (docs/results/condensation.md)


def condensing(
    backbone: Backbone,
    parent: Fitted,
    splits: Splits,
    labels: int,
    *,
    watch: Watcher = nobody,
    keep: Keeper = nowhere,
    resume: Checkpoint | None = None,
    frozen: FrozenFeatures | None = None,
) -> Fitting[Fitted]:
    """As few of the parent's prompts as its recipe's `condense` allows; the parent itself where no fewer are enough.

    The outcome's metrics tell under `condense` what the parent achieves, every prompt's score and what was tried.
    Otherwise as `fit.fitting`; a parent that `under_way` took from `resume` goes on where it was. Raises Unprocessable
    (invalid_request) for a parent without prompts.
    """
    refuse(parent.method, backbone.spec)
    if not sum(parent.prompt_lengths):
        raise Unprocessable("condense: expected some prompts, got a fit with none")
    run = _Condensing(backbone, parent, splits, labels, watch, keep, frozen or FrozenFeatures(backbone))
    state = resume if resume is not None and resume.condense else Checkpoint()
    if state.condense:
        run.told = {**state.condense["told"], "sweep": list(state.condense["told"]["sweep"])}
    else:
        run.told = yield from run.looked_at()
    return (yield from run.swept(state))


def condensable(method: Method, spec: Spec) -> bool:
    """Whether its prompts can be left out one by one: nothing else that it learns goes with them."""
    lengths = method.prompt_lengths(spec, 2)
    whole, none = (method.shapes(spec, own, 2) for own in (lengths, (0,) * len(lengths)))
    return has_prompts(method, spec) and {**whole, "prompts": ()} == {**none, "prompts": ()}


def refuse(method: Method, spec: Spec) -> None:
    """Raises Unprocessable (invalid_request) for a method that cannot be condensed."""
    if not condensable(method, spec):
        raise Unprocessable(f"condense: expected a method whose prompts can go one by one, got {method.name}")


def under_way(resume: Checkpoint | None, method: Callable[[str], Method]) -> Fitted | None:
    """The fit that a checkpoint's condensation began with; None where none has begun."""
    if resume is None or not resume.condense:
        return None
    told = resume.condense["parent"]
    own = method(told["method"])
    params = {name: value.numpy() for name, value in resume.parent.items()}
    recipe, lengths = resolve(own.defaults, told["recipe"]), tuple(told["prompt_lengths"])
    return Fitted(own, recipe, params, lengths, told["metrics"])


@dataclass
class _Condensing:
    """One condensation under way. `told`: what the outcome's metrics will say of it."""

    backbone: Backbone
    parent: Fitted
    splits: Splits
    labels: int
    watch: Watcher
    keep: Keeper
    frozen: FrozenFeatures

    def __post_init__(self) -> None:
        assert self.parent.recipe.condense is not None
        self.how: Condense = self.parent.recipe.condense
        self.recipe = refit_recipe(self.parent.recipe)
        self.counts = counts(sum(self.parent.prompt_lengths), self.how.keep)
        self.told: Told = {}

    def looked_at(self) -> Fitting[Told]:
        """What the parent achieves, and what each of its prompts contributes."""
        parent = self.parent
        run = Fit(self.backbone, parent.method, self.recipe, parent.prompt_lengths, self.frozen, watch=self._watch)
        yield from run.begin(self.splits.train, self.labels, parent, None)
        val = yield from run.inputs(self.splits.val)
        logits = yield from run.logits(val)
        train = yield from run.inputs(self.splits.train)
        score = yield from scores(run, train)
        return {
            "version": self.how.version,
            "epsilon": self.how.epsilon,
            "prompts": sum(parent.prompt_lengths),
            "prompt_lengths": list(parent.prompt_lengths),
            "val_accuracy": accuracy(logits, self.splits.val.targets),
            "val_nll": round(nll(logits, self.splits.val.targets), 6),
            "scores": [[float(f"{one:.6g}") for one in layer] for layer in score.split(list(parent.prompt_lengths))],
            "sweep": [],
            "forward_passes": run.passes,
            "kept": None,
        }

    def swept(self, state: Checkpoint) -> Fitting[Fitted]:
        """The smallest count that is good enough, refitted. `state`: where a refit may go on."""
        for count in self.counts[len(self.told["sweep"]) :]:
            found = yield from self._refitted(cut(self.parent, self._scores(), count), state)
            state = Checkpoint()
            self._note(count, found)
            if found is not None and self._good_enough(found):
                self.told["kept"] = count
                return replace(found, recipe=self.parent.recipe, metrics=self._metrics(found.metrics))
        return replace(self.parent, metrics=self._metrics(self.parent.metrics))

    def _refitted(self, start: Fitted, state: Checkpoint) -> Fitting[Fitted | None]:
        """None where the loss diverges."""
        self._lengths = start.prompt_lengths
        self._keep(state)
        try:
            return (
                yield from fitting(
                    self.backbone,
                    start.method,
                    self.splits,
                    self.labels,
                    self.recipe,
                    watch=self._watch,
                    keep=self._keep,
                    resume=state,
                    frozen=self.frozen,
                    start=start,
                    each_epoch=False,
                )
            )
        except DivergedError:
            return None

    def _note(self, count: int, found: Fitted | None) -> None:
        own: Told = {"kept": count, "prompt_lengths": list(self._lengths), "epochs": self.recipe.epochs}
        own |= {"val_accuracy": None, "val_nll": None, "forward_passes": 0}
        if found is not None:
            metrics = found.metrics
            own |= {name: metrics[name] for name in ("val_accuracy", "forward_passes")}
            own["val_nll"] = metrics["val"]["nll"]
        self.told["forward_passes"] += own["forward_passes"]
        self.watch(self._progress(Progress(), tried={**own, "method": self.parent.method.name, "lr": self.recipe.lr}))
        self.told["sweep"].append(own)

    def _good_enough(self, found: Fitted) -> bool:
        lost = self.told["val_accuracy"] - found.metrics["val_accuracy"]
        return bool(lost <= self.how.epsilon + 1e-9)  # accuracies are rounded

    def _scores(self) -> Tensor:
        return torch.tensor([one for layer in self.told["scores"] for one in layer], dtype=torch.float64)

    def _metrics(self, own: Told) -> Told:
        """Of the outcome: its own, with the fit's before it in the same job."""
        before = {} if self.how.version else self.parent.metrics
        passes = before.get("forward_passes", 0) + self.told["forward_passes"]
        searched = {name: before[name] for name in ("search",) if name in before}
        return {**own, **searched, "forward_passes": passes, "condense": self.told}

    # --- for whoever watches, and for the next attempt ----------------------------------------------------------------

    def _keep(self, now: Checkpoint) -> None:
        parent = self.parent
        about = {
            "method": parent.method.name,
            "recipe": parent.recipe.to_json(),
            "prompt_lengths": list(parent.prompt_lengths),
            "metrics": parent.metrics,
        }
        tensors = {name: torch.tensor(value) for name, value in parent.params.items()}
        self.keep(replace(now, parent=tensors, condense={"parent": about, "told": self.told}))

    def _watch(self, progress: Progress) -> None:
        self.watch(self._progress(progress))

    def _progress(self, progress: Progress, tried: Told | None = None) -> Progress:
        trial = len(self.told.get("sweep", ())) + 1
        return replace(progress, epoch_ended=False, eta_s=None, trial=trial, trials=len(self.counts), tried=tried)


def refit_recipe(recipe: Recipe) -> Recipe:
    """The same schedule in fewer epochs, too few for patience."""
    assert recipe.condense is not None
    epochs = recipe.condense.epochs or max(1, round(REFIT_SHARE * recipe.epochs))
    warmup = recipe.warmup_epochs * epochs / recipe.epochs
    return replace(recipe, epochs=epochs, warmup_epochs=warmup, patience=0, init="uniform")


def counts(prompts: int, shares: Sequence[float]) -> list[int]:
    """How many of `prompts` are tried, the fewest first; at least one, and never all."""
    found = sorted({max(1, round(share * prompts)) for share in shares})
    return [count for count in found if count < prompts]


def cut(parent: Fitted, score: Tensor, count: int) -> Fitted:
    """The parent with its `count` best prompts of all layers [Σp], in their order; of equals the earlier."""
    order = torch.sort(score, descending=True, stable=True).indices
    kept = torch.zeros(len(score), dtype=torch.bool)
    kept[order[:count]] = True
    lengths = tuple(int(layer.sum()) for layer in kept.split(list(parent.prompt_lengths)))
    params = {**parent.params, "prompts": parent.params["prompts"][kept.numpy()]}
    return replace(parent, params=params, prompt_lengths=lengths)


def scores(run: Fit, train: Inputs) -> Fitting[Tensor]:
    """Each prompt's score [Σp] in float64: the mean over the training pictures of |Σ_d ∂L/∂P_d · P_d|.

    Every row of a batch gets prompts of its own, [B, Σp, D], as for prompt dropout: so one backward gives each
    picture's gradient by itself.
    """
    prompts = run.params["prompts"].detach()
    total = torch.zeros(len(prompts), dtype=torch.float64)
    batches = torch.arange(len(train.targets)).split(run.recipe.batch_size)
    with closing(train.read([index.numpy() for index in batches])) as pixels:
        for index, read in zip(batches, pixels, strict=True):
            own = prompts.expand(len(index), -1, -1).clone().requires_grad_(True)
            lens, targets = run.lens({**run.params, "prompts": own}), train.targets[index].to(own.device)
            ask = run.ask(train, index, read, condition(lens, len(index)))
            yield replace(ask, loss=partial(run.loss, lens=lens, targets=targets))  # a mean over the batch's rows
            assert own.grad is not None
            each = (own.grad.double() * prompts.double()).sum(-1).abs()  # [B, Σp]
            total += each.sum(0).cpu() * len(index)
            run.tick()
    for value in run.params.values():
        value.grad = None
    if not math.isfinite(float(total.sum())):
        raise DivergedError("the loss of what is to be condensed is not finite")
    return total / len(train.targets)
