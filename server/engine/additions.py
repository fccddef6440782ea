"""Additions: what a row may bring to a block besides a prefix.

    shift    bias vectors, added where the block adds its own
    cross    prompts under a softmax of their own, behind the block's attention
    qkv      low-rank rows: x · downᵀ · up, added to queries, keys and values
    query    low-rank rows, added to the queries alone
    beside   low-rank rows with an activation that read the MLP's input
    behind   low-rank rows with an activation that read the MLP's output

Tensors have a leading batch axis [B] if rows differ; without it one lens serves all rows. On the rack every addition is
stored as D-wide vectors: `parts` splits an addition into them, `gathered` builds a batch's addition from them. Zero
vectors, the rack's padding, add nothing: a zero bias has no effect, and the output of a zero `down` row is multiplied
by a zero `up` row. Only a softmax needs a mask.

Additions in place go to sums that nothing else has read yet, so autograd does not object.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .block import FrozenBlock


@dataclass(frozen=True)
class Part:
    """Vectors [n, D] as the rack stores them, and a scalar [n] beside each vector if something reads it."""

    vectors: Tensor
    scalars: Tensor | None = None


class BatchPart(Protocol):
    """One part for each row of a batch, padded with zero vectors to the longest."""

    @property
    def vectors(self) -> Tensor:
        """[B, n, D]"""
        ...

    @property
    def scalars(self) -> Tensor:
        """[B, n]"""
        ...

    def nonempty_rows(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Vectors [b, n, D] of the rows that have any, their mask [b, n] (None if lengths are equal), and the numbers
        of these rows (None if all rows have some)."""
        ...


Parts = dict[str, Part]
PartLookup = Callable[[str], BatchPart | None]


@dataclass(frozen=True)
class Shift:
    """Bias vectors of one block. qkv: [3·D], attention: [D], hidden: [H], mlp: [D]."""

    qkv: Tensor
    attention: Tensor
    hidden: Tensor
    mlp: Tensor

    @property
    def parts(self) -> Parts:
        width = self.mlp.shape[-1]
        hidden = F.pad(self.hidden, (0, -self.hidden.shape[-1] % width))
        return {"shift": Part(torch.cat((self.qkv, self.attention, self.mlp, hidden)).view(-1, width))}

    @classmethod
    def gathered(cls, lookup: PartLookup) -> Shift | None:
        part = lookup("shift")
        if part is None:
            return None
        width, vectors = part.vectors.shape[-1], part.vectors.flatten(1)
        qkv, attention, mlp, hidden = vectors.split([3 * width, width, width, vectors.shape[1] - 5 * width], dim=1)
        return cls(qkv, attention, hidden, mlp)


@dataclass(frozen=True)
class Cross:
    """Keys and values [p, D] that only this softmax sees; `rows` [b]: the rows that have any, None if all have."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None  # [b, p], True where a prompt is real
    rows: Tensor | None = None

    @property
    def parts(self) -> Parts:
        return {"cross.keys": Part(self.keys), "cross.values": Part(self.values)}

    @classmethod
    def gathered(cls, lookup: PartLookup) -> Cross | None:
        keys, values = lookup("cross.keys"), lookup("cross.values")
        if keys is None or values is None:
            return None
        key_rows, mask, rows = keys.nonempty_rows()
        return cls(key_rows, values.nonempty_rows()[0], mask, rows)

    def add_to(self, block: FrozenBlock, x: Tensor) -> None:
        """Add the block's own attention over these prompts to x [B, N, D], for each token separately."""
        reading = x if self.rows is None else x[self.rows]
        keys, values = (part.expand(reading.shape[0], -1, -1) for part in (self.keys, self.values))
        mask = None if self.mask is None else self.mask[:, None, None]
        query = block.per_head(block.query(reading), block.q_norm)
        added = block.ls1(block.project(block.attend(query, keys, values, mask)))
        if self.rows is None:
            x += added
        else:
            x.index_add_(0, self.rows, added)


@dataclass(frozen=True)
class LowRank:
    """x [B, N, D] → act(x · downᵀ + bias) · up + offset. down: [r, D], up: [r, O], bias: [r], offset: [O]."""

    down: Tensor
    up: Tensor
    bias: Tensor | None = None
    offset: Tensor | None = None

    def inner(self, x: Tensor) -> Tensor:
        """[B, N, D] → [B, N, r]"""
        product = x @ self.down.mT
        return product if self.bias is None else product + self.bias.unsqueeze(-2)

    def outer(self, inner: Tensor) -> Tensor:
        product = inner @ self.up
        return product if self.offset is None else product + self.offset.unsqueeze(-2)

    def parts(self, name: str) -> Parts:
        none = self.down.new_zeros(len(self.down))
        parts = {
            f"{name}.down": Part(self.down, none if self.bias is None else self.bias),
            f"{name}.up": Part(self.up.reshape(-1, self.down.shape[-1])),
        }
        if self.offset is not None:
            parts[f"{name}.offset"] = Part(self.offset.view(1, -1))
        return parts

    @classmethod
    def gathered(cls, name: str, lookup: PartLookup, *, biased: bool = True) -> LowRank | None:
        down, up, offset = lookup(f"{name}.down"), lookup(f"{name}.up"), lookup(f"{name}.offset")
        if down is None or up is None:
            return None
        return cls(
            down.vectors,
            up.vectors.view(*down.vectors.shape[:2], -1),
            down.scalars if biased else None,
            None if offset is None else offset.vectors[:, 0],
        )


@dataclass(frozen=True)
class Additions:
    """Everything that rows bring to one block. See the module's docstring."""

    shift: Shift | None = None
    cross: Cross | None = None
    qkv: LowRank | None = None
    beside: LowRank | None = None
    behind: LowRank | None = None
    query: LowRank | None = None

    @property
    def parts(self) -> Parts:
        parts: Parts = {}
        for whole in (self.shift, self.cross):
            parts |= {} if whole is None else whole.parts
        for name, low in (("qkv", self.qkv), ("beside", self.beside), ("behind", self.behind), ("query", self.query)):
            parts |= {} if low is None else low.parts(name)
        return parts

    @classmethod
    def gathered(cls, lookup: PartLookup) -> Additions:
        return cls(
            Shift.gathered(lookup),
            Cross.gathered(lookup),
            LowRank.gathered("qkv", lookup, biased=False),
            LowRank.gathered("beside", lookup),
            LowRank.gathered("behind", lookup),
            LowRank.gathered("query", lookup, biased=False),
        )

    def to_qkv(self, normed: Tensor, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, keys, values with the additions. normed, keys, values: [B, N, D]; query: [B, Q, D], first Q tokens."""
        if self.shift is not None:
            to_query, to_keys, to_values = self.shift.qkv.unsqueeze(-2).chunk(3, dim=-1)
            query, keys, values = query + to_query, keys + to_keys, values + to_values
        if self.qkv is not None:
            inner = self.qkv.inner(normed)
            to_query, to_keys, to_values = self.qkv.up.chunk(3, dim=-1)
            query = query + inner[:, : query.shape[1]] @ to_query
            keys, values = keys + inner @ to_keys, values + inner @ to_values
        if self.query is not None:
            query = query + self.query.outer(self.query.inner(normed[:, : query.shape[1]]))
        return query, keys, values

    def after_attention(self, block: FrozenBlock, x: Tensor) -> None:
        """Add to the tokens x [B, N, D] in place."""
        if self.shift is not None:
            x += block.ls1(self.shift.attention.unsqueeze(-2))
        if self.cross is not None:
            self.cross.add_to(block, x)

    def to_hidden(self, hidden: Tensor) -> None:
        """Add to the activation's input [B, N, H] in place."""
        if self.shift is not None:
            hidden += self.shift.hidden[..., : hidden.shape[-1]].unsqueeze(-2)

    def after_mlp(self, block: FrozenBlock, x: Tensor, normed: Tensor, out: Tensor) -> None:
        """Add to the tokens x [B, N, D] in place. `normed` is the MLP's input, `out` its output."""
        if self.shift is not None:
            x += block.ls2(self.shift.mlp.unsqueeze(-2))
        if self.beside is not None:
            x += block.ls2(self.beside.outer(block.act(self.beside.inner(normed))))
        if self.behind is not None:
            x += block.ls2(self.behind.outer(F.gelu(self.behind.inner(out))))
