"""The optimiser and its schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .recipe import Recipe

NO_DECAY = ("head.bias",)  # as the official VPT code


def make_optimizer(params: Mapping[str, Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with momentum, as in the VPT paper, or AdamW. Without weight decay on the head's bias."""
    groups: list[dict[str, Any]] = [
        {"params": [value for name, value in params.items() if name not in NO_DECAY]},
        {"params": [value for name, value in params.items() if name in NO_DECAY], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    return torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)


def lr_scale(recipe: Recipe, epoch: float) -> float:
    """The factor of the learning rate: warm-up from 0, then a cosine to 0. `epoch` counts from 0, with fractions."""
    if epoch < recipe.warmup_epochs:
        return epoch / recipe.warmup_epochs
    rest = max(recipe.epochs - recipe.warmup_epochs, 1e-9)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (epoch - recipe.warmup_epochs) / rest)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
