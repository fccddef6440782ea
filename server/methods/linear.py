"""The linear probe: a head on the frozen backbone's own feature. Any number of such tasks share one trunk pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from server.engine.backbone import Backbone
from server.engine.lens import Lens, no_prefix
from server.engine.spec import Spec

from .method import Params, Shapes, head_init, head_shapes


class Linear:
    name: ClassVar[str] = "linear"
    meaning: ClassVar[str] = "a head on the frozen feature: fitted in seconds, the baseline"
    defaults: ClassVar[Mapping[str, object]] = {"prompts": 0, "lr": 1e-2, "epochs": 100, "batch_size": 64}
    candidates: ClassVar[Sequence[Mapping[str, object]]] = tuple(
        {"lr": lr, "weight_decay": decay} for lr in (1e-2, 1e-3, 1e-1) for decay in (1e-4, 1e-1)
    )

    def prompt_lengths(self, spec: Spec, prompts: int) -> tuple[int, ...]:
        return (0,) * spec.depth

    def shapes(self, spec: Spec, prompt_lengths: tuple[int, ...], classes: int) -> Shapes:
        return head_shapes(spec, classes)

    def init(self, spec: Spec, prompt_lengths: tuple[int, ...], classes: int, generator: torch.Generator) -> Params:
        return head_init(spec, classes, generator)

    def lower(self, backbone: Backbone, params: Params, prompt_lengths: tuple[int, ...]) -> Lens:
        weight = params["head.weight"]
        nothing = no_prefix(backbone.spec.depth, weight)
        return Lens(nothing, nothing, nothing[0], weight, params["head.bias"])
