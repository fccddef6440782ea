"""A classifier on the frozen feature as timm names it, `head.weight` [C, D] and `head.bias` [C]: alone, or in a whole
model, whose backbone must then be the running one, since the head was fitted on its features."""

from __future__ import annotations

from .checkpoint import Checkpoint
from .format import BackboneShape, Format, ReadParameters, frozen, head, refuse_others


def recognises(checkpoint: Checkpoint) -> bool:
    return "head.weight" in checkpoint.arrays


def read(checkpoint: Checkpoint, shape: BackboneShape) -> ReadParameters:
    refuse_others(checkpoint, {*shape.names, "head.weight", "head.bias"})
    return ReadParameters("linear", (0,) * shape.depth, head(checkpoint, shape), {}, frozen(checkpoint, shape))


FORMAT = Format("timm", "a timm classifier: head.weight and head.bias, alone or in a whole model", recognises, read)
