"""Adapters behind the MLP (Pfeiffer et al., AdapterFusion, EACL 2021; the baseline "Adapter" of VPT).

The output f of a block's MLP becomes f + up(gelu(down(f))). The official VPT code sets all four tensors to zero, so
that a gradient reaches only the last bias; here `down` starts at random and `up` alone at zero, as in other
implementations. `prompts` of a recipe is the width between down and up; it may differ from layer to layer, down to 0
for none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch

from server.engine.additions import Additions, LowRank
from server.engine.backbone import Backbone
from server.engine.lens import Lens, no_prefix
from server.engine.spec import Spec

from .method import Params, Shapes, head_init, head_shapes, rows_init


class Adapter:
    name: ClassVar[str] = "adapter"
    meaning: ClassVar[str] = "a small bottleneck behind each block's MLP; prompts is its width"
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
        """`up` has a row for each row of `down`, the direction that its activation adds. up.bias: one for each layer
        that has rows."""
        rows, layers = sum(prompt_lengths), sum(width > 0 for width in prompt_lengths)
        return {
            "adapter.down.weight": (rows, spec.dim),
            "adapter.down.bias": (rows,),
            "adapter.up.weight": (rows, spec.dim),
            "adapter.up.bias": (layers, spec.dim),
            **head_shapes(spec, classes),
        }

    def init(self, spec: Spec, prompt_lengths: tuple[int, ...], classes: int, generator: torch.Generator) -> Params:
        shapes = self.shapes(spec, prompt_lengths, classes)
        params = {name: torch.zeros(shape) for name, shape in shapes.items()}
        params["adapter.down.weight"] = rows_init(spec, sum(prompt_lengths), generator)
        return params | head_init(spec, classes, generator)

    def lower(self, backbone: Backbone, params: Params, prompt_lengths: tuple[int, ...]) -> Lens:
        nothing = no_prefix(backbone.spec.depth, params["head.weight"])
        return Lens(
            keys=nothing,
            values=nothing,
            tokens=nothing[0],
            head_weight=params["head.weight"],
            head_bias=params["head.bias"],
            additions=tuple(_layers(params, prompt_lengths)),
        )


def _layers(params: Params, widths: tuple[int, ...]) -> Iterator[Additions | None]:
    names = ("adapter.down.weight", "adapter.up.weight", "adapter.down.bias")
    rows, offsets = [params[name].split(list(widths)) for name in names], iter(params["adapter.up.bias"])
    for down, up, bias in zip(*rows, strict=True):
        yield Additions(behind=LowRank(down, up, bias, next(offsets))) if len(down) else None
