"""Fitting what cannot be served: a baseline's own network, reported and then forgotten.

Schedule, order, views, patience and judging are those of every fit (`fit.Fit`). What differs is that the weights are in
a network of their own, so its steps are turns of the group rather than rows of the shared forward; what lies before its
first layer still goes through the shared backbone, once where the pictures do not change.

Memory: a step goes through the network `MICRO` pictures at a time, whatever the recipe's batch size, and the gradients
add up to the whole batch's. Weights, gradients and AdamW's two moments take 16 bytes a parameter that moves.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
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
from .checkpoint import Checkpoint
from .co_batching import ExclusiveStep, Fitting, ForwardRequest
from .data import Index, Pixels, Splits
from .fit import DivergedError, Fit, Keeper, class_weights, nowhere, seeded
from .frozen import FrozenFeatures, parts
from .inputs import Inputs
from .prefetch import ahead
from .progress import Progress, Watcher, nobody
from .recipe import Recipe

MICRO: Final = 16  # pictures


@dataclass(frozen=True)
class Reported:
    """What a baseline achieves. Its parameters are gone."""

    baseline: Baseline
    recipe: Recipe
    parameters: int  # that were fitted
    metrics: dict[str, Any]


def reporting(
    backbone: Backbone,
    baseline: Baseline,
    splits: Splits,
    labels: int,
    recipe: Recipe,
    *,
    watch: Watcher = nobody,
    keep: Keeper = nowhere,
    resume: Checkpoint | None = None,
    frozen: FrozenFeatures | None = None,
    each_epoch: bool = True,
) -> Fitting[Reported]:
    """As `fit.fitting`, for a baseline. `keep` is given all that moves and its moments, 12 bytes a parameter: resumed
    fits end with the same bits here, too, and whoever keeps them decides how often that is worth it."""
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
        cast(Method, baseline),  # `Fit` lowers it where it steps and looks, both of which are done otherwise here
        recipe,
        (),
        frozen or FrozenFeatures(backbone),
        watch,
        keep,
        params=cast(dict[str, Tensor], params),
        weights=weights,
        model=model,
        baseline=baseline,
    )
    run.shown = Progress(resume.epoch if resume else 0, recipe.epochs)
    train, val = (yield from run.inputs(splits.train)), (yield from run.inputs(splits.val))
    yield from run.optimise(train, val if each_epoch else None, resume)
    found, _ = yield from run.judged(train, val, splits.test)
    return Reported(baseline, recipe, sum(value.numel() for value in params.values()), found)


@dataclass(frozen=True)
class _WithPictures(Inputs):
    """Features, and the pictures themselves."""

    def read(
        self, batches: Sequence[Index], views: augment.Views | None = None
    ) -> Generator[Pixels | None, None, None]:
        with closing(ahead(self.pictures.images, batches, views)) as pixels:
            yield from pixels


@dataclass(kw_only=True)
class BaselineFit(Fit):
    """One baseline's fit under way."""

    model: BaselineModel
    baseline: Baseline

    def inputs(self, pictures: Any, again: bool = True) -> Fitting[Inputs]:
        found = yield from super().inputs(pictures, again)
        if self.baseline.sees_pixels:
            return _WithPictures(found.pictures, found.features, found.layer, found.targets)
        return found

    def _begins(self) -> tuple[int, Pool | None]:
        return self.baseline.first_layer(self.backbone.spec), None

    def _reads(self) -> bool:
        return False

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
            seen = yield from self._seen(train, index[few], None if pixels is None else pixels[few.numpy()])
            loss = yield ExclusiveStep(lambda seen=seen, few=few: self._learn(seen, targets[few], share))  # type: ignore[misc]
            total += loss.item()
        optimizer.step()
        if not math.isfinite(total):
            hint = f"try a smaller learning rate than {self.recipe.lr:g} ({self.recipe.optimizer})"
            raise DivergedError(f"the loss became {total}; {hint}")
        return total

    def _learn(self, seen: _Seen, targets: Tensor, share: float) -> Tensor:
        """Gradients of a few pictures' part of the batch's mean loss, added to what is there."""
        loss = share * F.cross_entropy(
            self._logits(seen), targets, self.weights, label_smoothing=self.recipe.label_smoothing, reduction="sum"
        )
        loss.backward()
        return loss.detach()

    def logits(self, inputs: Inputs) -> Fitting[NDArray[np.float64]]:
        found, order = [], parts(len(inputs.targets))
        with closing(inputs.read(order)) as pixels:
            for index, read in zip(order, pixels, strict=True):
                seen = yield from self._seen(inputs, torch.from_numpy(index), read)
                answer = yield ExclusiveStep(lambda seen=seen: self._look(seen))  # type: ignore[misc]
                found.append(answer.double().cpu().numpy())
                self.tick()
        return np.concatenate(found)

    @torch.no_grad()
    def _look(self, seen: _Seen) -> Tensor:
        return self._logits(seen)

    def _logits(self, seen: _Seen) -> Tensor:
        """[B, C] in float32 at least; the products in the backbone's dtype, as all other fits have them."""
        dtype = self.backbone.dtype
        half = dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(self.backbone.device.type, dtype=dtype if half else None, enabled=half):
            logits: Tensor = self.model(seen.pixels, seen.frozen)
        return logits.to(wide(self.backbone))

    def _seen(self, inputs: Inputs, index: Tensor, pixels: Pixels | None) -> Fitting[_Seen]:
        """What the network reads of the pictures `index`."""
        shown, self.passes = None, self.passes + len(index)
        if self.baseline.sees_pixels:
            assert pixels is not None
            shown = self._normalised(pixels)
        return _Seen(shown, (yield from self._frozen(inputs, index, pixels)))

    def _frozen(self, inputs: Inputs, index: Tensor, pixels: Pixels | None) -> Fitting[Tensor | None]:
        layer, _ = self._begins()
        if layer == 0:
            return None
        if inputs.features is not None:
            found = inputs.features[index].to(self.backbone.device)
        else:
            assert pixels is not None
            until = None if layer == self.backbone.spec.depth else layer
            answer = yield ForwardRequest(self.frozen.embedded(pixels), Plain(), until=until)
            found = answer.clone()  # what comes of a look may not be learned from
        return found.to(wide(self.backbone))

    def _normalised(self, pixels: Pixels) -> Tensor:
        own, device = self.backbone.spec.preprocess, self.backbone.device
        stack = torch.from_numpy(np.ascontiguousarray(pixels)).to(device)
        mean, std = torch.tensor([own.mean], device=device), torch.tensor([own.std], device=device)
        return normalise(stack, mean, std, wide(self.backbone))

    def take_best(self) -> None:
        _load(self.params, self.best)


@dataclass(frozen=True)
class _Seen:
    pixels: Tensor | None
    frozen: Tensor | None


@torch.no_grad()
def _load(params: Any, values: Any) -> None:
    for name, value in params.items():
        value.copy_(values[name])
