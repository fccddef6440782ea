"""A lens: a bundle lowered to the inputs of the one forward.

The forward knows primitives, not methods:

    keys, values   prompts as keys and values of each layer's attention (prefix); exact for every method that discards
                   its prompts' outputs, because then prompts act on the image tokens in no other way
    tokens         prompts carried as real tokens, from the layer where they enter through all that follow
    additions      bias vectors, prompts under a softmax of their own, low-rank rows: see `additions.py`
    entry          a vector added to each image token before the first block
    reads          all of that for tokens of the task's own, which read the trunk and do not change it: see `reader.py`
    pool           which tokens the head reads: see `pooling.py`
    head           the linear classifier on the pooled feature, after hidden layers if the method has any

A `Condition` is what the rows of a batch bring to the forward. Training expands one lens over its batch (`condition`),
serving gathers many lenses by slot (`rack.Rack.gather`); the forward cannot tell the difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from .additions import Additions, Part
from .spec import Pool

ENTRY = -1  # the layer number of parts before the first block


@dataclass(frozen=True)
class Dense:
    """A hidden layer of a head, followed by a ReLU. weight: [H, I], bias: [H]; H and I are at most D."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Lens:
    """Shapes, with an optional leading batch axis [B] if prompt dropout makes rows differ:

    keys[l], values[l]: [p_l, D] (heads side by side) · tokens: [T, D] · head_weight: [C, D] · head_bias: [C]. Fields
    that few methods use are empty by default. additions[l]: of layer l · entry: [2, D], for the tokens that are no
    patches and for the patches · hidden: layers between the feature and the head, which then reads the last one's H ·
    enters: the layer before which the tokens are appended · pool: None for the backbone's own · reads: whether all this
    applies only to a copy of the class token and the carried tokens, see `reader.py`.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    tokens: Tensor
    head_weight: Tensor
    head_bias: Tensor
    additions: tuple[Additions | None, ...] = ()
    entry: Tensor | None = None
    hidden: tuple[Dense, ...] = ()
    enters: int = 0
    pool: Pool | None = None
    reads: bool = False

    def __post_init__(self) -> None:
        if self.reads and self.entry is not None:
            raise ValueError("readers leave the image tokens as they are: expected no entry, got one")
        if self.reads and self.pool is not None:
            raise ValueError(f"readers are read at their own class token: expected no pool, got {self.pool!r}")

    @property
    def classes(self) -> int:
        return self.head_weight.shape[0]

    @property
    def head_only(self) -> bool:
        """Whether the lens needs only the plain frozen ViT's feature, which all such lenses can share."""
        return self.first_layer == len(self.keys)

    @property
    def reads_from(self) -> int | None:
        """The layer at which the task's own tokens start to read the trunk; None if the lens has no readers."""
        return self.first_layer if self.reads and not self.head_only else None

    @property
    def first_layer(self) -> int:
        """The first layer at which anything differs from the plain frozen ViT; the number of layers if nothing does."""
        if self.entry is not None:
            return 0
        lengths = self.prefix_lengths
        added = self.additions or (None,) * len(lengths)
        first = next((layer for layer, length in enumerate(lengths) if length or added[layer]), len(lengths))
        return min(first, self.enters) if self.tokens.shape[-2] else first

    @property
    def prefix_lengths(self) -> tuple[int, ...]:
        return tuple(key.shape[-2] for key in self.keys)

    @cached_property
    def parts(self) -> Mapping[tuple[int, str], Part]:
        """What the rack stores besides prefixes, tokens and head: parts by layer and name."""
        parts = {} if self.entry is None else {(ENTRY, "entry"): Part(self.entry)}
        for layer, additions in enumerate(self.additions):
            if additions is not None:
                parts |= {(layer, name): part for name, part in additions.parts.items()}
        return parts


@dataclass(frozen=True)
class Prefix:
    """One layer's prompts for a batch. keys, values: [B, P, D]; mask: [B, P], True where a prompt is real, or None."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None


class Condition(Protocol):
    """What rows bring besides their image. The first axis of every tensor is the rows' order."""

    def prefix(self, layer: int) -> Prefix | None: ...

    def additions(self, layer: int) -> Additions | None: ...

    @property
    def reads_from(self) -> int | None:
        """The layer at which the rows start to read the trunk; None if they are no readers."""
        ...

    @property
    def entry(self) -> Tensor | None:
        """[2, D] or [B, 2, D], or None."""
        ...

    @property
    def tokens(self) -> Tensor | None:
        """[B, T, D], or None."""
        ...

    @property
    def token_mask(self) -> Tensor | None:
        """[B, T], True where a token is real; None if all are."""
        ...

    @property
    def enters(self) -> int:
        """The layer before which the tokens are appended."""
        ...

    @property
    def pool(self) -> Pool | None:
        """None for the backbone's own."""
        ...


@dataclass(frozen=True)
class Plain:
    """No prompts at all: the plain frozen ViT."""

    pool: Pool | None = None
    tokens: Tensor | None = None
    token_mask: Tensor | None = None
    entry: Tensor | None = None
    reads_from: int | None = None
    enters: int = 0

    def prefix(self, layer: int) -> Prefix | None:
        return None

    def additions(self, layer: int) -> Additions | None:
        return None


class Expanded:
    """One lens for a whole batch, differentiable: the condition that `fit` uses."""

    token_mask: Tensor | None = None

    def __init__(self, lens: Lens, rows: int) -> None:
        self._lens, self._rows = lens, rows
        self.tokens: Tensor | None = self._spread(lens.tokens) if lens.tokens.shape[-2] else None
        self.entry, self.enters, self.pool = lens.entry, lens.enters, lens.pool
        self.reads_from = lens.reads_from

    def prefix(self, layer: int) -> Prefix | None:
        keys = self._lens.keys[layer]
        if keys.shape[-2] == 0:
            return None
        return Prefix(self._spread(keys), self._spread(self._lens.values[layer]), None)

    def additions(self, layer: int) -> Additions | None:
        return self._lens.additions[layer] if self._lens.additions else None

    def _spread(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.ndim == 3 else tensor.expand(self._rows, -1, -1)


def condition(lens: Lens, rows: int) -> Condition:
    """`lens` for each of `rows` rows."""
    return Expanded(lens, rows)


def no_prefix(depth: int, like: Tensor) -> tuple[Tensor, ...]:
    """Keys or values of a lens without a prefix: `depth` empty tensors [0, D]."""
    return tuple(torch.empty(0, like.shape[-1], dtype=like.dtype, device=like.device) for _ in range(depth))
