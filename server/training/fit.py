"""Fitting: parameters → lens → the one forward → loss, and back. The backbone stays frozen.

A fit is a generator (see `co_batching`): it yields requests for the backbone and never runs it itself. Every random
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
from .checkpoint import Checkpoint, OnCheckpoint, ignore_checkpoint, optimizer_tensors, restore_optimizer
from .co_batching import Fitting, ForwardRequest, run_alone
from .data import LabelledImages, Pixels, Splits
from .frozen import EVAL_BATCH, FrozenFeatures, parts
from .inputs import Inputs
from .optimizer import lr_scale, make_optimizer, set_lr
from .progress import EpochClock, OnProgress, Progress, Work, ignore_progress
from .recipe import Recipe


@dataclass(frozen=True)
class FitResult:
    """Fitted parameters in float32 on the CPU, their recipe and their metrics."""

    method: Method
    recipe: Recipe
    params: dict[str, NDArray[np.float32]]
    prompt_lengths: tuple[int, ...]
    metrics: dict[str, Any]


class DivergedError(ArithmeticError):
    """The loss is no longer finite. The message says what to change."""


def fit(
    backbone: Backbone,
    method: Method,
    splits: Splits,
    labels: int,
    recipe: Recipe,
    *,
    on_progress: OnProgress = ignore_progress,
    on_checkpoint: OnCheckpoint = ignore_checkpoint,
    resume: Checkpoint | None = None,
) -> FitResult:
    """Run `fitting` by itself and return its result."""
    steps = fitting(
        backbone, method, splits, labels, recipe, on_progress=on_progress, on_checkpoint=on_checkpoint, resume=resume
    )
    return run_alone(backbone, steps)


def fitting(
    backbone: Backbone,
    method: Method,
    splits: Splits,
    labels: int,
    recipe: Recipe,
    *,
    on_progress: OnProgress = ignore_progress,
    on_checkpoint: OnCheckpoint = ignore_checkpoint,
    resume: Checkpoint | None = None,
    frozen: FrozenFeatures | None = None,
    start: FitResult | None = None,
    each_epoch: bool = True,
) -> Fitting[FitResult]:
    """Fit `method` on the training pictures for `labels` classes. The generator is for `co_batching.run`.

    `on_progress` is called after every batch; an exception that it raises ends the fit, which is how a job is cancelled
    within a step. `on_checkpoint` receives the state after every epoch; a fit that resumes from it ends with the same
    bits. `frozen` shares features between fits on the same pictures. `start` holds initial parameters and prompt
    lengths, instead of fresh ones. Without `each_epoch` the validation pictures are evaluated once, at the end. Raises
    DivergedError, and Unprocessable for a recipe that the backbone or the method does not support.
    """
    if (reason := pooling.unsupported_pool(backbone.spec, recipe.pool)) is not None:
        raise Unprocessable(reason)
    lengths = start.prompt_lengths if start else prompt_lengths(backbone.spec, method, recipe)
    run = Fit(backbone, method, recipe, lengths, frozen or FrozenFeatures(backbone), on_progress, on_checkpoint)
    run.latest = Progress(resume.epoch if resume else 0, recipe.epochs)
    yield from run.begin(splits.train, labels, start, resume)
    run.plan(splits, resume.epoch if resume else 0, each_epoch=each_epoch)
    train, val = (yield from run.inputs(splits.train)), (yield from run.inputs(splits.val))
    yield from run.optimise(train, val if each_epoch else None, resume)
    return (yield from run.result(train, val, splits.test))


@dataclass
class Fit:
    """The state of one fit. `weights`: class weights [C], or None where all weigh the same. `passes`: pictures that
    went through the backbone. `work`: how much of the fit is done. `latest`: the last progress that was reported."""

    backbone: Backbone
    method: Method
    recipe: Recipe
    prompt_lengths: tuple[int, ...]
    frozen: FrozenFeatures
    on_progress: OnProgress = ignore_progress
    on_checkpoint: OnCheckpoint = ignore_checkpoint
    params: Params = field(default_factory=dict)
    weights: Tensor | None = None
    best: dict[str, Tensor] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=lambda: {"loss": [], "val_accuracy": [], "val_nll": []})
    passes: int = 0
    work: Work = field(default_factory=Work)
    latest: Progress = field(default_factory=Progress)
    _cached_at: float = field(default=0.0, init=False)  # `work.done` when the features that are computed are complete

    def begin(
        self, train: LabelledImages, labels: int, start: FitResult | None, resume: Checkpoint | None
    ) -> Fitting[None]:
        """Set the class weights and the initial parameters: a checkpoint's, those of `start`, or fresh ones."""
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
        token_init.require_prompts(self.method, self.backbone.spec, f"init {recipe.init!r}")
        if not sum(lengths):
            return {}
        pictures = token_init.pictures_for(train, recipe.seed)
        self.passes += len(pictures)
        prompts = yield from token_init.token_prompts(
            self.frozen, pictures, lengths, recipe.init, generator=generator, tick=self.tick
        )
        return {"prompts": prompts}

    def plan(self, splits: Splits, done: int, *, each_epoch: bool) -> None:
        """Estimate the work of the fit, of which `done` epochs are done: only the progress depends on it."""
        train, val, test = len(splits.train), len(splits.val), len(splits.test or ())
        layer, _ = self._first_layer()
        if layer == self.backbone.spec.depth and self.recipe.augment == "none":
            self.work = Work(trained=0.01, evaluated=0.01)  # a head on features
        epoch = self.work.trained * train + self.work.evaluated * val * each_epoch
        features = train + val if layer and self.recipe.augment == "none" else 0
        self.work.total = features + epoch * self.recipe.epochs + self.work.evaluated * val + test
        self.work.done = epoch * done

    def inputs(self, pictures: LabelledImages, again: bool = True) -> Fitting[Inputs]:
        """The inputs of a set of pictures. What lies before the first trained layer is the same in every epoch, and so
        is what readers read: both are computed once. `again`: whether the pictures are read more than once; only then
        are keys and values recorded."""
        self._cached_at, self.latest = self.work.done + len(pictures), replace(self.latest, phase="features")
        inputs = yield from self._inputs(pictures, again)
        self.latest = replace(self.latest, phase="fit")
        if inputs.layer or inputs.recorded is not None:
            self.work.done = self._cached_at  # where they were cached before, too
        return inputs

    def _inputs(self, pictures: LabelledImages, again: bool) -> Fitting[Inputs]:
        targets, (layer, pool) = torch.from_numpy(pictures.targets), self._first_layer()
        if self._is_reader():
            return (yield from self._reader_inputs(pictures, targets, layer, again))
        if layer == 0 or self.recipe.augment != "none" or not self.frozen.fits(len(pictures), layer):
            return Inputs(pictures, None, 0, targets)
        if layer == self.backbone.spec.depth:
            self.passes += len(pictures)  # also where they are cached: a repeated fit reports the same number
        features = yield from self.frozen.features(pictures.images, layer, self._feature_tick, pool)
        return Inputs(pictures, features, layer, targets)

    def _reader_inputs(self, pictures: LabelledImages, targets: Tensor, layer: int, again: bool) -> Fitting[Inputs]:
        if not again or self.recipe.augment != "none" or not self.frozen.recordable(len(pictures), layer):
            return Inputs(pictures, None, layer, targets)
        recorded = yield from self.frozen.recorded(pictures.images, layer, self._feature_tick)
        self.passes += len(recorded)
        return Inputs(pictures, None, layer, targets, recorded)

    # --- epochs -------------------------------------------------------------------------------------------------------

    def optimise(self, train: Inputs, val: Inputs | None, resume: Checkpoint | None) -> Fitting[None]:
        """Run the remaining epochs: steps over shuffled batches, then the evaluation on the validation pictures."""
        recipe, done = self.recipe, 0
        optimizer = make_optimizer(self.params, recipe)
        if resume is not None and resume.epoch:
            restore_optimizer(optimizer, resume.optimizer)
            done, self.passes, self.best = resume.epoch, resume.passes, {**resume.best}
            self.curves = {name: list(values) for name, values in resume.curves.items()}
        clock = EpochClock(recipe.epochs - done)
        for epoch in range(done + 1, recipe.epochs + 1):
            if self._out_of_patience():
                break
            loss, steps = yield from self._epoch(optimizer, train, epoch, lambda now: clock.eta_s(now - done))
            self.curves["loss"].append(loss)
            if val is not None:
                self._record_validation((yield from self.logits(val)), val.pictures.targets)
            self.on_checkpoint(self._checkpoint(epoch, optimizer))
            left_s = clock.eta_s(epoch - done)
            self._report(Progress(epoch, recipe.epochs, steps, steps, loss, self._accuracy(), left_s, epoch_ended=True))

    def _checkpoint(self, epoch: int, optimizer: torch.optim.Optimizer) -> Checkpoint:
        return Checkpoint(epoch, self.params, optimizer_tensors(optimizer), self.best, self.curves, self.passes)

    def _epoch(
        self, optimizer: torch.optim.Optimizer, train: Inputs, epoch: int, eta_s: Callable[[float], float | None]
    ) -> Fitting[tuple[float, int]]:
        """One pass over the shuffled training pictures. Returns the mean loss and the number of steps."""
        recipe, total = self.recipe, 0.0
        generator = seeded(recipe.seed, epoch)
        batches = torch.randperm(len(train.targets), generator=generator).split(recipe.batch_size)
        views = augment.draw(recipe.augment, len(train.targets), generator)
        with closing(train.read([index.numpy() for index in batches], views)) as pixels:
            for step, (index, batch) in enumerate(zip(batches, pixels, strict=True), start=1):
                now = epoch - 1 + step / len(batches)
                set_lr(optimizer, recipe.lr * lr_scale(recipe, now))
                loss = yield from self._step(optimizer, train, index, batch, generator)
                total += loss * len(index)
                self.work.done += self.work.trained * len(index)
                progress = Progress(epoch, recipe.epochs, step, len(batches), loss, self._accuracy(), eta_s(now))
                self._report(replace(progress, trained_images=len(index)))
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
            request = self.request(train, index, pixels, condition(lens, len(index)))
            loss = yield replace(request, loss=lambda features: self.loss(features, lens, targets))
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
        kept = torch.rand(rows, *prompts.shape, generator=generator) >= rate
        return {**self.params, "prompts": prompts * kept.to(prompts.device) / (1 - rate)}

    def _report(self, progress: Progress) -> None:
        nll = self.curves["val_nll"][-1] if self.curves["val_nll"] else None
        progress = replace(progress, phase="fit", share=self.work.share, val_nll=nll)
        self.latest = replace(progress, epoch_ended=False, trained_images=0)
        self.on_progress(progress)

    def tick(self, work: float = 0.0) -> None:
        """Report the latest progress again after so much `work`, so that `on_progress` can end the fit: evaluating many
        pictures takes longer than a step."""
        self.work.done += work
        self.latest = replace(self.latest, share=self.work.share)
        self.on_progress(self.latest)

    def _feature_tick(self) -> None:
        self.tick(min(EVAL_BATCH, self._cached_at - self.work.done))

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def logits(self, inputs: Inputs) -> Fitting[NDArray[np.float64]]:
        """Logits [n, C] of all pictures, without dropout and without augmentation."""
        answers = []
        with torch.inference_mode():
            lens = self.lens(self.params)
        order = parts(len(inputs.targets))
        with closing(inputs.read(order)) as pixels:
            for rows, batch in zip(order, pixels, strict=True):
                index = torch.from_numpy(rows)
                if inputs.pooled:
                    features = self.x(inputs, index, batch)
                else:
                    features = yield self.request(inputs, index, batch, condition(lens, len(index)))
                with torch.inference_mode():
                    answers.append(vit.classify(features, lens).double().cpu().numpy())
                self.tick(self.work.evaluated * len(rows))
        return np.concatenate(answers)

    def _record_validation(self, logits: NDArray[np.float64], targets: NDArray[np.int64]) -> None:
        losses, nll = self.curves["val_nll"], metrics.nll(logits, targets)
        if self._keeps_best() and nll <= min(losses, default=math.inf):
            self.best = {name: value.detach().clone() for name, value in self.params.items()}
        self.curves["val_accuracy"].append(metrics.accuracy(logits, targets))
        losses.append(nll)

    def _keeps_best(self) -> bool:
        """Whether the parameters of the epoch with the lowest validation loss are the result, not the last ones."""
        return True

    def _accuracy(self) -> float | None:
        """The validation accuracy of the last evaluated epoch."""
        accuracies = self.curves["val_accuracy"]
        return accuracies[-1] if accuracies else None

    def _out_of_patience(self) -> bool:
        losses = self.curves["val_nll"]
        return bool(self.recipe.patience and losses) and len(losses) - self._best_epoch() >= self.recipe.patience

    def _best_epoch(self) -> int:
        """The epoch of the lowest validation loss, counted from 1; of equal ones the last."""
        losses = self.curves["val_nll"]
        return len(losses) - int(np.argmin(losses[::-1]))

    # --- the result ---------------------------------------------------------------------------------------------------

    def result(self, train: Inputs, val: Inputs, test: LabelledImages | None) -> Fitting[FitResult]:
        """The final or the best parameters, calibrated on the validation pictures, and their metrics."""
        figures, temperature = yield from self.evaluate(train, val, test)
        params = _calibrated({name: value.detach().float().cpu() for name, value in self.params.items()}, temperature)
        arrays = {name: value.numpy() for name, value in params.items()}
        return FitResult(self.method, self.recipe, arrays, self.prompt_lengths, figures)

    def evaluate(
        self, train: Inputs, val: Inputs, test: LabelledImages | None
    ) -> Fitting[tuple[dict[str, Any], float]]:
        """The metrics of the final or the best parameters, and the temperature that calibrates them."""
        if self.best:
            self.take_best()
        logits = yield from self.logits(val)
        temperature = metrics.temperature(logits, val.pictures.targets)
        figures: dict[str, Any] = {
            "train_images": len(train.targets),
            "train_loss": round(self.curves["loss"][-1], 6),
            "temperature": round(temperature, 6),
            "ece_uncalibrated": round(metrics.calibration_error(logits, val.pictures.targets), 6),
            **_named("val", metrics.split_figures(logits / temperature, val.pictures.targets)),
            "curve": {name: [round(x, 5) for x in values] for name, values in self.curves.items()},
        }
        if self.best:
            figures["best_epoch"] = self._best_epoch()
        if test is not None:
            test_inputs = yield from self.inputs(test, again=False)
            test_logits = yield from self.logits(test_inputs)
            figures |= _named("test", metrics.split_figures(test_logits / temperature, test.targets))
        figures["forward_passes"] = self.passes
        return figures, temperature

    def take_best(self) -> None:
        self.params = self.best

    # --- the backbone's inputs ----------------------------------------------------------------------------------------

    def request(self, inputs: Inputs, index: Tensor, pixels: Pixels | None, rows: Condition) -> ForwardRequest:
        """A request for the features of a batch. `passes` counts its pictures, except those whose trunk is recorded."""
        x = self.x(inputs, index, pixels)
        self.passes += len(x)
        return ForwardRequest(x, rows, start=inputs.layer, recorded=inputs.recorded_rows(index))

    def x(self, inputs: Inputs, index: Tensor, pixels: Pixels | None) -> Tensor:
        """The tokens [B, N, D] that enter block `inputs.layer`, or the pooled features [B, D]."""
        if pixels is not None:
            return self.frozen.embedded(pixels)
        if inputs.recorded is not None:
            return inputs.recorded.first.new_empty(0, 1, 1)  # the trunk of every row is recorded
        assert inputs.features is not None
        return inputs.features[index].to(self.backbone.device)

    def _first_layer(self) -> tuple[int, Pool | None]:
        """The first layer that the fit changes, and the pooling of a fit that changes none."""
        with torch.inference_mode():
            lens = self.lens(self.params)
        return lens.first_layer, lens.pool

    def _is_reader(self) -> bool:
        """Whether the fitted lens reads the trunk and leaves it unchanged."""
        with torch.inference_mode():
            return self.lens(self.params).reads_from is not None

    def lens(self, params: Params) -> Lens:
        cast = {name: value.to(self.backbone.dtype) for name, value in params.items()}
        return pooling.lower_with_pool(self.method, self.backbone, cast, self.prompt_lengths, self.recipe.pool)


def prompt_lengths(spec: Spec, method: Method, recipe: Recipe) -> tuple[int, ...]:
    """The number of prompts of each layer [L]: the method's, in the recipe's layers (VPT, section 4.3, prompt depth).

    Raises Unprocessable (invalid_request) where a method with prompts is left without any.
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
    """n / (C · n_c) for each class [C]: the pictures of every class have the same total weight."""
    counts = np.bincount(targets, minlength=labels)
    return torch.from_numpy(len(targets) / (labels * np.maximum(counts, 1))).float()


def seeded(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def _named(split: str, figures: dict[str, Any]) -> dict[str, Any]:
    """A split's figures under its name, with accuracy and number of images repeated at the top level."""
    return {f"{split}_accuracy": figures["accuracy"], f"{split}_images": figures["images"], split: figures}


def _calibrated(params: Params, temperature: float) -> Params:
    """Dividing the head by the temperature divides the logits: the served scores are calibrated at no cost."""
    head = ("head.weight", "head.bias")
    return {name: value / temperature if name in head else value for name, value in params.items()}
