"""What a method is: how a task is fitted and what its bundle holds.

A method defines its parameters and how they are drawn (`init`), and lowers them to a lens (`lower`). Lowering is
differentiable, so training optimises the parameters through the same forward that serves them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from server.engine.backbone import Backbone
from server.engine.lens import Lens
from server.engine.spec import Spec

Params = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


class Method(Protocol):
    """One file per method. Stateless; adding one touches neither engine nor batching nor api."""

    name: ClassVar[str]
    meaning: ClassVar[str]  # one line, for users who choose a method
    defaults: ClassVar[Mapping[str, object]]  # recipe fields that differ from the general defaults
    candidates: ClassVar[Sequence[Mapping[str, object]]]  # for a search, the most promising first

    def prompt_lengths(self, spec: Spec, prompts: int) -> tuple[int, ...]:
        """The number of prompts of each layer [L] for a recipe with `prompts` prompts."""
        ...

    def shapes(self, spec: Spec, prompt_lengths: tuple[int, ...], classes: int) -> Shapes:
        """Every parameter's name and shape: exactly what a bundle of this method must hold."""
        ...

    def init(self, spec: Spec, prompt_lengths: tuple[int, ...], classes: int, generator: torch.Generator) -> Params:
        """Fresh parameters in float32."""
        ...

    def lower(self, backbone: Backbone, params: Params, prompt_lengths: tuple[int, ...]) -> Lens:
        """Lower parameters to a lens. `prompts` may have a leading batch axis (prompt dropout differs from row to
        row)."""
        ...


def head_shapes(spec: Spec, classes: int) -> Shapes:
    return {"head.weight": (classes, spec.dim), "head.bias": (classes,)}


def head_init(spec: Spec, classes: int, generator: torch.Generator) -> Params:
    """An undecided head: small weights, zero bias.

    The official VPT code draws the weight with std sqrt(2/C) and sets the bias to −4.595. The bias cancels in the
    softmax, and a short fit spends its first steps undoing the large weight.
    """
    weight = torch.empty(classes, spec.dim).normal_(std=0.01, generator=generator)
    return {"head.weight": weight, "head.bias": torch.zeros(classes)}


def rows_init(spec: Spec, rows: int, generator: torch.Generator) -> Tensor:
    """Uniform in ±1/sqrt(D), as PyTorch draws the rows of a linear layer. Returns [rows, D]."""
    bound = spec.dim**-0.5
    return torch.empty(rows, spec.dim).uniform_(-bound, bound, generator=generator)


def prompt_init(spec: Spec, rows: int, generator: torch.Generator) -> Tensor:
    """Uniform in ±sqrt(6 / (3·patch² + D)), as the official VPT code draws prompts. Returns [rows, D]."""
    bound = (6 / (3 * spec.patch_size**2 + spec.dim)) ** 0.5
    return torch.empty(rows, spec.dim).uniform_(-bound, bound, generator=generator)
