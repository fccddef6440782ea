"""Gathering: what a batch's seats bring, read from the rack by vector number: prefixes, carried tokens, additions.

Rows bring different amounts: gathered tensors are padded to the longest row with vector 0, which is always zero, and
have a mask where padding would change a softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .additions import Additions
from .lens import ENTRY, Prefix
from .spec import Pool
from .transfer import Transfer

Indices = NDArray[np.int64]
NOTHING: Indices = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Lane:
    """Properties that rows need in common to share a lane; see `Slot.lane`."""

    carries: bool
    enters: int
    pool: Pool | None
    kinds: frozenset[str]
    reads_from: int | None


@dataclass
class Slot:
    """Vector numbers of one lens. keys, values: [L, p_max], padded with 0; lengths: [L]; parts: by layer and name, as
    in `Lens.parts`; hidden: of each hidden layer of the head; reads, enters, pool: as in the lens."""

    generation: int = 0
    used: bool = False
    keys: Indices = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    values: Indices = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    lengths: Indices = field(default_factory=lambda: NOTHING)
    tokens: Indices = field(default_factory=lambda: NOTHING)
    head: Indices = field(default_factory=lambda: NOTHING)
    parts: dict[tuple[int, str], Indices] = field(default_factory=dict)
    hidden: list[Indices] = field(default_factory=list)
    reads: bool = False
    enters: int = 0
    pool: Pool | None = None

    @cached_property
    def lane(self) -> Lane:
        """What rows of one lane have in common: carried tokens lengthen it from their layer on, the pooling decides how
        much of the last block is computed, each kind of addition costs all of its rows the same, and readers start in
        the same layer. Call it only for a slot in use; freeing creates a new slot."""
        return Lane(len(self.tokens) > 0, self.enters, self.pool, self.kinds, self.reads_from)

    @property
    def head_only(self) -> bool:
        return not len(self.tokens) and not self.lengths.any() and not self.parts

    @cached_property
    def prefix_only(self) -> bool:
        """Whether the lens brings only prefixes to the trunk and reads only the backbone's own pooling. Call it only
        for a slot in use."""
        return not len(self.tokens) and not self.parts and self.pool is None and self.reads_from is None

    @cached_property
    def reads_from(self) -> int | None:
        """As `Lens.reads_from`. Call it only for a slot in use."""
        if not self.reads or self.head_only:
            return None
        return 0 if len(self.tokens) else min({*np.flatnonzero(self.lengths).tolist(), *self.layers})

    @cached_property
    def kinds(self) -> frozenset[str]:
        """Names of the parts in all layers. Call it only for a slot in use."""
        return frozenset(name for _, name in self.parts)

    @cached_property
    def layers(self) -> frozenset[int]:
        """Layers that have parts."""
        return frozenset(layer for layer, _ in self.parts)

    def vectors(self) -> Indices:
        """Every vector this slot holds."""
        prompts = [self.keys[self.keys > 0], self.values[self.values > 0]]
        return np.concatenate([*prompts, self.tokens, self.head, *self.parts.values(), *self.hidden])


@dataclass(frozen=True)
class Vectors:
    """The rack's memory: slab [V, D], and a scalar [V] beside each vector; and the transfer for a batch's vector
    numbers."""

    slab: Tensor
    scalars: Tensor
    transfer: Transfer

    def index(self, numbers: NDArray[np.generic]) -> Tensor:
        return self.transfer.send(numbers)

    def at(self, index: Tensor) -> Tensor:
        """Numbers […] → vectors […, D]. On a CPU the kernel of `slab[index]` copies element by element; this one copies
        whole vectors."""
        return F.embedding(index, self.slab)


class Gathered:
    """What a batch's seats bring (a `lens.Condition`). Raises ValueError unless the seats may share a lane."""

    def __init__(self, memory: Vectors, slots: Sequence[Slot]) -> None:
        self._memory, self._slots = memory, slots
        enters, pools = ({getattr(slot, name) for slot in slots} for name in ("enters", "pool"))
        if len(enters) > 1 or len(pools) > 1:
            raise ValueError(f"expected seats of one lane, got poolings {pools} and tokens that enter layers {enters}")
        (self.enters,), (self.pool,) = enters, pools
        self._longest = np.stack([slot.lengths for slot in slots]).max(axis=0)  # [L]
        self._prompts = Prompts.of(slots) if self._longest.any() else None
        self._numbers = self._seen = None
        if self._prompts is not None:
            self._numbers = memory.index(self._prompts.numbers)
            self._seen = memory.index(self._prompts.seen) if self._prompts.ragged.any() else None
        self._layers = frozenset[int]().union(*(slot.layers for slot in slots))
        self.reads_from = slots[0].reads_from  # the same for all rows of a lane
        self.tokens, self.token_mask = self._carried()
        entry = self._part(ENTRY, "entry")
        self.entry = None if entry is None else entry.vectors

    def prefix(self, layer: int) -> Prefix | None:
        longest = int(self._longest[layer])
        if longest == 0 or self._prompts is None or self._numbers is None:
            return None
        keys, values = (self._memory.at(numbers[layer, :, :longest]) for numbers in self._numbers)
        return Prefix(keys, values, self._mask(layer))

    def additions(self, layer: int) -> Additions | None:
        if layer not in self._layers:
            return None
        return Additions.gathered(lambda name: self._part(layer, name))

    def _mask(self, layer: int) -> Tensor | None:
        """[B, longest], True where a prompt is real; None if all rows have the same length."""
        if self._seen is None or self._prompts is None or not self._prompts.ragged[layer]:
            return None
        return self._seen[layer, :, : int(self._longest[layer])]

    def _carried(self) -> tuple[Tensor | None, Tensor | None]:
        lengths = np.array([len(slot.tokens) for slot in self._slots])
        if not lengths.any():
            return None, None
        return self._vectors([slot.tokens for slot in self._slots]), _mask(self._memory, lengths)

    def _part(self, layer: int, name: str) -> GatheredPart | None:
        numbers = [slot.parts.get((layer, name), NOTHING) for slot in self._slots]
        return GatheredPart(self._memory, numbers) if any(map(len, numbers)) else None

    def _vectors(self, numbers: Sequence[Indices]) -> Tensor:
        """[B, longest, D], zero where a row has fewer."""
        return self._memory.at(self._memory.index(padded(numbers)))


@dataclass(frozen=True)
class Prompts:
    """Numbers of a batch's prompts, one array for all layers, so that one transfer sends them.

    numbers: [2, L, B, P], of keys and of values, 0 where a row has fewer; seen: [L, B, P], False there.
    """

    numbers: Indices
    seen: NDArray[np.bool_]

    @classmethod
    def of(cls, slots: Sequence[Slot], longest: int | None = None, rows: int | None = None) -> Prompts:
        """`longest`: P, and `rows`: B, if they exceed what these slots have; rows beyond the slots see no prompt."""
        lengths = np.stack([slot.lengths for slot in slots])  # [B, L]
        wide = int(lengths.max()) if longest is None else longest
        count = len(slots) if rows is None else rows
        numbers = np.zeros((2, lengths.shape[1], count, wide), np.int64)
        seen = np.zeros(numbers.shape[1:], np.bool_)
        for row, slot in enumerate(slots):
            most = slot.keys.shape[1]
            numbers[0, :, row, :most], numbers[1, :, row, :most] = slot.keys, slot.values
        seen[:, : len(slots)] = np.arange(wide) < lengths.T[:, :, None]
        return cls(numbers, seen)

    @cached_property
    def ragged(self) -> NDArray[np.bool_]:
        """[L]: whether a layer's rows have different lengths."""
        lengths = self.seen.sum(axis=2)
        ragged: NDArray[np.bool_] = (lengths != lengths[:, :1]).any(axis=1)
        return ragged


class GatheredPart:
    """One part of each row, an `additions.BatchPart`. numbers: of each row's vectors; at least one row has some."""

    def __init__(self, memory: Vectors, numbers: Sequence[Indices]) -> None:
        self._memory, self._numbers = memory, numbers

    @cached_property
    def _index(self) -> Tensor:
        return self._memory.index(padded(self._numbers))

    @cached_property
    def vectors(self) -> Tensor:
        return self._memory.at(self._index)

    @property
    def scalars(self) -> Tensor:
        return self._memory.scalars[self._index]

    def nonempty_rows(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        lengths = np.array([len(vectors) for vectors in self._numbers])
        rows = np.flatnonzero(lengths)
        if len(rows) == len(lengths):
            return self.vectors, _mask(self._memory, lengths), None
        index = self._memory.index(padded([self._numbers[row] for row in rows.tolist()]))
        return self._memory.at(index), _mask(self._memory, lengths[rows]), self._memory.index(rows)


def padded(numbers: Sequence[Indices]) -> Indices:
    """[B, longest], 0 where a row has fewer."""
    table = np.zeros((len(numbers), max(map(len, numbers))), np.int64)
    for row, vectors in zip(table, numbers, strict=True):
        row[: len(vectors)] = vectors
    return table


def _mask(memory: Vectors, lengths: Indices) -> Tensor | None:
    """[B, longest], True where a row has a vector; None if all rows have the same length."""
    longest = lengths.max()
    if (lengths == longest).all():
        return None
    return memory.index(np.arange(longest) < lengths[:, None])
