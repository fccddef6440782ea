"""Fitting: parameters → lens → the one forward → loss, and back. The backbone stays frozen.

A fit is a generator (see `together`): it yields what it wants of the backbone and never runs it itself. Every random
choice (initial parameters, order of the pictures, their views, prompt dropout) comes from a generator seeded by the
recipe's seed and the epoch, so an epoch can be repeated without the ones before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from server.engine import vit
from server.engine.backbone import Backbone
from server.engine.lens import Condition, Lens, condition
from server.engine.spec import Pool, Spec
from server.errors import Unprocessable
from server.methods import pooling
from server.methods.method import Method, Params

from . import augment, metrics, token_init
from .checkpoint import Checkpoint, optimizer_tensors, restore_optimizer
from .co_batching import Fitting, ForwardRequest, alone
from .data import LabelledImages, Pixels, Splits
from .frozen import FrozenFeatures, parts
from .inputs import Inputs
from .optimizer import lr_scale, make_optimizer, set_lr
from .progress import Clock, Progress, Watcher, nobody
from .recipe import Recipe

Keeper = Callable[[Checkpoint], None]


def nowhere(checkpoint: Checkpoint) -> None:
    """For a fit that is not to be resumed."""


@dataclass(frozen=True)
class Fitted:
    """The outcome: parameters in float32 on the CPU, the recipe that led to them, and what they achieve."""

    method: Method
    recipe: Recipe
    params: dict[str, NDArray[np.float32]]
    prompt_lengths: tuple[int, ...]
    metrics: dict[str, Any]


class DivergedError(ArithmeticError):
    """The loss is no longer finite; the message says what to try."""


def fit(
    backbone: Backbone,
    method: Method,
    splits: Splits,
    labels: int,
    recipe: Recipe,
    *,
    watch: Watcher = nobody,
    keep: Keeper = nowhere,
    resume: Checkpoint | None = None,
) -> Fitted:
    """One fit by itself: see `fitting`."""
    return alone(backbone, fitting(backbone, method, splits, labels, recipe, watch=watch, keep=keep, resume=resume))


def fitting(
    backbone: Backbone,
    method: Method,
    splits: Splits,
    labels: int,
    recipe: Recipe,
    *,
    watch: Watcher = nobody,
    keep: Keeper = nowhere,
    resume: Checkpoint | None = None,
    frozen: FrozenFeatures | None = None,
    start: Fitted | None = None,
    each_epoch: bool = True,
) -> Fitting[Fitted]:
    """Fit `method` on the training pictures for `labels` classes; `together.run` runs it.

    `watch` is called after every batch; what it raises ends the fit, which is how a job is cancelled within a step.
    `keep` is given the state after every epoch; with `resume` a fit goes on from there, and ends with the same bits.
    `frozen` shares features between fits on the same pictures; `start` holds the parameters and prompt lengths to begin
    with, instead of fresh ones; without `each_epoch` the validation pictures are looked at once, at the end. Raises
    DivergedError, and Unprocessable for a recipe that does not go with the backbone or the method.
    """
    if (reason := pooling.unsupported_pool(backbone.spec, recipe.pool)) is not None:
        raise Unprocessable(reason)
    lengths = start.prompt_lengths if start else prompt_lengths(backbone.spec, method, recipe)
    run = Fit(backbone, method, recipe, lengths, frozen or FrozenFeatures(backbone), watch, keep)
    run.shown = Progress(resume.epoch if resume else 0, recipe.epochs)
    yield from run.begin(splits.train, labels, start, resume)
    train, val = (yield from run.inputs(splits.train)), (yield from run.inputs(splits.val))
    yield from run.optimise(train, val if each_epoch else None, resume)
    return (yield from run.finished(train, val, splits.test))


@dataclass
class Fit:
    """One fit under way. `weights`: of the classes [C], where they differ."""

    backbone: Backbone
    method: Method
    recipe: Recipe
    prompt_lengths: tuple[int, ...]
    frozen: FrozenFeatures
    watch: Watcher = nobody
    keep: Keeper = nowhere
    params: Params = field(default_factory=dict)
    weights: Tensor | None = None
    best: dict[str, Tensor] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=lambda: {"loss": [], "val_accuracy": [], "val_nll": []})
    passes: int = 0
    shown: Progress = field(default_factory=Progress)

    def begin(
        self, train: LabelledImages, labels: int, start: Fitted | None, resume: Checkpoint | None
    ) -> Fitting[None]:
        """The parameters before the next step: a checkpoint's, given ones, or fresh. And what each class weighs."""
        if self.recipe.class_weights == "balanced":
            self.weights = class_weights(train.targets, labels).to(self.backbone.device)
        generator = seeded(self.recipe.seed, 0)
        params = self.method.init(self.backbone.spec, self.prompt_lengths, labels, generator)
        if resume is not None and resume.epoch:  # in the order of `init`, by which the optimiser knows them
            params = {name: resume.params[name].clone() for name in params}
        elif start is not None:
            params = {name: torch.tensor(start.params[name], dtype=torch.float32) for name in params}
        elif self.recipe.init != "uniform":
            params |= yield from self._from_tokens(train, generator)
        self.params = {name: value.to(self.backbone.device).requires_grad_(True) for name, value in params.items()}

    def _from_tokens(self, train: LabelledImages, generator: torch.Generator) -> Fitting[Params]:
        recipe, lengths = self.recipe, self.prompt_lengths
        token_init.refuse_without_prompts(self.method, self.backbone.spec, f"init {recipe.init!r}")
        if not sum(lengths):
            return {}
        seen = token_init.pictures_for(train, recipe.seed)
        self.passes += len(seen)
        prompts = token_init.token_prompts(self.frozen, seen, lengths, recipe.init, generator=generator, tick=self.tick)
        return {"prompts": (yield from prompts)}

    def inputs(self, pictures: LabelledImages, again: bool = True) -> Fitting[Inputs]:
        """What lies before the first trained layer does not change from epoch to epoch, nor does what readers read:
        computed once. `again`: whether they are looked at more than once, as keys and values must be to be kept."""
        targets, (layer, pool) = torch.from_numpy(pictures.targets), self._begins()
        if self._reads():
            return (yield from self._readers_inputs(pictures, targets, layer, again))
        if layer == 0 or self.recipe.augment != "none" or not self.frozen.fits(len(pictures), layer):
            return Inputs(pictures, None, 0, targets)
        if layer == self.backbone.spec.depth:
            self.passes += len(pictures)  # also where they are known: a repeated fit says what the first one said
        features = yield from self.frozen.of(pictures.images, layer, self.tick, pool)
        return Inputs(pictures, features, layer, targets)

    def _readers_inputs(self, pictures: LabelledImages, targets: Tensor, layer: int, again: bool) -> Fitting[Inputs]:
        if not again or self.recipe.augment != "none" or not self.frozen.readable(len(pictures), layer):
            return Inputs(pictures, None, layer, targets)
        read = yield from self.frozen.read(pictures.images, layer, self.tick)
        self.passes += len(read)
        return Inputs(pictures, None, layer, targets, read)

    # --- epochs -------------------------------------------------------------------------------------------------------

    def optimise(self, train: Inputs, val: Inputs | None, resume: Checkpoint | None) -> Fitting[None]:
        """All epochs that are still to do: steps over shuffled batches, then the look at the validation pictures."""
        recipe, done = self.recipe, 0
        optimizer = make_optimizer(self.params, recipe)
        if resume is not None and resume.epoch:
            restore_optimizer(optimizer, resume.optimizer)
            done, self.passes, self.best = resume.epoch, resume.passes, {**resume.best}
            self.curves = {name: list(values) for name, values in resume.curves.items()}
        clock = Clock(recipe.epochs - done)
        for epoch in range(done + 1, recipe.epochs + 1):
            if self._out_of_patience():
                break
            loss, steps = yield from self._epoch(optimizer, train, epoch, lambda now: clock.eta_s(now - done))
            self.curves["loss"].append(loss)
            if val is not None:
                self._note((yield from self.logits(val)), val.pictures.targets)
            self.keep(Checkpoint(epoch, self.params, optimizer_tensors(optimizer), self.best, self.curves, self.passes))
            left_s = clock.eta_s(epoch - done)
            self._show(Progress(epoch, recipe.epochs, steps, steps, loss, self._accuracy(), left_s, epoch_ended=True))

    def _epoch(
        self, optimizer: torch.optim.Optimizer, train: Inputs, epoch: int, eta_s: Callable[[float], float | None]
    ) -> Fitting[tuple[float, int]]:
        """One pass over the training pictures in an order of its own. Returns the mean loss and the number of steps."""
        recipe, total = self.recipe, 0.0
        generator = seeded(recipe.seed, epoch)
        batches = torch.randperm(len(train.targets), generator=generator).split(recipe.batch_size)
        views = augment.draw(recipe.augment, len(train.targets), generator)
        with closing(train.read([index.numpy() for index in batches], views)) as pixels:
            for step, (index, read) in enumerate(zip(batches, pixels, strict=True), start=1):
                now = epoch - 1 + step / len(batches)
                set_lr(optimizer, recipe.lr * lr_scale(recipe, now))
                loss = yield from self._step(optimizer, train, index, read, generator)
                total += loss * len(index)
                at = Progress(epoch, recipe.epochs, step, len(batches), loss, self._accuracy(), eta_s(now))
                self._show(replace(at, learned=len(index)))
        return total / len(train.targets), len(batches)

    def _step(
        self,
        optimizer: torch.optim.Optimizer,
        train: Inputs,
        index: Tensor,
        pixels: Pixels | None,
        generator: torch.Generator,
    ) -> Fitting[float]:
        """One optimiser step on the pictures `index`. Returns the batch's mean loss."""
        targets = train.targets[index].to(self.backbone.device)
        lens = self.lens(self._drop_prompts(len(index), generator))
        optimizer.zero_grad(set_to_none=True)
        if train.pooled:
            loss = self.loss(self.x(train, index, pixels), lens, targets)
            loss.backward()
        else:
            ask = self.ask(train, index, pixels, condition(lens, len(index)))
            loss = yield replace(ask, loss=lambda features: self.loss(features, lens, targets))
        optimizer.step()
        value = loss.item()
        if not math.isfinite(value):
            recipe = self.recipe
            hint = f"try a smaller learning rate than {recipe.lr:g} ({recipe.optimizer})"
            raise DivergedError(f"the loss became {value}; {hint}")
        return value

    def loss(self, features: Tensor, lens: Lens, targets: Tensor) -> Tensor:
        logits = vit.classify(features, lens).float()
        return F.cross_entropy(logits, targets, self.weights, label_smoothing=self.recipe.label_smoothing)

    def _drop_prompts(self, rows: int, generator: torch.Generator) -> Params:
        """Prompt dropout differs from sample to sample, as in the official VPT code: prompts become [B, Σp, D]."""
        rate = self.recipe.prompt_dropout
        if rate == 0 or "prompts" not in self.params:
            return self.params
        prompts = self.params["prompts"]
        keep = torch.rand(rows, *prompts.shape, generator=generator) >= rate
        return {**self.params, "prompts": prompts * keep.to(prompts.device) / (1 - rate)}

    def _show(self, progress: Progress) -> None:
        self.shown = replace(progress, epoch_ended=False, learned=0)
        self.watch(progress)

    def tick(self) -> None:
        """Nothing new, but a way out for whoever watches: a look at many pictures takes longer than a step."""
        self.watch(self.shown)

    # --- judging ------------------------------------------------------------------------------------------------------

    def logits(self, inputs: Inputs) -> Fitting[NDArray[np.float64]]:
        """Logits [n, C] of all pictures, without dropout and without views."""
        found = []
        with torch.inference_mode():
            lens = self.lens(self.params)
        order = parts(len(inputs.targets))
        with closing(inputs.read(order)) as pixels:
            for index, read in zip(order, pixels, strict=True):
                chosen = torch.from_numpy(index)
                if inputs.pooled:
                    features = self.x(inputs, chosen, read)
                else:
                    features = yield self.ask(inputs, chosen, read, condition(lens, len(index)))
                with torch.inference_mode():
                    found.append(vit.classify(features, lens).double().cpu().numpy())
                self.tick()
        return np.concatenate(found)

    def _note(self, logits: NDArray[np.float64], targets: NDArray[np.int64]) -> None:
        losses, nll = self.curves["val_nll"], metrics.nll(logits, targets)
        if self.recipe.patience and nll <= min(losses, default=math.inf):
            self.best = {name: value.detach().clone() for name, value in self.params.items()}
        self.curves["val_accuracy"].append(metrics.accuracy(logits, targets))
        losses.append(nll)

    def _accuracy(self) -> float | None:
        """Of the last epoch that was judged."""
        found = self.curves["val_accuracy"]
        return found[-1] if found else None

    def _out_of_patience(self) -> bool:
        losses = self.curves["val_nll"]
        return bool(self.recipe.patience and losses) and len(losses) - self._best_epoch() >= self.recipe.patience

    def _best_epoch(self) -> int:
        """From 1; the later one of equals."""
        losses = self.curves["val_nll"]
        return len(losses) - int(np.argmin(losses[::-1]))

    # --- the outcome --------------------------------------------------------------------------------------------------

    def finished(self, train: Inputs, val: Inputs, test: LabelledImages | None) -> Fitting[Fitted]:
        """The parameters that count, calibrated on the validation pictures, and what they achieve."""
        found, heat = yield from self.judged(train, val, test)
        params = _calibrated({name: value.detach().float().cpu() for name, value in self.params.items()}, heat)
        arrays = {name: value.numpy() for name, value in params.items()}
        return Fitted(self.method, self.recipe, arrays, self.prompt_lengths, found)

    def judged(self, train: Inputs, val: Inputs, test: LabelledImages | None) -> Fitting[tuple[dict[str, Any], float]]:
        """What the parameters that count achieve, and the temperature that calibrates them."""
        if self.best:
            self.take_best()
        logits = yield from self.logits(val)
        heat = metrics.temperature(logits, val.pictures.targets)
        found: dict[str, Any] = {
            "train_images": len(train.targets),
            "train_loss": round(self.curves["loss"][-1], 6),
            "temperature": round(heat, 6),
            "ece_uncalibrated": round(metrics.calibration_error(logits, val.pictures.targets), 6),
            **_named("val", metrics.judged(logits / heat, val.pictures.targets)),
            "curve": {name: [round(x, 5) for x in values] for name, values in self.curves.items()},
        }
        if self.recipe.patience:
            found["best_epoch"] = self._best_epoch()
        if test is not None:
            seen = yield from self.inputs(test, again=False)
            judged = metrics.judged((yield from self.logits(seen)) / heat, test.targets)
            found |= _named("test", judged)
        found["forward_passes"] = self.passes
        return found, heat

    def take_best(self) -> None:
        self.params = self.best

    # --- the backbone's inputs ----------------------------------------------------------------------------------------

    def ask(self, inputs: Inputs, index: Tensor, pixels: Pixels | None, rows: Condition) -> ForwardRequest:
        """The features of a batch; `passes` counts its pictures but those whose trunk has been run."""
        x = self.x(inputs, index, pixels)
        self.passes += len(x)
        return ForwardRequest(x, rows, start=inputs.layer, kept=inputs.kept(index))

    def x(self, inputs: Inputs, index: Tensor, pixels: Pixels | None) -> Tensor:
        """What enters block `inputs.layer`: [B, N, D], or the pooled features [B, D]."""
        if pixels is not None:
            return self.frozen.embedded(pixels)
        if inputs.recorded is not None:
            return inputs.recorded.first.new_empty(0, 1, 1)  # nothing is left to be run
        assert inputs.features is not None
        return inputs.features[index].to(self.backbone.device)

    def _begins(self) -> tuple[int, Pool | None]:
        """The first layer that the fit has a part in, and what is pooled where that is none."""
        with torch.inference_mode():
            lens = self.lens(self.params)
        return lens.first_layer, lens.pool

    def _reads(self) -> bool:
        """Whether what is fitted reads the trunk and leaves it as it is."""
        with torch.inference_mode():
            return self.lens(self.params).reads_from is not None

    def lens(self, params: Params) -> Lens:
        cast = {name: value.to(self.backbone.dtype) for name, value in params.items()}
        return pooling.lower_with_pool(self.method, self.backbone, cast, self.prompt_lengths, self.recipe.pool)


def prompt_lengths(spec: Spec, method: Method, recipe: Recipe) -> tuple[int, ...]:
    """Prompts of each layer [L]: the method's, in the layers that the recipe allows (VPT, section 4.3, prompt depth).

    Raises Unprocessable (invalid_request) where that leaves a method that has prompts without any.
    """
    lengths = method.prompt_lengths(spec, recipe.prompts)
    if recipe.prompt_layers is None:
        return lengths
    first, last = recipe.prompt_layers
    kept = tuple(length if first <= layer <= last else 0 for layer, length in enumerate(lengths))
    if any(lengths) and not any(kept):
        where = [layer for layer, length in enumerate(lengths) if length]
        raise Unprocessable(f"prompt_layers {first} to {last} hold no prompt: {method.name} has them in layers {where}")
    return kept


def class_weights(targets: NDArray[np.int64], labels: int) -> Tensor:
    """n / (C · n_c) of each class [C]: a class's pictures together weigh the same, however few they are."""
    counts = np.bincount(targets, minlength=labels)
    return torch.from_numpy(len(targets) / (labels * np.maximum(counts, 1))).float()


def seeded(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def _named(split: str, judged: dict[str, Any]) -> dict[str, Any]:
    """The figures people look for first stand by themselves; the rest under the split's name."""
    return {f"{split}_accuracy": judged["accuracy"], f"{split}_images": judged["images"], split: judged}


def _calibrated(params: Params, heat: float) -> Params:
    """Dividing the head by the temperature divides the logits: the served scores are calibrated at no cost."""
    return {name: value / heat if name in ("head.weight", "head.bias") else value for name, value in params.items()}
