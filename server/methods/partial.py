"""Partial-k, VPT's baseline: the last k blocks and the norm behind them are trained. Their input is computed once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from server.engine.backbone import Backbone
from server.engine.spec import Spec

from .baseline import BaselineModel, fresh_head, pooled, trainable_copy


class Partial:
    """`blocks`: k. In a backbone of no more than k blocks the first one stays frozen."""

    meaning: ClassVar[str] = "the backbone's last blocks, as many as the name says"
    why: ClassVar[str] = "changes the backbone's last blocks, which all tasks share"
    defaults: ClassVar[Mapping[str, object]] = {
        "prompts": 0,
        "lr": 5e-4,
        "weight_decay": 1e-2,
        "warmup_epochs": 5,
        "epochs": 20,
    }
    sees_pixels: ClassVar[bool] = False

    def __init__(self, blocks: int) -> None:
        self.name = f"partial-{blocks}"
        self._blocks = blocks

    def first_layer(self, spec: Spec) -> int:
        """At least 1: 0 would mean that nothing is frozen."""
        return max(1, spec.depth - self._blocks)

    def model(self, backbone: Backbone, classes: int, generator: torch.Generator) -> BaselineModel:
        return _LastBlocks(backbone, self.first_layer(backbone.spec), classes, generator)


class _LastBlocks(BaselineModel):
    def __init__(self, backbone: Backbone, first: int, classes: int, generator: torch.Generator) -> None:
        super().__init__()
        copy = trainable_copy(backbone)
        self.blocks, self.norm, self.fc_norm = copy.blocks[first:], copy.norm, copy.fc_norm
        self.attn_pool = copy.attn_pool
        self.head = fresh_head(backbone, classes, generator)
        self._spec = backbone.spec

    def forward(self, pixels: None, frozen: Tensor) -> Tensor:
        return self.head(self.fc_norm(pooled(self._spec, self.norm(self.blocks(frozen)), self.attn_pool)))
