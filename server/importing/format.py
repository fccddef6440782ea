"""The interface of a foreign format: how to recognise it, and what is read from a checkpoint of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from server.errors import Conflict

from .checkpoint import Checkpoint
from .refusal import quoted, refusal

Params = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class BackboneShape:
    """What a format needs of the running backbone: D, the number of layers, its parameters' shapes by timm's names."""

    dim: int
    depth: int
    names: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ReadParameters:
    """A task's parameters as a bundle of `method` holds them.

    `preprocess`: the preprocessing of this format's scripts, unless the caller overrides it. `backbone`: readers of the
    frozen backbone's arrays in the checkpoint, by timm's names; reading them may be slow.
    """

    method: str
    prompt_lengths: tuple[int, ...]
    params: Params
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    backbone: Mapping[str, Callable[[], NDArray[np.float32]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """`recognises` looks at names only; `read` raises Unprocessable for what cannot be converted."""

    name: str
    meaning: str
    recognises: Callable[[Checkpoint], bool]
    read: Callable[[Checkpoint, BackboneShape], ReadParameters]


HEADS: Final = ("head", "classifier")  # as timm and transformers name it
_BESIDE: Final = re.compile(r"(\w*(criterion|loss|metric|acc|f1|auroc)\w*)\.", re.IGNORECASE)  # of a LightningModule
HALVES: Final[Mapping[str, Any]] = {  # the preprocessing of transformers' ViTs
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "squash",
}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def head(checkpoint: Checkpoint, shape: BackboneShape, *others: str) -> Params:
    """`head.weight` [C, D] and `head.bias` [C] of the one classifier, called as in HEADS or `others`; a missing bias is
    zero.

    Raises Unprocessable no_head or bad_checkpoint.
    """
    names = (*others, *HEADS)
    present = [name for name in names if f"{name}.weight" in checkpoint.arrays]
    if not present:
        raise refusal(
            f"expected a classifier [C, {shape.dim}] as {' or '.join(f'{n}.weight' for n in names)}, "
            f"which may come in a file of its own; got {checkpoint.summary}",
            code="no_head",
        )
    if len(present) > 1:
        raise refusal(f"expected one classifier, got {present[0]}.weight and {present[1]}.weight")
    name = present[0]
    weight = checkpoint.floats(f"{name}.weight")
    if weight.ndim != 2 or weight.shape[1] != shape.dim or not len(weight):
        raise refusal(f"{name}.weight: expected [C, {shape.dim}], got {list(weight.shape)}")
    bias = checkpoint.floats(f"{name}.bias") if f"{name}.bias" in checkpoint.arrays else np.zeros(len(weight), "f4")
    if bias.shape != weight.shape[:1]:
        raise refusal(f"{name}.bias: expected [{len(weight)}], got {list(bias.shape)}")
    return {"head.weight": weight, "head.bias": bias}


def prompts(
    name: str, array: NDArray[np.float32], shape: BackboneShape
) -> tuple[str, tuple[int, ...], NDArray[np.float32]]:
    """Prompts [1, p, D] or [L, p, D] → method, prompt lengths, rows [Σp, D]."""
    if array.ndim != 3 or array.shape[2] != shape.dim or array.shape[0] not in (1, shape.depth) or not array.shape[1]:
        raise refusal(
            f"{name}: expected [1, p, {shape.dim}] or [{shape.depth}, p, {shape.dim}] as the running backbone has "
            f"{shape.depth} layers of width {shape.dim}, got {list(array.shape)}"
        )
    layers, p, _ = array.shape
    deep = layers > 1 or shape.depth == 1
    lengths = (p,) * shape.depth if deep else (p, *(0,) * (shape.depth - 1))
    return "vpt_deep" if deep else "vpt_shallow", lengths, array.reshape(-1, shape.dim)


def frozen(
    checkpoint: Checkpoint, shape: BackboneShape, sources: Callable[[str], Sequence[str]] = lambda name: [name]
) -> dict[str, Callable[[], NDArray[np.float32]]]:
    """Readers of the backbone's arrays that the checkpoint has, by timm's names.

    `sources`: what the checkpoint calls the arrays that, joined, are the one of a timm name. Raises Conflict
    wrong_backbone where the only one has another shape.
    """

    def reader(names: Sequence[str]) -> Callable[[], NDArray[np.float32]]:
        return lambda: np.concatenate([checkpoint.floats(name) for name in names])

    readers = {}
    for name, expected in shape.names.items():
        names = sources(name)
        if not names or any(source not in checkpoint.arrays for source in names):
            continue
        if len(names) == 1 and (got := checkpoint.arrays[names[0]].shape) != expected:
            raise Conflict(
                f"{names[0]}: expected {list(expected)} as in the running backbone, got {list(got)}: the checkpoint "
                "contains another backbone",
                code="wrong_backbone",
            )
        readers[name] = reader(names)
    return readers


def refuse_others(checkpoint: Checkpoint, known: Set[str]) -> None:
    """Refuse trained arrays that are not known, since the answers would lack them. Losses and metrics do not count."""
    others = sorted(name for name in checkpoint.arrays if name not in known and not _BESIDE.match(name))
    if others:
        raise refusal(f"{quoted(others[0])} does not map: expected a classifier and the frozen backbone alone")
