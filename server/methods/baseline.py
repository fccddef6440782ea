"""Baselines: fits that methods are compared with, and that cannot be served.

The baselines of VPT (Jia et al., ECCV 2022, section 4.1) change the backbone itself, or add a network of their own
beside it. A rack holds what can be added to the one frozen backbone; a changed backbone would be a second one for a
single task. So a baseline is fitted and reported, never stored.
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

    pixels: [B, 3, S, S], normalised, if the baseline reads pictures · frozen: the frozen backbone's tokens or features
    at `Baseline.first_layer`, if that is not 0. An input that the baseline does not read is None.
    """

    head: nn.Linear

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that the fit changes, by name."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}


class Baseline(Protocol):
    """A kind of baseline, one file each, as methods have. Stateless."""

    name: str
    meaning: ClassVar[str]
    why: ClassVar[str]  # the reason why it cannot be served, as the end of a sentence that begins with its name
    defaults: ClassVar[Mapping[str, object]]
    sees_pixels: ClassVar[bool]

    def first_layer(self, spec: Spec) -> int:
        """The block whose input comes from the frozen backbone: 0 if none is frozen, the number of blocks for the
        pooled feature."""
        ...

    def model(self, backbone: Backbone, classes: int, generator: torch.Generator) -> BaselineModel:
        """The model to fit, on the backbone's device, in float32 at least; it starts from the backbone's weights."""
        ...


def trainable_copy(backbone: Backbone) -> VisionTransformer:
    """A copy of the backbone's network, to be changed."""
    return copy.deepcopy(backbone.model).to(wide(backbone)).requires_grad_(True)


def wide(backbone: Backbone) -> torch.dtype:
    """The dtype of trained weights: steps are smaller than bfloat16 resolves."""
    return torch.promote_types(backbone.dtype, torch.float32)


def fresh_head(backbone: Backbone, classes: int, generator: torch.Generator) -> nn.Linear:
    """A head initialised as every method's head is."""
    drawn = head_init(backbone.spec, classes, generator)
    head = nn.Linear(backbone.spec.dim, classes)
    head.load_state_dict({name.removeprefix("head."): value for name, value in drawn.items()})
    return head.to(backbone.device, wide(backbone))


def pooled(spec: Spec, x: Tensor, attention_pool: nn.Module | None) -> Tensor:
    """Pool tokens [B, N, D] after the last norm → [B, D], as the backbone pools; `attention_pool` if it has one."""
    if spec.pool == "cls":
        return x[:, : spec.class_tokens].mean(dim=1)
    patches = x[:, spec.prefix_tokens :]
    return patches.mean(dim=1) if attention_pool is None else attention_pool(patches)
