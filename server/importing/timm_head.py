"""A classifier on the frozen feature as timm names it, `head.weight` [C, D] and `head.bias` [C]: alone, or in a whole
model, whose backbone must then be the running one, since the head was fitted on its features."""

from __future__ import annotations

from .checkpoint import Checkpoint
from .format import Format, ReadParameters, Width, frozen, head


def recognises(checkpoint: Checkpoint) -> bool:
    return "head.weight" in checkpoint.arrays


def read(checkpoint: Checkpoint, width: Width) -> ReadParameters:
    return ReadParameters("linear", (0,) * width.depth, head(checkpoint, width, "head"), {}, frozen(checkpoint, width))


FORMAT = Format("timm", "a timm classifier: head.weight and head.bias, alone or in a whole model", recognises, read)
