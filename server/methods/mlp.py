"""A head with a hidden layer on the frozen backbone's own feature (the baseline MLP-k of VPT, with one hidden layer).

It shares the trunk pass with every other head on the same picture. The official head has a batch norm behind the hidden
layer; on features that are normed already it is left out. A fitted batch norm would be a part of the layer that
follows, so the engine serves such heads as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from server.engine.backbone import Backbone
from server.engine.lens import Dense, Lens, no_prefix
from server.engine.spec import Spec

from .method import Params, Shapes, rows_init

WIDEST = 256  # keeps the bundle of a wide backbone under a megabyte


class Mlp:
    name: ClassVar[str] = "mlp"
    meaning: ClassVar[str] = "a head with a hidden layer on the frozen feature: fitted in seconds"
    defaults: ClassVar[Mapping[str, object]] = {"prompts": 0, "lr": 1e-3, "epochs": 60, "batch_size": 64}
    candidates: ClassVar[Sequence[Mapping[str, object]]] = tuple(
        {"lr": lr, "weight_decay": decay} for lr in (1e-3, 3e-3, 3e-4) for decay in (1e-4, 1e-1)
    )

    def prompt_lengths(self, spec: Spec, prompts: int) -> tuple[int, ...]:
        return (0,) * spec.depth

    def shapes(self, spec: Spec, prompt_lengths: tuple[int, ...], classes: int) -> Shapes:
        width = min(spec.dim, WIDEST)
        return {
            "hidden.weight": (width, spec.dim),
            "hidden.bias": (width,),
            "head.weight": (classes, width),
            "head.bias": (classes,),
        }

    def init(self, spec: Spec, prompt_lengths: tuple[int, ...], classes: int, generator: torch.Generator) -> Params:
        width = min(spec.dim, WIDEST)
        return {
            "hidden.weight": rows_init(spec, width, generator),
            "hidden.bias": torch.zeros(width),
            "head.weight": torch.empty(classes, width).normal_(std=0.01, generator=generator),
            "head.bias": torch.zeros(classes),
        }

    def lower(self, backbone: Backbone, params: Params, prompt_lengths: tuple[int, ...]) -> Lens:
        nothing = no_prefix(backbone.spec.depth, params["hidden.weight"])
        return Lens(
            keys=nothing,
            values=nothing,
            tokens=nothing[0],
            head_weight=params["head.weight"],
            head_bias=params["head.bias"],
            hidden=(Dense(params["hidden.weight"], params["hidden.bias"]),),
        )
