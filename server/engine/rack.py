"""The rack: fixed memory on the device that holds lenses.

One slab of D-wide vectors holds everything that a lens consists of: the key and the value of each prompt of each layer,
its carried tokens, its additions' parts, the rows of its head. A lens takes any free vectors; its slot stores their
numbers. So ragged prompt lengths (1 … 200, or 0 in some layers) and class counts waste nothing, and the slab's address
never changes: a batch needs only lists of numbers. Vector 0 is always zero and serves as padding, behind a mask
wherever zeros would change the result.

    allocate(lens) ─► place ─► write(place, lens) ─► … gather(places) … ─► free(place)

A slot's generation grows whenever its lens changes, so a place that outlived its lens raises an error and is never
answered with another lens. Writing touches only vectors that no living place names; hence it may run beside a forward.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .gathered import Gathered, Indices, Prompts, Slot, Vectors, padded
from .lens import Lens
from .transfer import DirectTransfer, Transfer


class RackFullError(RuntimeError):
    """The lens does not fit now; the message gives what it needs and what is free."""


class StaleSeatError(RuntimeError):
    """A row's seat names a slot whose lens has changed. An invariant is broken: pinned slots are never freed."""


@dataclass(frozen=True)
class Place:
    """The position of a lens: a slot of the rack and its generation."""

    slot: int
    generation: int


class Rack:
    """At most `slots` lenses, in `vectors` vectors of width `dim`."""

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
        self._direct = DirectTransfer(torch.device(device))
        self._slab = _zeros(vectors + 1, dim, device=device, dtype=dtype)
        self._bias = _zeros(vectors + 1, device=device, dtype=dtype)  # the scalar of a head's or a part's vector
        self._slots = [Slot() for _ in range(slots)]
        self._free_slots = list(range(slots - 1, -1, -1))
        self._free = np.arange(vectors, 0, -1, dtype=np.int64)  # a stack: the free numbers are _free[:_left]
        self._left = vectors
        self._lock = threading.Lock()

    @classmethod
    def sized(cls, *, dim: int, slots: int, size_bytes: int, device: torch.device | str, dtype: torch.dtype) -> Rack:
        """A rack with as many vectors as fit into `size_bytes` of device memory."""
        per_vector = (dim + 1) * dtype.itemsize
        return cls(dim=dim, slots=slots, vectors=max(1, size_bytes // per_vector), device=device, dtype=dtype)

    # --- lenses come and go ------------------------------------------------------------------------------------------

    def can_ever_hold(self, lens: Lens) -> bool:
        return demand(lens) <= self.capacity and bool(self._slots)

    def can_allocate(self, lens: Lens) -> bool:
        return demand(lens) <= self._left and bool(self._free_slots)

    def allocate(self, lens: Lens) -> Place:
        """Reserve a slot and vectors. Raises RackFullError; then nothing is reserved."""
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
            slot.parts = {name: self._take(len(part.vectors)) for name, part in lens.parts.items()}
            slot.hidden = [self._take(len(layer.weight)) for layer in lens.hidden]
            slot.reads = lens.reads
            slot.enters, slot.pool = lens.enters, lens.pool
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
            self._put(slot.head, lens.head_weight, lens.head_bias)
            for numbers, dense in zip(slot.hidden, lens.hidden, strict=True):
                self._put(numbers, dense.weight, dense.bias)
            for name, part in lens.parts.items():
                self._put(slot.parts[name], part.vectors, part.scalars)

    def free(self, place: Place) -> None:
        """Remove the lens. The caller guarantees that no row needs it any more."""
        with self._lock:
            slot = self._check(place)
            vectors = slot.vectors()
            self._free[self._left : self._left + len(vectors)] = vectors
            self._left += len(vectors)
            self._slots[place.slot] = Slot(generation=slot.generation)
            self._free_slots.append(place.slot)

    # --- for the forward ---------------------------------------------------------------------------------------------

    def gather(self, places: Sequence[Place], transfer: Transfer | None = None) -> Gathered:
        """What the lenses at these places bring, in their order."""
        memory = Vectors(self._slab, self._bias, transfer or self._direct)
        return Gathered(memory, [self._check(place) for place in places])

    def logits(self, features: Tensor, places: Sequence[Place], transfer: Transfer | None = None) -> Tensor:
        """Features [R, D], one place per row → logits [R, most classes]; the first `classes` of each row count."""
        slots, transfer = [self._check(place) for place in places], transfer or self._direct
        hidden = self._hidden(features.to(self._slab.dtype), slots, transfer)
        return self._dense(hidden, [slot.head for slot in slots], transfer)

    def classes(self, place: Place) -> int:
        return len(self._check(place).head)

    def prompts(self, places: Sequence[Place], rows: int, longest: int) -> Prompts:
        """Numbers of the prefixes at these places, padded to `rows` rows of `longest` prompts."""
        return Prompts.of([self._check(place) for place in places], longest, rows)

    def prefix_only(self, place: Place) -> bool:
        """Whether the lens brings only prefixes to the trunk, or nothing, and reads the backbone's own pooling."""
        return self._check(place).prefix_only

    def longest(self, place: Place) -> int:
        """The largest number of prompts that the lens has in a layer."""
        return self._check(place).keys.shape[1]

    def head_only(self, place: Place) -> bool:
        """Whether the lens needs only the plain trunk's feature."""
        return self._check(place).head_only

    def plain(self, place: Place) -> bool:
        """Whether the lens needs only the plain trunk's feature, pooled as the backbone pools."""
        slot = self._check(place)
        return slot.head_only and slot.pool is None

    def reads(self, place: Place) -> bool:
        """Whether the lens brings readers of the plain trunk."""
        return self._check(place).reads_from is not None

    def lane(self, place: Place) -> Hashable:
        """The lane key: rows whose places have equal keys may share a lane."""
        return self._check(place).lane

    # --- facts -------------------------------------------------------------------------------------------------------

    @property
    def slab(self) -> Tensor:
        """[V, D]: all vectors; the address stays the same for the life of the rack."""
        return self._slab

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
        """Check that every vector belongs to exactly one lens or is free, and that vector 0 is still zero."""
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

    def _check(self, place: Place) -> Slot:
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

    def _put(self, numbers: Indices, vectors: Tensor, scalars: Tensor | None = None) -> None:
        """Write vectors [n, D]; narrower ones, and those of a head's narrower layers, are padded with zeros."""
        index = self._direct.send(numbers)
        self._slab[index] = F.pad(vectors, (0, self.dim - vectors.shape[-1])).to(self._slab)
        if scalars is not None:
            self._bias[index] = scalars.to(self._bias)

    def _hidden(self, features: Tensor, slots: Sequence[Slot], transfer: Transfer) -> Tensor:
        """Features [R, D] after the hidden layers of the heads that have any."""
        depth = 0
        while rows := [row for row, slot in enumerate(slots) if len(slot.hidden) > depth]:
            index = transfer.send(np.array(rows))
            hidden = self._dense(features[index], [slots[row].hidden[depth] for row in rows], transfer).relu()
            features = features.index_copy(0, index, F.pad(hidden, (0, self.dim - hidden.shape[1])))
            depth += 1
        return features

    def _dense(self, features: Tensor, numbers: Sequence[Indices], transfer: Transfer) -> Tensor:
        """Features [R, D], one layer per row → [R, longest], 0 where a row's layer is shorter."""
        index = transfer.send(padded(numbers))  # [R, C]
        dense = torch.baddbmm(self._bias[index].unsqueeze(-1), F.embedding(index, self._slab), features.unsqueeze(-1))
        return dense.squeeze(-1)


def demand(lens: Lens) -> int:
    """The number of vectors that a lens needs: two per prompt and layer, one per token, one per class, and those of its
    parts."""
    prompts = 2 * sum(lens.prefix_lengths) + int(lens.tokens.shape[-2])
    head = lens.classes + sum(len(layer.weight) for layer in lens.hidden)
    return prompts + head + sum(len(part.vectors) for part in lens.parts.values())


def _zeros(*shape: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """As `torch.zeros`, but host memory stays the operating system's zero pages until a lens is written there.

    `torch.zeros` writes all of it: an empty rack of 256 MiB would use 256 MiB. Free vectors are taken from one end, so
    memory that was never needed is never touched.
    """
    if torch.device(device).type != "cpu":
        return torch.zeros(*shape, device=device, dtype=dtype)
    raw = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)
