"""What a baseline is: a fit that the others are compared with, and that cannot be served.

The baselines of VPT (Jia et al., ECCV 2022, section 4.1) change the backbone itself, or put a network of their own
beside it. A rack holds what can be added to the one frozen backbone; a changed one would be a second backbone for one
task. So a baseline is fitted and reported, never stored.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import ClassVar, Protocol

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from server.engine.backbone import Backbone
from server.engine.spec import Spec

from .method import head_init


class BaselineModel(nn.Module):
    """`forward(pixels, frozen)` → logits [B, C].

    pixels: [B, 3, S, S], normalised, where the baseline sees pictures · frozen: what the frozen backbone makes of them,
    as `Baseline.first_layer` says, where that is not 0. What is not asked for is None.
    """

    head: nn.Linear

    def trained(self) -> dict[str, nn.Parameter]:
        """What the fit moves, by name."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}


class Baseline(Protocol):
    """One file a kind, as methods have. Stateless."""

    name: str
    meaning: ClassVar[str]
    why: ClassVar[str]  # it cannot be served: ends a sentence that begins with its name
    defaults: ClassVar[Mapping[str, object]]
    sees_pixels: ClassVar[bool]

    def first_layer(self, spec: Spec) -> int:
        """The block whose input the frozen backbone gives: 0 if none is frozen, their number for the pooled feature."""
        ...

    def model(self, backbone: Backbone, classes: int, generator: torch.Generator) -> BaselineModel:
        """What is fitted, on the backbone's device, in float32 at least; it begins where the backbone stands."""
        ...


def own_copy(backbone: Backbone) -> VisionTransformer:
    """The backbone's network again, to be changed."""
    return copy.deepcopy(backbone.model).to(wide(backbone)).requires_grad_(True)


def wide(backbone: Backbone) -> torch.dtype:
    """What weights that move are kept in: steps are smaller than bfloat16 can tell."""
    return torch.promote_types(backbone.dtype, torch.float32)


def fresh_head(backbone: Backbone, classes: int, generator: torch.Generator) -> nn.Linear:
    """As every method's head begins."""
    drawn = head_init(backbone.spec, classes, generator)
    head = nn.Linear(backbone.spec.dim, classes)
    head.load_state_dict({name.removeprefix("head."): value for name, value in drawn.items()})
    return head.to(backbone.device, wide(backbone))


def pooled(spec: Spec, x: Tensor, attention_pool: nn.Module | None) -> Tensor:
    """Tokens [B, N, D] behind the last norm → [B, D], as the backbone pools them; `attention_pool` where it has one."""
    if spec.pool == "cls":
        return x[:, : spec.class_tokens].mean(dim=1)
    patches = x[:, spec.prefix_tokens :]
    return patches.mean(dim=1) if attention_pool is None else attention_pool(patches)
