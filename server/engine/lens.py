"""A lens: a bundle lowered to what the one forward needs.

The forward knows primitives, not methods:

    keys, values   prompts as keys and values of each layer's attention (prefix); exact wherever a method throws its
                   prompts' outputs away, because then prompts act on the image tokens in no other way
    tokens         prompts carried as real tokens, from the layer where they enter through all that follow
    additions      bias vectors, prompts under a softmax of their own, low-rank rows: see `additions.py`
    entry          a vector added to each image token before the first block
    reads          all of that for tokens of the task's own, which read the trunk and leave it as it is: see `reader.py`
    pool           which tokens the head reads: see `pooling.py`
    head           the linear classifier on the pooled feature, with hidden layers before it if need be

A `Condition` is what a batch of rows brings to the forward. Training expands one lens over its batch (`condition`),
serving gathers many lenses by slot (`rack.Rack.gather`); the forward cannot tell which.
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

ENTRY = -1  # the layer that parts before the first block go under


@dataclass(frozen=True)
class Dense:
    """A hidden layer of a head, with a ReLU behind it. weight: [H, I], bias: [H]; H and I are D at the most."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Lens:
    """Shapes, with an optional leading batch axis [B] where prompt dropout makes them differ from row to row:

    keys[l], values[l]: [p_l, D] (heads side by side) · tokens: [T, D] · head_weight: [C, D] · head_bias: [C].
    What few methods have is empty unless given. additions[l]: of layer l · entry: [2, D], for the tokens that are no
    patches and for the patches · hidden: layers between the feature and the head, which then reads the last one's H ·
    enters: the layer before which the tokens come in · pool: None for the backbone's own · reads: whether all this is
    for a copy of the class token and the carried tokens alone, see `reader.py`.
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
        """Whether the plain frozen ViT's feature is all that is asked for: it can be shared with every such lens."""
        return self.first_layer == len(self.keys)

    @property
    def reads_from(self) -> int | None:
        """The layer at which the task's own tokens start to read the trunk; None where the lens is no reader's."""
        return self.first_layer if self.reads and not self.head_only else None

    @property
    def first_layer(self) -> int:
        """The first layer at which anything differs from the plain frozen ViT: the number of layers if none does."""
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
        """What the rack keeps besides prefixes, tokens and head: parts by layer and name."""
        found = {} if self.entry is None else {(ENTRY, "entry"): Part(self.entry)}
        for layer, own in enumerate(self.additions):
            if own is not None:
                found |= {(layer, name): part for name, part in own.parts.items()}
        return found


@dataclass(frozen=True)
class Prefix:
    """One layer's prompts for a batch. keys, values: [B, P, D]; mask: [B, P], True where a prompt is real, or None."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None


class Condition(Protocol):
    """What rows bring besides their image. Every tensor's first axis is the rows' order."""

    def prefix(self, layer: int) -> Prefix | None: ...

    def additions(self, layer: int) -> Additions | None: ...

    @property
    def reads_from(self) -> int | None:
        """The layer at which the rows start to read the trunk; None where they are no readers."""
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
        """[B, T], True where a token is real; None where all are."""
        ...

    @property
    def enters(self) -> int:
        """The layer before which the tokens come in."""
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
    """One lens for a whole batch, differentiable: how `fit` asks the forward."""

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
