"""Fitting: parameters → lens → the one forward → loss, and back. The backbone stays frozen.

Every random choice (initial parameters, order of the pictures, prompt dropout) comes from a generator seeded by the
recipe's seed and the epoch, so an epoch can be repeated without the ones before it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from server.engine import vit
from server.engine.backbone import Backbone
from server.engine.engine import normalise
from server.engine.lens import Lens, Plain, condition
from server.methods.method import Method, Params

from .checkpoint import Checkpoint, optimizer_tensors, restore_optimizer
from .data import Pictures, Splits
from .recipe import Recipe

NO_DECAY = ("head.bias",)  # as the official VPT code
EVAL_BATCH = 64


@dataclass(frozen=True)
class Progress:
    """How far a fit is, for whoever watches: after each step, and once more when an epoch has been judged.

    `loss` is the step's, at an epoch's end the epoch's mean; `eta_s` is None until an epoch has been timed.
    """

    epoch: int = 0
    epochs: int = 0
    step: int = 0
    steps: int = 0
    loss: float | None = None
    val_accuracy: float | None = None
    eta_s: float | None = None
    epoch_ended: bool = False


@dataclass(frozen=True)
class Fitted:
    """The outcome: parameters in float32 on the CPU, and what they achieve."""

    params: dict[str, NDArray[np.float32]]
    prompt_lengths: tuple[int, ...]
    metrics: dict[str, Any]


Watcher = Callable[[Progress], None]


Keeper = Callable[[Checkpoint], None]


def nobody(progress: Progress) -> None:
    """For a fit that nobody watches."""


def nowhere(checkpoint: Checkpoint) -> None:
    """For a fit that is not to be resumed."""


@dataclass
class _Fit:
    """One fit under way."""

    backbone: Backbone
    method: Method
    recipe: Recipe
    prompt_lengths: tuple[int, ...]
    params: Params
    mean: Tensor
    std: Tensor
    watch: Watcher
    keep: Keeper
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)


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
    """Fit `method` on the training pictures for `labels` classes.

    `watch` is called after every step; what it raises ends the fit, which is how a job is cancelled within a step.
    `keep` is given the state after every epoch; with `resume` a fit goes on from there, and ends with the same bits.
    """
    spec = backbone.spec
    lengths = method.prompt_lengths(spec, recipe.prompts)
    params = method.init(spec, lengths, labels, _generator(recipe.seed, 0))
    if resume is not None:
        params = {name: resume.params[name].clone() for name in params}
    params = {name: value.to(backbone.device).requires_grad_(True) for name, value in params.items()}
    own = spec.preprocess
    run = _Fit(
        backbone,
        method,
        recipe,
        lengths,
        params,
        torch.tensor([own.mean], device=backbone.device),
        torch.tensor([own.std], device=backbone.device),
        watch,
        keep,
    )
    inputs, evaluation = _inputs(run, splits.train), _inputs(run, splits.val)
    optimise(run, inputs, evaluation, resume)
    metrics = _metrics(run, evaluation, splits)
    return Fitted({name: value.detach().float().cpu().numpy() for name, value in params.items()}, lengths, metrics)


def optimise(run: _Fit, train: _Inputs, val: _Inputs, resume: Checkpoint | None) -> None:
    """All epochs of a fit that are still to do: steps over shuffled batches, then the validation accuracy."""
    recipe, done = run.recipe, 0
    optimizer = make_optimizer(run.params, recipe)
    if resume is not None:
        restore_optimizer(optimizer, resume.optimizer)
        done, run.losses, run.accuracies = resume.epoch, list(resume.losses), list(resume.accuracies)
    clock = _Clock(recipe.epochs - done)
    for epoch in range(done + 1, recipe.epochs + 1):
        loss, steps = _epoch(run, optimizer, train, epoch, lambda now: clock.eta_s(now - done))
        run.losses.append(loss)
        run.accuracies.append(float((predict(run, val).argmax(1) == val.targets.numpy()).mean()))
        run.keep(Checkpoint(epoch, run.params, optimizer_tensors(optimizer), run.losses, run.accuracies))
        left_s = clock.eta_s(epoch - done)
        run.watch(Progress(epoch, recipe.epochs, steps, steps, loss, run.accuracies[-1], left_s, epoch_ended=True))


def _epoch(
    run: _Fit, optimizer: torch.optim.Optimizer, train: _Inputs, epoch: int, eta_s: Callable[[float], float | None]
) -> tuple[float, int]:
    """One pass over the training pictures in an order of its own. Returns the mean loss and the number of steps."""
    recipe, total = run.recipe, 0.0
    generator = _generator(recipe.seed, epoch)
    batches = torch.randperm(len(train.targets), generator=generator).split(recipe.batch_size)
    before = run.accuracies[-1] if run.accuracies else None
    for step, index in enumerate(batches, start=1):
        now = epoch - 1 + step / len(batches)
        set_lr(optimizer, recipe.lr * lr_scale(recipe, now))
        loss = _step(run, optimizer, train, index, generator)
        total += loss * len(index)
        run.watch(Progress(epoch, recipe.epochs, step, len(batches), loss, before, eta_s(now)))
    return total / len(train.targets), len(batches)


def make_optimizer(params: Mapping[str, Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with momentum as the VPT paper, or AdamW; no weight decay on the head's bias."""
    groups: list[dict[str, Any]] = [
        {"params": [value for name, value in params.items() if name not in NO_DECAY]},
        {"params": [value for name, value in params.items() if name in NO_DECAY], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    return torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)


def lr_scale(recipe: Recipe, epoch: float) -> float:
    """Warm-up from 0, then a cosine to 0. `epoch` counts from 0 and may be a fraction."""
    if epoch < recipe.warmup_epochs:
        return epoch / recipe.warmup_epochs
    rest = max(recipe.epochs - recipe.warmup_epochs, 1e-9)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (epoch - recipe.warmup_epochs) / rest)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


@dataclass(frozen=True)
class _Inputs:
    """What a batch is cut from: pictures, or, where nothing before the head is trained, their frozen features."""

    pictures: Pictures
    features: Tensor | None  # [n, D]
    targets: Tensor  # [n]


def _inputs(run: _Fit, pictures: Pictures) -> _Inputs:
    """Frozen features do not change from epoch to epoch: computed once for methods that train a head only."""
    targets = torch.from_numpy(pictures.targets)
    if not _head_only(run):
        return _Inputs(pictures, None, targets)
    with torch.inference_mode():
        found = [vit.forward(run.backbone, vit.embed(run.backbone, x), Plain()) for x in _batches(run, pictures)]
    return _Inputs(pictures, torch.cat(found).clone(), targets)


def _head_only(run: _Fit) -> bool:
    with torch.inference_mode():
        return _lens(run, run.params).head_only


def _step(
    run: _Fit, optimizer: torch.optim.Optimizer, train: _Inputs, index: Tensor, generator: torch.Generator
) -> float:
    """One optimiser step on the pictures `index`. Returns the batch's mean cross-entropy."""
    params = _drop_prompts(run, len(index), generator)
    loss = F.cross_entropy(_logits(run, train, index, params), train.targets[index].to(run.backbone.device))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    value = loss.item()
    if not math.isfinite(value):
        raise DivergedError(
            f"the loss became {value}; try a smaller learning rate than {run.recipe.lr:g} ({run.recipe.optimizer})"
        )
    return value


class DivergedError(ArithmeticError):
    """The loss is no longer finite; the message says what to try."""


def _drop_prompts(run: _Fit, rows: int, generator: torch.Generator) -> Params:
    """Prompt dropout differs from sample to sample, as in the official VPT code: prompts become [B, Σp, D]."""
    rate = run.recipe.prompt_dropout
    if rate == 0 or "prompts" not in run.params:
        return run.params
    prompts = run.params["prompts"]
    keep = torch.rand(rows, *prompts.shape, generator=generator) >= rate
    return {**run.params, "prompts": prompts * keep.to(prompts.device) / (1 - rate)}


def _lens(run: _Fit, params: Params) -> Lens:
    cast = {name: value.to(run.backbone.dtype) for name, value in params.items()}
    return run.method.lower(run.backbone, cast, run.prompt_lengths)


def _logits(run: _Fit, inputs: _Inputs, index: Tensor, params: Params) -> Tensor:
    lens = _lens(run, params)
    if inputs.features is not None:
        features = inputs.features[index]
    else:
        x = vit.embed(run.backbone, _pixels(run, inputs.pictures.images[index.numpy()]))
        features = vit.forward(run.backbone, x, condition(lens, len(index)))
    return vit.head(features, lens.head_weight, lens.head_bias).float()


def _pixels(run: _Fit, images: NDArray[np.uint8]) -> Tensor:
    return normalise(torch.from_numpy(images).to(run.backbone.device), run.mean, run.std, run.backbone.dtype)


def _batches(run: _Fit, pictures: Pictures) -> Iterator[Tensor]:
    for start in range(0, len(pictures), EVAL_BATCH):
        yield _pixels(run, pictures.images[start : start + EVAL_BATCH])


def predict(run: _Fit, inputs: _Inputs) -> NDArray[np.float32]:
    """Logits [n, C] of all pictures, without dropout."""
    with torch.inference_mode():
        index = torch.arange(len(inputs.targets))
        found = [_logits(run, inputs, part, run.params) for part in index.split(EVAL_BATCH)]
        return torch.cat(found).cpu().numpy()


def _metrics(run: _Fit, val: _Inputs, splits: Splits) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "val_accuracy": accuracy(predict(run, val), val.targets.numpy()),
        "val_images": len(splits.val),
        "train_images": len(splits.train),
        "train_loss": round(run.losses[-1], 6),
        "curve": {"loss": [round(x, 5) for x in run.losses], "val_accuracy": [round(x, 5) for x in run.accuracies]},
    }
    if splits.test is not None:
        test = _inputs(run, splits.test)
        metrics["test_accuracy"] = accuracy(predict(run, test), test.targets.numpy())
        metrics["test_images"] = len(splits.test)
    return metrics


def accuracy(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> float:
    return round(float((logits.argmax(1) == targets).mean()), 6)


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


class _Clock:
    """Time left, from the time an epoch has taken so far."""

    def __init__(self, epochs: int) -> None:
        self._epochs, self._started = epochs, time.perf_counter()

    def eta_s(self, done: float) -> float | None:
        """`done` epochs, a fraction included, are over."""
        if done < 1:
            return None
        return round((time.perf_counter() - self._started) / done * (self._epochs - done), 1)
