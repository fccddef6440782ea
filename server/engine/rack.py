"""The rack: fixed memory on the device that lenses sit in.

One slab of D-wide vectors holds everything a lens consists of: the key and the value of each prompt of each layer, its
carried tokens, the rows of its head. A lens takes any free vectors; its slot remembers their numbers. So ragged prompt
lengths (1 … 200, or 0 in some layers) and class counts waste nothing, and the slab's address never moves: what a batch
needs is a list of numbers. Vector 0 is zero for ever and stands in for padding, always behind a mask.

    allocate(lens) ─► seat ─► write(seat, lens) ─► … gather(seats) … ─► free(seat)

A slot's generation grows whenever its tenant changes, so a seat that outlived its lens is noticed, never answered with
somebody else's. Writing touches vectors that no living seat names; hence it may run beside a forward.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .lens import Lens, Prefix

Indices = NDArray[np.int64]


class RackFullError(RuntimeError):
    """The lens does not fit now; the message says what it takes and what is free."""


class StaleSeatError(RuntimeError):
    """A row's seat names a slot whose lens has changed. An invariant is broken: pinned slots are never freed."""


@dataclass(frozen=True)
class Place:
    """Where a lens sits: a slot of the rack in one of its generations."""

    slot: int
    generation: int


@dataclass
class _Slot:
    """Numbers of the vectors of one lens. keys, values: [L, p_max], padded with 0; lengths: [L]."""

    generation: int = 0
    used: bool = False
    keys: Indices = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    values: Indices = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    lengths: Indices = field(default_factory=lambda: np.zeros(0, np.int64))
    tokens: Indices = field(default_factory=lambda: np.zeros(0, np.int64))
    head: Indices = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def head_only(self) -> bool:
        return not len(self.tokens) and not self.lengths.any()

    def vectors(self) -> Indices:
        """Every vector this slot holds."""
        prompts = [self.keys[self.keys > 0], self.values[self.values > 0]]
        return np.concatenate([*prompts, self.tokens, self.head])


class Rack:
    """`slots` lenses at the most, in `vectors` vectors of width `dim`."""

    def __init__(
        self,
        *,
        dim: int,
        slots: int,
        vectors: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dim, self.capacity = dim, vectors
        self._slab = torch.zeros(vectors + 1, dim, device=device, dtype=dtype)
        self._bias = torch.zeros(vectors + 1, device=device, dtype=dtype)  # of a head's row, beside its vector
        self._slots = [_Slot() for _ in range(slots)]
        self._free_slots = list(range(slots - 1, -1, -1))
        self._free = np.arange(vectors, 0, -1, dtype=np.int64)  # a stack: the free numbers are _free[:_left]
        self._left = vectors
        self._lock = threading.Lock()

    @classmethod
    def sized(cls, *, dim: int, slots: int, size_bytes: int, device: torch.device | str, dtype: torch.dtype) -> Rack:
        """As many vectors as fit into `size_bytes` of device memory."""
        per_vector = (dim + 1) * dtype.itemsize
        return cls(dim=dim, slots=slots, vectors=max(1, size_bytes // per_vector), device=device, dtype=dtype)

    # --- lenses come and go ------------------------------------------------------------------------------------------

    def can_ever_hold(self, lens: Lens) -> bool:
        return demand(lens) <= self.capacity and bool(self._slots)

    def can_allocate(self, lens: Lens) -> bool:
        return demand(lens) <= self._left and bool(self._free_slots)

    def allocate(self, lens: Lens) -> Place:
        """Reserve a slot and vectors. Raises RackFullError; then nothing is taken."""
        with self._lock:
            if not self.can_allocate(lens):
                raise RackFullError(
                    f"the lens takes 1 slot and {demand(lens)} vectors; free are {len(self._free_slots)} slots "
                    f"and {self._left} of {self.capacity} vectors"
                )
            number = self._free_slots.pop()
            slot = self._slots[number]
            lengths = np.array(lens.prefix_lengths, np.int64)
            slot.keys, slot.values = self._table(lengths), self._table(lengths)
            slot.lengths = lengths
            slot.tokens, slot.head = self._take(lens.tokens.shape[-2]), self._take(lens.classes)
            slot.generation += 1
            slot.used = True
            return Place(number, slot.generation)

    def write(self, place: Place, lens: Lens) -> None:
        """Copy the lens into its vectors."""
        slot = self._check(place)
        with torch.inference_mode():
            for layer, length in enumerate(slot.lengths):
                self._put(slot.keys[layer, :length], lens.keys[layer])
                self._put(slot.values[layer, :length], lens.values[layer])
            self._put(slot.tokens, lens.tokens)
            self._put(slot.head, lens.head_weight)
            self._bias[self._index(slot.head)] = lens.head_bias.to(self._bias)

    def free(self, place: Place) -> None:
        """Take the lens out. The caller sees to it that no row needs it any more."""
        with self._lock:
            slot = self._check(place)
            vectors = slot.vectors()
            self._free[self._left : self._left + len(vectors)] = vectors
            self._left += len(vectors)
            self._slots[place.slot] = _Slot(generation=slot.generation)
            self._free_slots.append(place.slot)

    # --- what a forward asks -----------------------------------------------------------------------------------------

    def gather(self, places: Sequence[Place]) -> Gathered:
        """The prompts of these seats, in their order."""
        return Gathered(self._slab, [self._check(place) for place in places])

    def heads(self, features: Tensor, places: Sequence[Place]) -> list[Tensor]:
        """Features [R, D], one seat a row → logits [C_r] of each row."""
        slots = [self._check(place) for place in places]
        counts = [len(slot.head) for slot in slots]
        rows = np.zeros((len(slots), max(counts)), np.int64)
        for row, slot in zip(rows, slots, strict=True):
            row[: len(slot.head)] = slot.head
        numbers = self._index(rows)  # [R, C]
        weights = self._slab[numbers]  # [R, C, D]
        logits = torch.baddbmm(self._bias[numbers].unsqueeze(-1), weights, features.to(weights.dtype).unsqueeze(-1))
        return [row[:count] for row, count in zip(logits.squeeze(-1), counts, strict=True)]

    def head_only(self, place: Place) -> bool:
        """Whether the seat's lens leaves the trunk as it is."""
        return self._check(place).head_only

    def has_tokens(self, place: Place) -> bool:
        return len(self._check(place).tokens) > 0

    # --- facts -------------------------------------------------------------------------------------------------------

    @property
    def slots(self) -> int:
        return len(self._slots)

    @property
    def used_slots(self) -> int:
        return len(self._slots) - len(self._free_slots)

    @property
    def used_vectors(self) -> int:
        return self.capacity - self._left

    @property
    def vector_bytes(self) -> int:
        return (self.dim + 1) * self._slab.element_size()

    def size_bytes(self, place: Place) -> int:
        return len(self._check(place).vectors()) * self.vector_bytes

    def check_integrity(self) -> None:
        """Every vector belongs to exactly one lens or is free, and vector 0 is still zero."""
        with self._lock:
            owned = [slot.vectors() for slot in self._slots if slot.used]
            everything = np.sort(np.concatenate([*owned, self._free[: self._left]]))
            if not np.array_equal(everything, np.arange(1, self.capacity + 1)):
                raise AssertionError("the rack's vectors are not a partition into lenses and free ones")
            if sorted(self._free_slots) != [n for n, slot in enumerate(self._slots) if not slot.used]:
                raise AssertionError("the rack's free slots are not those without a lens")
            if self._slab[0].any() or self._bias[0] != 0:
                raise AssertionError("vector 0, the padding, is not zero")

    # --- inside ------------------------------------------------------------------------------------------------------

    def _check(self, place: Place) -> _Slot:
        slot = self._slots[place.slot]
        if not slot.used or slot.generation != place.generation:
            raise StaleSeatError(
                f"slot {place.slot} is in generation {slot.generation}, the seat is of generation {place.generation}"
            )
        return slot

    def _take(self, count: int) -> Indices:
        self._left -= count
        return self._free[self._left : self._left + count].copy()

    def _table(self, lengths: Indices) -> Indices:
        table = np.zeros((len(lengths), int(lengths.max(initial=0))), np.int64)
        for row, length in zip(table, lengths, strict=True):
            row[:length] = self._take(int(length))
        return table

    def _put(self, numbers: Indices, vectors: Tensor) -> None:
        self._slab[self._index(numbers)] = vectors.to(self._slab)

    def _index(self, numbers: Indices) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(numbers)).to(self._slab.device, non_blocking=True)


class Gathered:
    """The prompts of a batch's seats (a `lens.Condition`): padded to the longest, with a mask where they differ."""

    def __init__(self, slab: Tensor, slots: Sequence[_Slot]) -> None:
        self._slab, self._slots = slab, slots
        self._lengths = np.stack([slot.lengths for slot in slots])  # [B, L]
        self._longest = self._lengths.max(axis=0)  # [L]
        self.tokens, self.token_mask = self._carried()

    def prefix(self, layer: int) -> Prefix | None:
        longest = int(self._longest[layer])
        if longest == 0:
            return None
        lengths = self._lengths[:, layer]
        keys = self._vectors(
            [slot.keys[layer, :length] for slot, length in zip(self._slots, lengths, strict=True)], longest
        )
        values = self._vectors(
            [slot.values[layer, :length] for slot, length in zip(self._slots, lengths, strict=True)], longest
        )
        return Prefix(keys, values, self._mask(lengths, longest))

    def _carried(self) -> tuple[Tensor | None, Tensor | None]:
        lengths = np.array([len(slot.tokens) for slot in self._slots])
        longest = int(lengths.max())
        if longest == 0:
            return None, None
        return self._vectors([slot.tokens for slot in self._slots], longest), self._mask(lengths, longest)

    def _vectors(self, numbers: Sequence[Indices], longest: int) -> Tensor:
        """[B, longest, D], zero where a row has fewer."""
        table = np.zeros((len(numbers), longest), np.int64)
        for row, own in zip(table, numbers, strict=True):
            row[: len(own)] = own
        return self._slab[torch.from_numpy(table).to(self._slab.device, non_blocking=True)]

    def _mask(self, lengths: Indices, longest: int) -> Tensor | None:
        if (lengths == longest).all():
            return None
        mask = np.arange(longest) < lengths[:, None]
        return torch.from_numpy(mask).to(self._slab.device, non_blocking=True)


def demand(lens: Lens) -> int:
    """How many vectors a lens takes: two a prompt and layer, one a token, one a class."""
    return 2 * sum(lens.prefix_lengths) + int(lens.tokens.shape[-2]) + lens.classes
