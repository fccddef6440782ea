"""The interface of a foreign format: how to recognise it, and what is read from a checkpoint of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checkpoint import Checkpoint
from .refusal import refusal

Params = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Width:
    """What a format needs of the running backbone: D, the number of layers, and its parameters' shapes by name."""

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
    read: Callable[[Checkpoint, Width], ReadParameters]


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def head(checkpoint: Checkpoint, width: Width, *names: str) -> Params:
    """`head.weight` [C, D] and `head.bias` [C] of the first of these names; a missing bias is zero.

    Raises Unprocessable no_head or bad_checkpoint.
    """
    name = next((n for n in names if f"{n}.weight" in checkpoint.arrays), None)
    if name is None:
        raise refusal(
            f"expected a classifier [C, {width.dim}] as {' or '.join(f'{n}.weight' for n in names)}, "
            f"which may come in a file of its own; got {checkpoint.summary}",
            code="no_head",
        )
    weight = checkpoint.floats(f"{name}.weight")
    if weight.ndim != 2 or weight.shape[1] != width.dim or not len(weight):
        raise refusal(f"{name}.weight: expected [C, {width.dim}], got {list(weight.shape)}")
    bias = checkpoint.floats(f"{name}.bias") if f"{name}.bias" in checkpoint.arrays else np.zeros(len(weight), "f4")
    if bias.shape != weight.shape[:1]:
        raise refusal(f"{name}.bias: expected [{len(weight)}], got {list(bias.shape)}")
    return {"head.weight": weight, "head.bias": bias}


def prompts(name: str, array: NDArray[np.float32], width: Width) -> tuple[str, tuple[int, ...], NDArray[np.float32]]:
    """Prompts [1, p, D] or [L, p, D] → method, prompt lengths, rows [Σp, D]."""
    if array.ndim != 3 or array.shape[2] != width.dim or array.shape[0] not in (1, width.depth) or not array.shape[1]:
        raise refusal(
            f"{name}: expected [1, p, {width.dim}] or [{width.depth}, p, {width.dim}] as the running backbone has "
            f"{width.depth} layers of width {width.dim}, got {list(array.shape)}"
        )
    layers, p, _ = array.shape
    deep = layers > 1 or width.depth == 1
    lengths = (p,) * width.depth if deep else (p, *(0,) * (width.depth - 1))
    return "vpt_deep" if deep else "vpt_shallow", lengths, array.reshape(-1, width.dim)


def frozen(checkpoint: Checkpoint, width: Width) -> dict[str, Callable[[], NDArray[np.float32]]]:
    """Readers of the backbone's arrays that the checkpoint has under timm's names."""

    def reader(name: str) -> Callable[[], NDArray[np.float32]]:
        return lambda: checkpoint.floats(name)

    return {name: reader(name) for name, shape in width.names.items() if checkpoint.shape(name) == shape}
