"""Readers: a task's own tokens, which read the trunk's keys and values at every layer and are seen by no image token.

    trunk    [CLS  | patches]    the plain frozen ViT: one pass a picture, whoever reads it
                  │ keys and values of each layer
    reader   [CLS' | prompts]    attends to the trunk's patches, to itself and to its prefix

CLS' starts as a copy of the class token and stands in its place: the class token itself is hidden from it, so that a
reader that brings nothing is the class token. Where a backbone pools by averaging, CLS' starts as the mean of the
patches, and all image tokens are read. (Read-only prompts: Lee et al., ICCV 2023, for vision-language models.)

All else that rows bring works for readers as for anybody: prefixes, carried tokens, additions, on their tokens alone.
No gradient flows into the trunk, and it is the same in each epoch: what is read can be kept (`Recorded`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .block import FrozenBlock, Pair
from .spec import Spec
from .transfer import Transfer


class Trunk(Protocol):
    """What readers read of n pictures."""

    def entering(self) -> Tensor:
        """[n, D]: what CLS' starts as, in the layer that the readers start at."""
        ...

    def keys_values(self, layer: int) -> Pair:
        """Each [n, N, D], heads side by side."""
        ...


def stand_in(spec: Spec, x: Tensor) -> Tensor:
    """What CLS' starts as, of the image tokens x [n, N, D] that enter a layer: [n, D]."""
    return x[:, 0] if spec.pool == "cls" else x[:, spec.prefix_tokens : spec.tokens].mean(dim=1)


def hidden_tokens(spec: Spec) -> int:
    """How many of the first image tokens readers do not see: the class token, where CLS' stands for it."""
    return 1 if spec.pool == "cls" else 0


@dataclass
class Passing:
    """A trunk under way in the same forward, layer by layer: the forward leaves here what a layer gives."""

    hidden: int  # tokens that are not read
    first: Tensor | None = None
    pair: Pair | None = None

    def entering(self) -> Tensor:
        assert self.first is not None, "the trunk has not come to the layer that readers start at"
        return self.first

    def put(self, keys: Tensor, values: Tensor) -> None:
        self.pair = keys[:, self.hidden :], values[:, self.hidden :]

    def keys_values(self, layer: int) -> Pair:
        assert self.pair is not None, "the trunk's lane comes before its readers'"
        return self.pair


@dataclass(frozen=True)
class Recorded:
    """A trunk that has been run. first: [n, D] · keys[l], values[l]: [n, N, D] of layer `start` + l · index: which of
    the n are meant, all where it is None."""

    start: int
    first: Tensor
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    index: Tensor | None = None

    def __len__(self) -> int:
        return len(self.first)

    def take(self, index: Tensor) -> Recorded:
        return replace(self, index=index.to(self.first.device))

    def entering(self) -> Tensor:
        return self._meant(self.first)

    def keys_values(self, layer: int) -> Pair:
        return self._meant(self.keys[layer - self.start]), self._meant(self.values[layer - self.start])

    def _meant(self, x: Tensor) -> Tensor:
        return x if self.index is None else x.index_select(0, self.index)  # several times as fast as x[index] on a CPU


@dataclass(frozen=True)
class Joined:
    """Two trunks as one: row i is row order[i] of the first's rows with the second's behind them."""

    parts: tuple[Trunk, Trunk]
    order: Tensor

    def entering(self) -> Tensor:
        return torch.cat([part.entering() for part in self.parts])[self.order]

    def keys_values(self, layer: int) -> Pair:
        keys, values = zip(*(part.keys_values(layer) for part in self.parts), strict=True)
        return torch.cat(keys)[self.order], torch.cat(values)[self.order]


@dataclass(frozen=True)
class Reads:
    """Readers [R, ·] and the pictures of a trunk that they read. `pieces` is None where reader i reads picture i."""

    trunk: Trunk
    pieces: Pieces | None = None

    def start(self, tokens: Tensor | None) -> Tensor:
        """The readers' tokens [R, 1 + T, D]: CLS' and what they carry, [R, T, D]."""
        first = self.trunk.entering()
        first = (first if self.pieces is None else first[self.pieces.picture])[:, None]
        return first if tokens is None else torch.cat((first, tokens.to(first.dtype)), dim=1)

    def attend(self, block: FrozenBlock, layer: int, query: Tensor, own: Pair, mask: Tensor | None) -> Tensor:
        """Queries [R, Q, D] over the readers' own keys and values [R, M, D] and those of their pictures: [R, Q, D].
        mask: [R, 1, 1, M], True where an own key may be seen.

        One softmax over both, but the pictures' keys are never laid out reader by reader: the queries of all readers
        of a picture are multiplied with them at once.
        """
        keys, values = (_heads(block, part) for part in own)  # [R, H, M, d]
        trunk_keys, trunk_values = (_heads(block, part) for part in self._pair(layer))  # [G, H, N, d]
        query = _heads(block, query) * (query.shape[-1] // block.heads) ** -0.5  # [R, H, Q, d]
        among = query @ keys.mT  # [R, H, Q, M]
        if mask is not None:
            among = among.masked_fill(~mask, -torch.inf)
        over = (trunk_keys @ self._together(query).mT).mT  # [G, H, C·Q, N]; in this order the keys need not be copied
        scores = torch.cat((self._together(among), over), dim=-1)
        among, read = block.softmax(scores).split([keys.shape[2], trunk_keys.shape[2]], dim=-1)  # [G, H, C·Q, ·]
        mixed = self._apart(among, query.shape[2]) @ values + self._apart(read @ trunk_values, query.shape[2])
        return mixed.transpose(1, 2).flatten(2)

    def _pair(self, layer: int) -> Pair:
        keys, values = self.trunk.keys_values(layer)
        if self.pieces is None:
            return keys, values
        return self.pieces.of_pictures(keys), self.pieces.of_pictures(values)

    def _together(self, x: Tensor) -> Tensor:
        """[R, H, Q, ·] → [G, H, C·Q, ·]"""
        return x if self.pieces is None else x[self.pieces.readers].transpose(1, 2).flatten(2, 3)

    def _apart(self, x: Tensor, queries: int) -> Tensor:
        """[G, H, C·Q, ·] → [R, H, Q, ·]"""
        if self.pieces is None:
            return x
        return x.unflatten(2, (-1, queries)).transpose(1, 2).flatten(0, 1)[self.pieces.place]


@dataclass(frozen=True)
class Pieces:
    """Readers by picture, cut into G pieces of at most C, the mean number of a picture's readers: no piece is shared by
    two pictures, and what is filled up is less than the readers and pictures together.

    picture [R] of each reader · readers [G, C], filled up with any · pictures [G], None where these are all in order ·
    place [R] of each reader in the pieces.
    """

    picture: Tensor
    readers: Tensor
    pictures: Tensor | None
    place: Tensor

    @classmethod
    def of(cls, picture: NDArray[np.int64], pictures: int, crossing: Transfer) -> Pieces:
        """picture [R]: which of the trunk's `pictures` each reader reads."""
        order = np.argsort(picture, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(picture[order])) + 1)
        most = -(-len(picture) // len(groups))
        pieces = [group[start : start + most] for group in groups for start in range(0, len(group), most)]
        readers = np.stack([np.pad(piece, (0, most - len(piece)), mode="edge") for piece in pieces])
        place = np.empty(len(picture), np.int64)
        for number, piece in enumerate(pieces):
            place[piece] = number * most + np.arange(len(piece))
        own = picture[readers[:, 0]]
        in_order = len(own) == pictures and (own == np.arange(pictures)).all()
        pictures_read = None if in_order else crossing.send(own)
        return cls(crossing.send(picture), crossing.send(readers), pictures_read, crossing.send(place))

    def of_pictures(self, x: Tensor) -> Tensor:
        """[n, ·] → [G, ·]"""
        return x if self.pictures is None else x[self.pictures]


def _heads(block: FrozenBlock, x: Tensor) -> Tensor:
    return x.unflatten(-1, (block.heads, -1)).transpose(1, 2)  # [B, N, D] → [B, H, N, d]
