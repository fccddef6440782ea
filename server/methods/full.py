"""Full fine-tuning, VPT's baseline "Full": every weight of the backbone is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from server.engine.backbone import Backbone
from server.engine.spec import Spec

from .baseline import BaselineModel, fresh_head, trainable_copy


class Full:
    name: str = "full"
    meaning: ClassVar[str] = "every weight of the backbone: what prompts are measured against"
    why: ClassVar[str] = "changes every weight of the backbone, which all tasks share"
    defaults: ClassVar[Mapping[str, object]] = {
        "prompts": 0,
        "lr": 1e-4,
        "weight_decay": 1e-2,
        "warmup_epochs": 5,
        "epochs": 20,
    }
    sees_pixels: ClassVar[bool] = True

    def first_layer(self, spec: Spec) -> int:
        return 0

    def model(self, backbone: Backbone, classes: int, generator: torch.Generator) -> BaselineModel:
        return _Whole(backbone, classes, generator)


class _Whole(BaselineModel):
    def __init__(self, backbone: Backbone, classes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.backbone = trainable_copy(backbone)
        self.head = fresh_head(backbone, classes, generator)

    def forward(self, pixels: Tensor, frozen: None) -> Tensor:
        tokens = self.backbone.forward_features(pixels)  # [B, N, D]
        return self.head(self.backbone.forward_head(tokens, pre_logits=True))
