"""Memory: more rows in each block's MLP, keys beside its first weight's and values beside its second's.

An adaptation. MemVP (Jie et al., Memory-Space Visual Prompting, ICML 2024) gives a *language* model the features of a
picture as keys and values of its MLPs, since an MLP is a lookup: act(x · Kᵀ) · V. Here the backbone sees pictures
itself, there is no second model, and the keys and values are the task's own: learned, the same for every picture. The
place and the form are the paper's; its figures say nothing about this method. The activation is the block's. `prompts`
of a recipe is the number of rows; it may differ from layer to layer, down to 0.
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


class Memory:
    name: ClassVar[str] = "memory"
    meaning: ClassVar[str] = "learned rows in each block's MLP; prompts is their number"
    defaults: ClassVar[Mapping[str, object]] = {"prompts": 8, "lr": 3e-3, "epochs": 20}
    candidates: ClassVar[Sequence[Mapping[str, object]]] = (
        {"lr": 3e-3},
        {"lr": 1e-3},
        {"lr": 1e-3, "prompts": 32},
        {"lr": 1e-2},
    )

    def prompt_lengths(self, spec: Spec, prompts: int) -> tuple[int, ...]:
        return (prompts,) * spec.depth

    def shapes(self, spec: Spec, prompt_lengths: tuple[int, ...], classes: int) -> Shapes:
        rows = (sum(prompt_lengths), spec.dim)
        return {"memory.keys": rows, "memory.values": rows, **head_shapes(spec, classes)}

    def init(self, spec: Spec, prompt_lengths: tuple[int, ...], classes: int, generator: torch.Generator) -> Params:
        """The backbone is unchanged at first: values are zero, keys are drawn like the rows of a first weight."""
        keys = rows_init(spec, sum(prompt_lengths), generator)
        return {"memory.keys": keys, "memory.values": torch.zeros_like(keys), **head_init(spec, classes, generator)}

    def lower(self, backbone: Backbone, params: Params, prompt_lengths: tuple[int, ...]) -> Lens:
        nothing = no_prefix(backbone.spec.depth, params["head.weight"])
        layers = (params[name].split(list(prompt_lengths)) for name in ("memory.keys", "memory.values"))
        return Lens(
            keys=nothing,
            values=nothing,
            tokens=nothing[0],
            head_weight=params["head.weight"],
            head_bias=params["head.bias"],
            additions=tuple(
                Additions(beside=LowRank(keys, values)) if len(keys) else None
                for keys, values in zip(*layers, strict=True)
            ),
        )
