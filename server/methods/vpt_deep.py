"""VPT-deep (Jia et al., Visual Prompt Tuning, ECCV 2022, section 3.2): fresh prompts at every layer.

Each layer's prompt outputs are discarded, so the prompts are served as keys and values: exact, and a prompt adds a key
and a value, not a token. Lengths may differ from layer to layer, down to 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from server.engine import vit
from server.engine.backbone import Backbone
from server.engine.lens import Lens
from server.engine.spec import Spec

from .method import Params, Shapes, head_init, head_shapes, prompt_init


class VptDeep:
    name: ClassVar[str] = "vpt_deep"
    meaning: ClassVar[str] = "learned prompts at every layer: the strong one"
    defaults: ClassVar[Mapping[str, object]] = {"prompts": 10, "lr": 3e-3, "epochs": 20, "prompt_dropout": 0.1}
    candidates: ClassVar[Sequence[Mapping[str, object]]] = (
        {"lr": 3e-3},
        {"lr": 1e-2},
        {"lr": 1e-3},
        {"lr": 3e-3, "prompts": 30, "weight_decay": 1e-2},
        {"lr": 1e-2, "prompts": 3, "weight_decay": 1e-2},
        {"lr": 3e-4, "prompts": 50},
        {"optimizer": "sgd", "lr": 0.1, "weight_decay": 1e-3},
        {"lr": 3e-2, "weight_decay": 1e-3},
        {"optimizer": "sgd", "lr": 0.3, "weight_decay": 1e-4},
        {"lr": 1e-4, "prompts": 100},
        {"lr": 1e-1, "prompts": 1},
    )

    def prompt_lengths(self, spec: Spec, prompts: int) -> tuple[int, ...]:
        return (prompts,) * spec.depth

    def shapes(self, spec: Spec, prompt_lengths: tuple[int, ...], classes: int) -> Shapes:
        return {"prompts": (sum(prompt_lengths), spec.dim), **head_shapes(spec, classes)}

    def init(self, spec: Spec, prompt_lengths: tuple[int, ...], classes: int, generator: torch.Generator) -> Params:
        prompts = prompt_init(spec, sum(prompt_lengths), generator)
        return {"prompts": prompts, **head_init(spec, classes, generator)}

    def lower(self, backbone: Backbone, params: Params, prompt_lengths: tuple[int, ...]) -> Lens:
        keys, values = projected(backbone, params["prompts"], prompt_lengths)
        tokens = params["prompts"].new_empty(0, backbone.spec.dim)
        return Lens(keys, values, tokens, params["head.weight"], params["head.bias"])


def projected(
    backbone: Backbone, prompts: Tensor, prompt_lengths: tuple[int, ...], shifts: Sequence[Tensor | None] = ()
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Prompts [..., Σp, D] → each layer's keys and values; shifts[l]: as `vit.project` takes them."""
    layers = prompts.split(list(prompt_lengths), dim=-2)
    moved = shifts or (None,) * len(layers)
    pairs = [vit.project(*layer) for layer in zip(backbone.blocks, layers, moved, strict=True)]
    return tuple(keys for keys, _ in pairs), tuple(values for _, values in pairs)
