"""LoRA (Hu et al., Low-Rank Adaptation, ICLR 2022) on queries, keys and values, in the form usual for ViTs (Zhang et
al., Neural Prompt Search, 2022): one `down` for all three.

With y = x · Wᵀ + b of each block, x · downᵀ · up is added to y; `up` has a part for each of the three. LoRA with a
separate `down` for each of them equals this with the sum of the ranks. `prompts` of a recipe is the rank; it may differ
from layer to layer, down to 0. There is no scale: the learning rate has the same effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from server.engine.additions import Additions, LowRank
from server.engine.backbone import Backbone
from server.engine.lens import Lens, no_prefix
from server.engine.spec import Spec

from .method import Params, Shapes, head_init, head_shapes, rows_init


class Lora:
    name: ClassVar[str] = "lora"
    meaning: ClassVar[str] = "low-rank changes of queries, keys and values; prompts is the rank"
    defaults: ClassVar[Mapping[str, object]] = {"prompts": 8, "lr": 3e-3, "epochs": 20}
    candidates: ClassVar[Sequence[Mapping[str, object]]] = (
        {"lr": 3e-3},
        {"lr": 1e-3},
        {"lr": 1e-2, "prompts": 4},
        {"lr": 3e-4, "prompts": 16},
    )

    def prompt_lengths(self, spec: Spec, prompts: int) -> tuple[int, ...]:
        return (prompts,) * spec.depth

    def shapes(self, spec: Spec, prompt_lengths: tuple[int, ...], classes: int) -> Shapes:
        ranks = sum(prompt_lengths)
        return {"lora.down": (ranks, spec.dim), "lora.up": (ranks, 3 * spec.dim), **head_shapes(spec, classes)}

    def init(self, spec: Spec, prompt_lengths: tuple[int, ...], classes: int, generator: torch.Generator) -> Params:
        """The backbone is unchanged at first: `up` is zero, and its gradient flows through a random `down`."""
        ranks = sum(prompt_lengths)
        down, up = rows_init(spec, ranks, generator), torch.zeros(ranks, 3 * spec.dim)
        return {"lora.down": down, "lora.up": up, **head_init(spec, classes, generator)}

    def lower(self, backbone: Backbone, params: Params, prompt_lengths: tuple[int, ...]) -> Lens:
        nothing = no_prefix(backbone.spec.depth, params["head.weight"])
        layers = (params[name].split(list(prompt_lengths)) for name in ("lora.down", "lora.up"))
        return Lens(
            keys=nothing,
            values=nothing,
            tokens=nothing[0],
            head_weight=params["head.weight"],
            head_bias=params["head.bias"],
            additions=tuple(
                Additions(qkv=LowRank(down, up)) if len(down) else None for down, up in zip(*layers, strict=True)
            ),
        )
