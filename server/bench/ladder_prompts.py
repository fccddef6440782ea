"""Alternatives to how the engine brings a batch's prompts to attention, for `bench ladder`. The engine gathers them
from the rack's slab by number, padded to the longest and masked where rows differ.

    per lens      each lens in tensors of its own, stacked for every batch: no slab
    in lanes      rows of one length in a lane of their own: no padding, no mask
    unpadded      all rows in one lane, each row's attention over exactly its own keys: no padding, no mask either
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from server.engine import vit
from server.engine.additions import Additions
from server.engine.block import FrozenBlock
from server.engine.engine import Engine
from server.engine.gathered import Indices, Slot
from server.engine.lens import Condition, Lens, Prefix
from server.engine.rack import Place, Rack
from server.engine.spec import Pool
from server.engine.transfer import DirectTransfer, Transfer

from .ladder_bench import Answer, Bench, under

# Queries [ΣQ, H, d], keys and values [ΣN, H, d], rows end to end; where each row of queries and of keys starts and the
# last one ends, int32 [B + 1]; the most queries and the most keys of a row → [ΣQ, H, d]
Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]
Attention = Callable[[FrozenBlock, vit.Lane, Additions | None, Sequence[Tensor], int], Tensor]  # `vit._attention`


class PrefixAlone:
    """A `lens.Condition` of rows that bring prompts as keys and values and nothing else."""

    tokens: Tensor | None = None
    token_mask: Tensor | None = None
    entry: Tensor | None = None
    reads_from: int | None = None
    enters: int = 0
    pool: Pool | None = None

    def prefix(self, layer: int) -> Prefix | None:
        return None

    def additions(self, layer: int) -> Additions | None:
        return None


# --- no slab ----------------------------------------------------------------------------------------------------------


def tensors_per_lens(bench: Bench) -> Answer:
    """Prompts and heads stacked, batch by batch, from each task's own tensors."""
    backbone = bench.packed
    lenses = bench.lenses(backbone, bench.even)
    rack, seats = bench.seat_lenses(backbone, lenses)
    kept = TensorsPerLens({seat.slot: lens for seat, lens in zip(seats, lenses, strict=True)})
    answer = bench.answer_rows(Engine(backbone, rack), seats, range(bench.tasks))
    return under(lambda: mock.patch.multiple(rack, gather=kept.gather, logits=kept.logits), answer)


class TensorsPerLens:
    """Lenses by slot, each as its method made it. They must have equal shapes to be stacked."""

    def __init__(self, lenses: dict[int, Lens]) -> None:
        self._lenses = lenses

    def gather(self, places: Sequence[Place], transfer: Transfer | None = None) -> Condition:
        return Stacked([self._lenses[place.slot] for place in places])

    def logits(self, features: Tensor, places: Sequence[Place], transfer: Transfer | None = None) -> Tensor:
        lenses = [self._lenses[place.slot] for place in places]
        weight, bias = (torch.stack([getattr(lens, name) for lens in lenses]) for name in ("head_weight", "head_bias"))
        return torch.baddbmm(bias.unsqueeze(-1), weight, features.unsqueeze(-1)).squeeze(-1)


class Stacked(PrefixAlone):
    def __init__(self, lenses: Sequence[Lens]) -> None:
        self._lenses = lenses

    def prefix(self, layer: int) -> Prefix | None:
        keys, values = (torch.stack([layers[layer] for layers in self._parts(name)]) for name in ("keys", "values"))
        return Prefix(keys, values, None)

    def _parts(self, name: str) -> list[tuple[Tensor, ...]]:
        return [getattr(lens, name) for lens in self._lenses]


# --- a lane for each length -------------------------------------------------------------------------------------------


def in_lanes(bench: Bench) -> Answer:
    """A lane for each length: attention in smaller pieces."""
    original = Rack.lane
    with_length = mock.patch.object(
        Rack, "lane", lambda rack, place: (original(rack, place), tuple(rack._check(place).lengths))
    )
    return under(lambda: with_length, bench.served(bench.packed, bench.ragged))


# --- nothing padded ---------------------------------------------------------------------------------------------------


def unpadded(bench: Bench) -> Answer:
    """Row by row, each as the block attends to a single row: on a CPU its heads run one by one in any case."""
    return under(lambda: attending_unpadded(row_by_row), bench.served(bench.packed, bench.ragged))


def row_by_row(
    block: FrozenBlock, lane: vit.Lane, additions: Additions | None, parts: Sequence[Tensor], index: int
) -> Tensor:
    """As `vit._attention`, for rows whose condition is `Unpadded`."""
    query, keys, values = _per_head(block, parts)
    rows = zip(query, keys, values, *_unpadded(lane).rows(index), strict=True)
    mixed = [
        block.attend(q[None], torch.cat((own_k, k))[None], torch.cat((own_v, v))[None], None)
        for q, k, v, own_k, own_v in rows
    ]
    return torch.cat(mixed)


def end_to_end(varlen: Varlen) -> Attention:
    """All rows in one call of an attention that takes rows of any length, concatenated."""

    def attend(
        block: FrozenBlock, lane: vit.Lane, additions: Additions | None, parts: Sequence[Tensor], index: int
    ) -> Tensor:
        query, keys, values = _per_head(block, parts)
        (rows, queries, _), tokens, prefixes = query.shape, keys.shape[1], _unpadded(lane)
        starts = torch.arange(0, (rows + 1) * queries, queries, dtype=torch.int32, device=query.device)
        flat = query.reshape(rows * queries, -1), *prefixes.before(index, keys, values)
        q, k, v = (part.unflatten(-1, (block.heads, -1)) for part in flat)
        mixed = varlen(q, k, v, starts, prefixes.starts(index, tokens), queries, tokens + prefixes.longest(index))
        return mixed.reshape(query.shape)

    return attend


class Unpadded(PrefixAlone):
    """Prefixes of a batch's rows, concatenated: only vectors that exist, and the number that each row has."""

    def __init__(self, slab: Tensor, slots: Sequence[Slot], transfer: Transfer) -> None:
        self._slab = slab
        self._lengths = np.stack([slot.lengths for slot in slots], axis=1)  # [L, B]
        numbers = np.stack([_end_to_end(slots, "keys"), _end_to_end(slots, "values")])
        self._numbers = transfer.send(numbers).split(self._lengths.sum(axis=1).tolist(), dim=1)  # of each layer [2, Σp]
        ends = self._lengths.cumsum(axis=1)
        self._starts = transfer.send(np.pad(ends, ((0, 0), (1, 0))).astype(np.int32))  # [L, B + 1]

    def rows(self, layer: int) -> list[tuple[Tensor, ...]]:
        """Keys and values, [p, D] for each row."""
        lengths = self._lengths[layer].tolist()
        return [self._slab[numbers].split(lengths) for numbers in self._numbers[layer]]

    def before(self, layer: int, *tokens: Tensor) -> list[Tensor]:
        """Keys and values of the image tokens [B, N, D], each preceded by the row's own prompts → [Σ(p + N), D]."""
        pairs = zip(self.rows(layer), tokens, strict=True)
        return [
            torch.cat([part for row in zip(prompts, image, strict=True) for part in row]) for prompts, image in pairs
        ]

    def starts(self, layer: int, tokens: int) -> Tensor:
        """The start of each row of `before`, and the end of the last one: int32 [B + 1]."""
        starts = self._starts[layer]
        return starts + torch.arange(len(starts), dtype=torch.int32, device=starts.device) * tokens

    def longest(self, layer: int) -> int:
        return int(self._lengths[layer].max())


@contextmanager
def attending_unpadded(attention: Attention) -> Iterator[None]:
    def gather(rack: Rack, places: Sequence[Place], transfer: Transfer | None = None) -> Condition:
        slots = [rack._check(place) for place in places]
        return Unpadded(rack.slab, slots, transfer or DirectTransfer(rack.slab.device))

    with mock.patch.object(Rack, "gather", gather), mock.patch.object(vit, "_attention", attention):
        yield


def _end_to_end(slots: Sequence[Slot], name: str) -> Indices:
    """Numbers of the prompts' keys or values: of the first layer row by row, then of the next."""
    layers = range(len(slots[0].lengths))
    return np.concatenate([getattr(slot, name)[layer, : slot.lengths[layer]] for layer in layers for slot in slots])


def _unpadded(lane: vit.Lane) -> Unpadded:
    if not isinstance(lane.condition, Unpadded):
        raise TypeError(f"expected the condition Unpadded, got {type(lane.condition).__name__}")
    return lane.condition


def _per_head(block: FrozenBlock, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values after the query and key norms that some backbones have. parts: as in
    `vit._attention`."""
    _, query, keys, values = parts
    return block.per_head(query, block.q_norm), block.per_head(keys, block.k_norm), values
