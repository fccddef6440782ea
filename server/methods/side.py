"""Side-tuning (Zhang et al., ECCV 2020), VPT's baseline "Side": a small network beside the frozen backbone.

f = σ(α)·backbone + (1 − σ(α))·side, α = 0 at the start, where `side` is the convolutional half of AlexNet (Krizhevsky,
arXiv:1404.5997) and a projection of its 9,216 features to the backbone's width. The official code starts with AlexNet's
ImageNet weights; here it starts at random (He et al., ICCV 2015), so that nothing has to be downloaded: expect less of
it than the paper reports.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final

import torch
from torch import Tensor, nn

from server.engine.backbone import Backbone
from server.engine.spec import Spec

from .baseline import BaselineModel, fresh_head, wide

# output channels, kernel, stride, padding, and whether a pooling follows
_LAYERS: Final = (
    (64, 11, 4, 2, True),
    (192, 5, 1, 2, True),
    (384, 3, 1, 1, False),
    (256, 3, 1, 1, False),
    (256, 3, 1, 1, True),
)
_GRID: Final = 6


class Side:
    name: str = "side"
    meaning: ClassVar[str] = "a small network beside the frozen backbone"
    why: ClassVar[str] = "brings a network of its own, which the one forward that all tasks share does not run"
    defaults: ClassVar[Mapping[str, object]] = {
        "prompts": 0,
        "lr": 1e-3,
        "weight_decay": 1e-2,
        "warmup_epochs": 5,
        "epochs": 20,
    }
    sees_pixels: ClassVar[bool] = True

    def first_layer(self, spec: Spec) -> int:
        return spec.depth

    def model(self, backbone: Backbone, classes: int, generator: torch.Generator) -> BaselineModel:
        return _Beside(backbone, classes, generator)


class _Beside(BaselineModel):
    def __init__(self, backbone: Backbone, classes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.features = _features()
        self.projection = nn.Linear(_LAYERS[-1][0] * _GRID**2, backbone.spec.dim)
        self.alpha = nn.Parameter(torch.zeros(()))
        self._draw(generator)
        self.head = fresh_head(backbone, classes, generator)
        self.to(backbone.device, wide(backbone))

    @torch.no_grad()
    def _draw(self, generator: torch.Generator) -> None:
        for layer in (*self.features, self.projection):
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
                layer.bias = nn.Parameter(torch.zeros(len(layer.weight)))

    def forward(self, pixels: Tensor, frozen: Tensor) -> Tensor:
        beside = self.projection(self.features(pixels).flatten(1))  # [B, D]
        share = torch.sigmoid(self.alpha)
        return self.head(share * frozen + (1 - share) * beside)


def _features() -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for out, kernel, stride, padding, pools in _LAYERS:
        layers += [nn.Conv2d(channels, out, kernel, stride, padding), nn.ReLU()]
        layers += [nn.MaxPool2d(3, 2)] if pools else []
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(_GRID))
