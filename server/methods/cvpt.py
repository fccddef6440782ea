"""CVPT (Huang et al., Cross Visual Prompt Tuning, ICCV 2025): each token attends to its layer's prompts separately.

After each block's attention comes a second one, whose queries are the tokens, whose keys and values are the prompts,
and whose weights are the block's own, frozen, without a norm before them. Prompts take no share of the attention that
image tokens pay each other, so many of them do no harm. If a block scales its attention's output (layer scale), the
second output is scaled likewise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from server.engine.additions import Additions, Cross
from server.engine.backbone import Backbone
from server.engine.block import FrozenBlock
from server.engine.lens import Lens, no_prefix
from server.engine.spec import Spec

from .method import Params, Shapes, head_init, head_shapes


class Cvpt:
    name: ClassVar[str] = "cvpt"
    meaning: ClassVar[str] = "learned prompts at every layer with an attention of their own: more prompts, more compute"
    defaults: ClassVar[Mapping[str, object]] = {"prompts": 20, "lr": 3e-3, "epochs": 20, "prompt_dropout": 0.1}
    candidates: ClassVar[Sequence[Mapping[str, object]]] = (
        {"lr": 3e-3},
        {"lr": 1e-2},
        {"lr": 1e-3, "prompts": 50},
        {"lr": 3e-3, "prompts": 10, "weight_decay": 5e-2},
        {"lr": 3e-4, "prompts": 100},
    )

    def prompt_lengths(self, spec: Spec, prompts: int) -> tuple[int, ...]:
        return (prompts,) * spec.depth

    def shapes(self, spec: Spec, prompt_lengths: tuple[int, ...], classes: int) -> Shapes:
        return {"prompts": (sum(prompt_lengths), spec.dim), **head_shapes(spec, classes)}

    def init(self, spec: Spec, prompt_lengths: tuple[int, ...], classes: int, generator: torch.Generator) -> Params:
        """Prompts drawn as in the official code: Xavier's uniform bound of a tensor [L, p, D]."""
        rows = sum(prompt_lengths)
        bound = (6 / (spec.dim * (rows / spec.depth + spec.depth))) ** 0.5
        prompts = torch.empty(rows, spec.dim).uniform_(-bound, bound, generator=generator)
        return {"prompts": prompts, **head_init(spec, classes, generator)}

    def lower(self, backbone: Backbone, params: Params, prompt_lengths: tuple[int, ...]) -> Lens:
        layers = params["prompts"].split(list(prompt_lengths), dim=-2)
        nothing = no_prefix(backbone.spec.depth, params["prompts"])
        return Lens(
            keys=nothing,
            values=nothing,
            tokens=nothing[0],
            head_weight=params["head.weight"],
            head_bias=params["head.bias"],
            additions=tuple(_cross(*pair) for pair in zip(backbone.blocks, layers, strict=True)),
        )


def _cross(block: FrozenBlock, prompts: Tensor) -> Additions | None:
    if prompts.shape[-2] == 0:
        return None
    keys, values = block.prompts(prompts)
    return Additions(cross=Cross(block.per_head(keys, block.k_norm), values))
