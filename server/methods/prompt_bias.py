"""VPT-deep with bias tuning (VPT+bias: Jia et al., ECCV 2022, appendix): prompts pass the norms and projections whose
biases are trained, so their keys and values change along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch

from server.engine.backbone import Backbone
from server.engine.lens import Lens
from server.engine.spec import Spec

from .bias import Bias, bias_init, bias_shapes, shifts
from .method import Params, Shapes, head_init, head_shapes, prompt_init
from .vpt_deep import projected


class PromptBias:
    name: ClassVar[str] = "prompt_bias"
    meaning: ClassVar[str] = "prompts at every layer and the backbone's biases"
    defaults: ClassVar[Mapping[str, object]] = {"prompts": 10, "lr": 3e-3, "epochs": 20, "prompt_dropout": 0.1}
    candidates: ClassVar[Sequence[Mapping[str, object]]] = ({"lr": 3e-3}, {"lr": 1e-3}, {"lr": 1e-2})

    def prompt_lengths(self, spec: Spec, prompts: int) -> tuple[int, ...]:
        return (prompts,) * spec.depth

    def shapes(self, spec: Spec, prompt_lengths: tuple[int, ...], classes: int) -> Shapes:
        prompts: Shapes = {"prompts": (sum(prompt_lengths), spec.dim)}
        return {**prompts, **bias_shapes(spec), **head_shapes(spec, classes)}

    def init(self, spec: Spec, prompt_lengths: tuple[int, ...], classes: int, generator: torch.Generator) -> Params:
        prompts = prompt_init(spec, sum(prompt_lengths), generator)
        return {"prompts": prompts, **bias_init(spec), **head_init(spec, classes, generator)}

    def lower(self, backbone: Backbone, params: Params, prompt_lengths: tuple[int, ...]) -> Lens:
        width = backbone.spec.dim
        moved = [shift.qkv[width:] for shift in shifts(backbone, params)]
        keys, values = projected(backbone, params["prompts"], prompt_lengths, moved)
        return replace(Bias().lower(backbone, params, prompt_lengths), keys=keys, values=values)
