"""The literal forward of every method: slow, one task at a time, obviously right.

Prompts are inserted as tokens and the backbone's own blocks are called whole, exactly as the papers draw it. Every fast
path is tested equal to this, and this is tested equal to the official implementations' numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .backbone import Backbone


def linear(backbone: Backbone, pixels: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    """Linear probe: the plain ViT and a head. pixels [B, 3, S, S] → logits [B, C]."""
    x = _enter(backbone, pixels)
    for block in backbone.model.blocks:
        x = block(x)
    return _leave(backbone, x, params)


def vpt_shallow(backbone: Backbone, pixels: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    """VPT-shallow (Jia et al., ECCV 2022, eq. 4–6): prompts [p, D] enter once and are carried through all blocks."""
    x = _insert(_enter(backbone, pixels), params["prompts"])
    for block in backbone.model.blocks:
        x = block(x)
    return _leave(backbone, x, params, prompts=len(params["prompts"]))


def vpt_deep(backbone: Backbone, pixels: Tensor, params: Mapping[str, Tensor], prompt_lengths: Sequence[int]) -> Tensor:
    """VPT-deep (eq. 7–8): each layer's prompts replace what the layer before made of its own.

    prompts: [Σ p_l, D], rows in layer order; `prompt_lengths` gives p_l.
    """
    x, before = _enter(backbone, pixels), 0
    for block, prompts in zip(backbone.model.blocks, params["prompts"].split(list(prompt_lengths)), strict=True):
        x = block(_insert(_remove(x, before), prompts))
        before = len(prompts)
    return _leave(backbone, x, params, prompts=before)


def _enter(backbone: Backbone, pixels: Tensor) -> Tensor:
    model = backbone.model
    return model.norm_pre(model._pos_embed(model.patch_embed(pixels)))


def _insert(x: Tensor, prompts: Tensor) -> Tensor:
    """[CLS | prompts | patches], the layout of the paper."""
    return torch.cat((x[:, :1], prompts.expand(len(x), -1, -1), x[:, 1:]), dim=1)


def _remove(x: Tensor, prompts: int) -> Tensor:
    return torch.cat((x[:, :1], x[:, 1 + prompts :]), dim=1)


def _leave(backbone: Backbone, x: Tensor, params: Mapping[str, Tensor], prompts: int = 0) -> Tensor:
    features = backbone.model.forward_head(backbone.model.norm(_remove(x, prompts)), pre_logits=True)
    return features @ params["head.weight"].T + params["head.bias"]
