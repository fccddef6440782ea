"""VPT-shallow (Jia et al., Visual Prompt Tuning, ECCV 2022, section 3.2): prompts enter before the first layer only.

From then on a prompt's state depends on the image, so nothing can be computed ahead: the prompts are carried through
all layers as real tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from server.engine.backbone import Backbone
from server.engine.lens import Lens, no_prefix
from server.engine.spec import Spec

from .method import Params, Shapes, head_init, head_shapes, prompt_init


class VptShallow:
    name: ClassVar[str] = "vpt_shallow"
    meaning: ClassVar[str] = "learned prompts at the first layer: the smaller bundle, real tokens in the forward"
    defaults: ClassVar[Mapping[str, object]] = {"prompts": 20, "lr": 3e-3, "epochs": 20}
    candidates: ClassVar[Sequence[Mapping[str, object]]] = (
        {"lr": 1e-2},
        {"lr": 3e-2, "prompts": 50},
        {"lr": 3e-3, "weight_decay": 1e-2},
        {"lr": 1e-1, "prompts": 10},
        {"optimizer": "sgd", "lr": 0.3, "weight_decay": 1e-3},
        {"lr": 1e-3, "prompts": 50},
    )

    def prompt_lengths(self, spec: Spec, prompts: int) -> tuple[int, ...]:
        return (prompts, *(0,) * (spec.depth - 1))

    def shapes(self, spec: Spec, prompt_lengths: tuple[int, ...], classes: int) -> Shapes:
        return {"prompts": (prompt_lengths[0], spec.dim), **head_shapes(spec, classes)}

    def init(self, spec: Spec, prompt_lengths: tuple[int, ...], classes: int, generator: torch.Generator) -> Params:
        prompts = prompt_init(spec, prompt_lengths[0], generator)
        return {"prompts": prompts, **head_init(spec, classes, generator)}

    def lower(self, backbone: Backbone, params: Params, prompt_lengths: tuple[int, ...]) -> Lens:
        nothing = no_prefix(backbone.spec.depth, params["prompts"])
        return Lens(nothing, nothing, params["prompts"], params["head.weight"], params["head.bias"])
