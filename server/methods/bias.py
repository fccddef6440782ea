"""Bias tuning (BitFit: Ben Zaken et al., ACL 2022; the baseline "Bias" of VPT): every bias of the backbone is trained.

The parameters are the changes of the biases, so a fit starts from the backbone and weight decay leads back to it.
`entry` is the bias of the last layer before the blocks (the patch embedding's, or that of the norm behind it if there
is one), `norm` that of the last norm, or of the attention pooling's last layer. Where a backbone has no bias in one of
these places it gets one; the norms of queries and keys, if there are any, stay as they are.

The engine needs less: a shift behind a norm equals a shift behind the product that follows, and one behind the last
norm is a part of the head's bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from server.engine.additions import Additions, Shift
from server.engine.backbone import Backbone
from server.engine.block import FrozenBlock
from server.engine.lens import Lens, no_prefix
from server.engine.spec import Spec

from .method import Params, Shapes, head_init, head_shapes


class Bias:
    name: ClassVar[str] = "bias"
    meaning: ClassVar[str] = "the backbone's biases and no more: small bundles, strong on textures and fine detail"
    defaults: ClassVar[Mapping[str, object]] = {"prompts": 0, "lr": 3e-3, "epochs": 20}
    candidates: ClassVar[Sequence[Mapping[str, object]]] = (
        {"lr": 3e-3},
        {"lr": 1e-3},
        {"lr": 1e-2},
        {"lr": 3e-4, "weight_decay": 1e-2},
    )

    def prompt_lengths(self, spec: Spec, prompts: int) -> tuple[int, ...]:
        return (0,) * spec.depth

    def shapes(self, spec: Spec, prompt_lengths: tuple[int, ...], classes: int) -> Shapes:
        return {**bias_shapes(spec), **head_shapes(spec, classes)}

    def init(self, spec: Spec, prompt_lengths: tuple[int, ...], classes: int, generator: torch.Generator) -> Params:
        return {**bias_init(spec), **head_init(spec, classes, generator)}

    def lower(self, backbone: Backbone, params: Params, prompt_lengths: tuple[int, ...]) -> Lens:
        nothing = no_prefix(backbone.spec.depth, params["head.weight"])
        return Lens(
            keys=nothing,
            values=nothing,
            tokens=nothing[0],
            head_weight=params["head.weight"],
            head_bias=shifted_head(params),
            additions=tuple(Additions(shift) for shift in shifts(backbone, params)),
            entry=entry(backbone.model, params),
        )


def bias_shapes(spec: Spec) -> Shapes:
    layers, width = spec.depth, spec.dim
    widths = {"norm1": width, "qkv": 3 * width, "proj": width, "norm2": width, "fc1": spec.hidden, "fc2": width}
    blocks: Shapes = {f"bias.{site}": (layers, size) for site, size in widths.items()}
    return {**blocks, "bias.entry": (width,), "bias.norm": (width,)}


def bias_init(spec: Spec) -> Params:
    """All changes zero: the backbone unchanged."""
    return {name: torch.zeros(shape) for name, shape in bias_shapes(spec).items()}


def shifts(backbone: Backbone, params: Params) -> list[Shift]:
    """The shift of each block: the changes of its biases, with those behind norms moved behind the next product."""
    return [_shift(block, params, layer) for layer, block in enumerate(backbone.blocks)]


def shifted_head(params: Params) -> Tensor:
    """The head's bias [C] including the effect of the last norm's shift."""
    return params["head.bias"] + params["head.weight"] @ params["bias.norm"]


def entry(model: VisionTransformer, params: Params) -> Tensor:
    """[2, D]: a patch embedding's bias reaches the patches only; that of a norm behind it reaches every token."""
    shift = params["bias.entry"]
    return torch.stack((torch.zeros_like(shift) if isinstance(model.norm_pre, nn.Identity) else shift, shift))


def _shift(block: FrozenBlock, params: Params, layer: int) -> Shift:
    moved = {site: params[f"bias.{site}"][layer] for site in ("norm1", "qkv", "proj", "norm2", "fc1", "fc2")}
    return Shift(
        qkv=moved["qkv"] + block.qkv_product(moved["norm1"]),
        attention=moved["proj"],
        hidden=moved["fc1"] + block.hidden.product(moved["norm2"]),
        mlp=moved["fc2"],
    )
