"""Fits a baseline: its network is trained and its metrics reported, but it cannot be served and is not stored.

Schedule, order, augmentation, patience and evaluation are those of every fit (`fit.Fit`). The weights are in a network
of the baseline's own, so its steps are exclusive steps (`co_batching.ExclusiveStep`) instead of rows of the shared
forward. The layers before its first trained one still run in the shared backbone, once if the pictures do not change.

Memory: a step goes through the network `MICRO` pictures at a time, whatever the recipe's batch size, and accumulates
the gradients of the whole batch. Weights, gradients and AdamW's two moments take 16 bytes per trained parameter.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from server.engine.backbone import Backbone
from server.engine.batch import normalise
from server.engine.lens import Plain
from server.engine.spec import Pool
from server.errors import Unprocessable
from server.methods.baseline import Baseline, BaselineModel, wide
from server.methods.method import Method

from . import augment
from .checkpoint import Checkpoint, OnCheckpoint, ignore_checkpoint
from .co_batching import ExclusiveStep, Fitting, ForwardRequest
from .data import Index, Pixels, Splits
from .fit import DivergedError, Fit, class_weights, seeded
from .frozen import FrozenFeatures, parts
from .inputs import Inputs
from .prefetch import prefetch
from .progress import OnProgress, Progress, ignore_progress
from .recipe import Recipe

MICRO: Final = 16  # pictures


@dataclass(frozen=True)
class BaselineResult:
    """A baseline's metrics. Its parameters are not kept."""

    baseline: Baseline
    recipe: Recipe
    parameters: int  # the number of trained parameters
    metrics: dict[str, Any]


def reporting(
    backbone: Backbone,
    baseline: Baseline,
    splits: Splits,
    labels: int,
    recipe: Recipe,
    *,
    on_progress: OnProgress = ignore_progress,
    on_checkpoint: OnCheckpoint = ignore_checkpoint,
    resume: Checkpoint | None = None,
    frozen: FrozenFeatures | None = None,
    each_epoch: bool = True,
) -> Fitting[BaselineResult]:
    """Fit a baseline, with the arguments of `fit.fitting`.

    `on_checkpoint` receives all trained parameters and their moments, 12 bytes a parameter, after every epoch; the
    callback decides how often it writes them. Resumed fits end with the same bits.
    """
    if recipe.pool is not None:
        raise Unprocessable(f"pool {recipe.pool!r}: baseline {baseline.name} pools as the backbone was made to")
    model = baseline.model(backbone, labels, seeded(recipe.seed, 0))
    params = dict(model.trained())
    if resume is not None and resume.epoch:
        _load(params, resume.params)
    weights = None
    if recipe.class_weights == "balanced":
        weights = class_weights(splits.train.targets, labels).to(backbone.device, wide(backbone))
    run = BaselineFit(
        backbone,
        cast(Method, baseline),  # `Fit` lowers its method in `_step` and `logits`, which are overridden here
        recipe,
        (),
        frozen or FrozenFeatures(backbone),
        on_progress,
        on_checkpoint,
        params=cast(dict[str, Tensor], params),
        weights=weights,
        model=model,
        baseline=baseline,
    )
    run.latest = Progress(resume.epoch if resume else 0, recipe.epochs)
    run.plan(splits, run.latest.epoch, each_epoch=each_epoch)
    train, val = (yield from run.inputs(splits.train)), (yield from run.inputs(splits.val))
    yield from run.optimise(train, val if each_epoch else None, resume)
    figures, _ = yield from run.evaluate(train, val, splits.test)
    return BaselineResult(baseline, recipe, sum(value.numel() for value in params.values()), figures)


@dataclass(frozen=True)
class _InputsWithPixels(Inputs):
    """Features and the pixels too: `read` always yields the pixels."""

    def read(
        self, batches: Sequence[Index], views: augment.Views | None = None
    ) -> Generator[Pixels | None, None, None]:
        with closing(prefetch(self.pictures.images, batches, views)) as pixels:
            yield from pixels


@dataclass(kw_only=True)
class BaselineFit(Fit):
    """The state of one baseline's fit."""

    model: BaselineModel
    baseline: Baseline

    def inputs(self, pictures: Any, again: bool = True) -> Fitting[Inputs]:
        inputs = yield from super().inputs(pictures, again)
        if self.baseline.sees_pixels:
            return _InputsWithPixels(inputs.pictures, inputs.features, inputs.layer, inputs.targets)
        return inputs

    def _first_layer(self) -> tuple[int, Pool | None]:
        return self.baseline.first_layer(self.backbone.spec), None

    def _is_reader(self) -> bool:
        return False

    def _keeps_best(self) -> bool:
        return bool(self.recipe.patience)  # the parameters may be those of a whole backbone

    def _step(
        self,
        optimizer: torch.optim.Optimizer,
        train: Inputs,
        index: Tensor,
        pixels: Pixels | None,
        generator: torch.Generator,
    ) -> Fitting[float]:
        targets = train.targets[index].to(self.backbone.device)
        share = 1 / (len(index) if self.weights is None else self.weights[targets].sum().item())
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for few in torch.arange(len(index)).split(MICRO):
            rows = yield from self._network_inputs(train, index[few], None if pixels is None else pixels[few.numpy()])
            loss = yield ExclusiveStep(partial(self._accumulate_gradients, rows, targets[few], share))
            total += loss.item()
        optimizer.step()
        if not math.isfinite(total):
            hint = f"try a smaller learning rate than {self.recipe.lr:g} ({self.recipe.optimizer})"
            raise DivergedError(f"the loss became {total}; {hint}")
        return total

    def _accumulate_gradients(self, rows: _NetworkInputs, targets: Tensor, share: float) -> Tensor:
        """Add the gradients of these rows' part of the batch's mean loss. Returns that part of the loss."""
        loss = share * F.cross_entropy(
            self._logits(rows), targets, self.weights, label_smoothing=self.recipe.label_smoothing, reduction="sum"
        )
        loss.backward()
        return loss.detach()

    def logits(self, inputs: Inputs) -> Fitting[NDArray[np.float64]]:
        answers, order = [], parts(len(inputs.targets))
        with closing(inputs.read(order)) as pixels:
            for index, batch in zip(order, pixels, strict=True):
                rows = yield from self._network_inputs(inputs, torch.from_numpy(index), batch)
                answer = yield ExclusiveStep(partial(self._evaluated, rows))
                answers.append(answer.double().cpu().numpy())
                self.tick(self.work.evaluated * len(index))
        return np.concatenate(answers)

    @torch.no_grad()
    def _evaluated(self, rows: _NetworkInputs) -> Tensor:
        return self._logits(rows)

    def _logits(self, rows: _NetworkInputs) -> Tensor:
        """Logits [B, C] in float32 at least; matrix products run in the backbone's dtype, as in all other fits."""
        dtype = self.backbone.dtype
        half = dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(self.backbone.device.type, dtype=dtype if half else None, enabled=half):
            logits: Tensor = self.model(rows.pixels, rows.frozen)
        return logits.to(wide(self.backbone))

    def _network_inputs(self, inputs: Inputs, index: Tensor, pixels: Pixels | None) -> Fitting[_NetworkInputs]:
        """The network's inputs for the pictures `index`."""
        normalised, self.passes = None, self.passes + len(index)
        if self.baseline.sees_pixels:
            assert pixels is not None
            normalised = self._normalised(pixels)
        return _NetworkInputs(normalised, (yield from self._frozen(inputs, index, pixels)))

    def _frozen(self, inputs: Inputs, index: Tensor, pixels: Pixels | None) -> Fitting[Tensor | None]:
        """The output of the frozen layers before the network's first; None for a network that begins at the pixels."""
        layer, _ = self._first_layer()
        if layer == 0:
            return None
        if inputs.features is not None:
            features = inputs.features[index].to(self.backbone.device)
        else:
            assert pixels is not None
            until = None if layer == self.backbone.spec.depth else layer
            answer = yield ForwardRequest(self.frozen.embedded(pixels), Plain(), until=until)
            features = answer.clone()  # autograd refuses tensors made in inference mode
        return features.to(wide(self.backbone))

    def _normalised(self, pixels: Pixels) -> Tensor:
        how, device = self.backbone.spec.preprocess, self.backbone.device
        stack = torch.from_numpy(np.ascontiguousarray(pixels)).to(device)
        mean, std = torch.tensor([how.mean], device=device), torch.tensor([how.std], device=device)
        return normalise(stack, mean, std, wide(self.backbone))

    def take_best(self) -> None:
        _load(self.params, self.best)


@dataclass(frozen=True)
class _NetworkInputs:
    pixels: Tensor | None  # normalised, [B, 3, S, S]
    frozen: Tensor | None  # tokens [B, N, D] or pooled features [B, D]


@torch.no_grad()
def _load(params: Any, values: Any) -> None:
    for name, value in params.items():
        value.copy_(values[name])
