"""A method that is none of ours, as somebody else would write it: prompts in the last block only, and a head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from server.engine import vit
from server.engine.backbone import Backbone
from server.engine.lens import Lens, no_prefix
from server.engine.spec import Spec
from server.methods.method import Params, Shapes, head_init, head_shapes, prompt_init


class LastPrompt:
    name: ClassVar[str] = "last_prompt"
    meaning: ClassVar[str] = "prompts in the last block only"
    defaults: ClassVar[Mapping[str, object]] = {"prompts": 4, "lr": 1e-2, "epochs": 10}
    candidates: ClassVar[Sequence[Mapping[str, object]]] = ({"lr": 1e-2}, {"lr": 1e-3})

    def prompt_lengths(self, spec: Spec, prompts: int) -> tuple[int, ...]:
        return (*[0] * (spec.depth - 1), prompts)

    def shapes(self, spec: Spec, prompt_lengths: tuple[int, ...], classes: int) -> Shapes:
        return {"prompts": (sum(prompt_lengths), spec.dim), **head_shapes(spec, classes)}

    def init(self, spec: Spec, prompt_lengths: tuple[int, ...], classes: int, generator: torch.Generator) -> Params:
        prompts = prompt_init(spec, sum(prompt_lengths), generator)
        return {"prompts": prompts, **head_init(spec, classes, generator)}

    def lower(self, backbone: Backbone, params: Params, prompt_lengths: tuple[int, ...]) -> Lens:
        nothing = no_prefix(backbone.spec.depth - 1, params["head.weight"])
        keys, values = vit.project(backbone.blocks[-1], params["prompts"])
        tokens = params["prompts"].new_empty(0, backbone.spec.dim)
        return Lens((*nothing, keys), (*nothing, values), tokens, params["head.weight"], params["head.bias"])
