"""Readers: a task's own tokens, which read the trunk's keys and values at every layer and are seen by no image token.

    trunk    [CLS  | patches]    the plain frozen ViT: one pass per picture, however many readers it has
                  │ keys and values of each layer
    reader   [CLS' | prompts]    attends to the trunk's patches, to itself and to its prefix

CLS' starts as a copy of the class token and replaces it: the class token itself is hidden from the reader, so a reader
that brings nothing else equals the class token. Where a backbone pools by averaging, CLS' starts as the mean of the
patches, and the reader sees all image tokens. (Read-only prompts: Lee et al., ICCV 2023, for vision-language models.)

Everything else that rows bring (prefixes, carried tokens, additions) works for readers as for other rows, on their own
tokens alone. No gradient flows into the trunk, and it is the same in each epoch, so its keys and values can be cached
(`Recorded`).
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
    """The keys and values of n pictures that readers read."""

    def entering(self) -> Tensor:
        """The initial state of CLS' [n, D], in the layer where the readers start."""
        ...

    def keys_values(self, layer: int) -> Pair:
        """Each [n, N, D], heads side by side."""
        ...


def stand_in(spec: Spec, x: Tensor) -> Tensor:
    """The initial state of CLS' [n, D], computed from the image tokens x [n, N, D] that enter a layer."""
    return x[:, 0] if spec.pool == "cls" else x[:, spec.prefix_tokens : spec.tokens].mean(dim=1)


def hidden_tokens(spec: Spec) -> int:
    """How many of the first image tokens are hidden from readers: the class token, where CLS' replaces it."""
    return 1 if spec.pool == "cls" else 0


@dataclass
class LiveTrunk:
    """A trunk that runs in the same forward: after each layer the forward stores the layer's keys and values here."""

    hidden: int  # first tokens that readers do not see
    first: Tensor | None = None
    pair: Pair | None = None

    def entering(self) -> Tensor:
        assert self.first is not None, "the trunk has not reached the layer where readers start"
        return self.first

    def put(self, keys: Tensor, values: Tensor) -> None:
        self.pair = keys[:, self.hidden :], values[:, self.hidden :]

    def keys_values(self, layer: int) -> Pair:
        assert self.pair is not None, "the trunk's lane must come before its readers'"
        return self.pair


@dataclass(frozen=True)
class Recorded:
    """A trunk that ran before. first: [n, D] · keys[l], values[l]: [n, N, D] of layer `start` + l · index: the pictures
    that are selected of the n; None for all."""

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
        return self._selected(self.first)

    def keys_values(self, layer: int) -> Pair:
        return self._selected(self.keys[layer - self.start]), self._selected(self.values[layer - self.start])

    def _selected(self, x: Tensor) -> Tensor:
        return x if self.index is None else x.index_select(0, self.index)  # several times as fast as x[index] on a CPU


@dataclass(frozen=True)
class Joined:
    """Two trunks as one: row i of the result is row order[i] of the first trunk's rows followed by the second's."""

    parts: tuple[Trunk, Trunk]
    order: Tensor

    def entering(self) -> Tensor:
        return torch.cat([part.entering() for part in self.parts])[self.order]

    def keys_values(self, layer: int) -> Pair:
        keys, values = zip(*(part.keys_values(layer) for part in self.parts), strict=True)
        return torch.cat(keys)[self.order], torch.cat(values)[self.order]


@dataclass(frozen=True)
class Reads:
    """Readers [R, ·] and the pictures of a trunk that they read. `pieces` is None if reader i reads picture i."""

    trunk: Trunk
    pieces: Pieces | None = None

    def start(self, tokens: Tensor | None) -> Tensor:
        """The readers' first tokens [R, 1 + T, D]: CLS' and their carried tokens [R, T, D]."""
        first = self.trunk.entering()
        first = (first if self.pieces is None else first[self.pieces.picture])[:, None]
        return first if tokens is None else torch.cat((first, tokens.to(first.dtype)), dim=1)

    def attend(self, block: FrozenBlock, layer: int, query: Tensor, reader_pair: Pair, mask: Tensor | None) -> Tensor:
        """Queries [R, Q, D] over the readers' own keys and values [R, M, D] and those of their pictures: [R, Q, D].
        mask: [R, 1, 1, M], True where one of the readers' own keys is visible.

        One softmax covers both, but the pictures' keys are never copied per reader: the queries of all readers of a
        picture are multiplied with them in one product.
        """
        keys, values = (_heads(block, part) for part in reader_pair)  # [R, H, M, d]
        trunk_keys, trunk_values = (_heads(block, part) for part in self._pair(layer))  # [G, H, N, d]
        query = _heads(block, query) * (query.shape[-1] // block.heads) ** -0.5  # [R, H, Q, d]
        among = query @ keys.mT  # [R, H, Q, M]
        if mask is not None:
            among = among.masked_fill(~mask, -torch.inf)
        over = (trunk_keys @ self._by_piece(query).mT).mT  # [G, H, C·Q, N]; in this order the keys need not be copied
        scores = torch.cat((self._by_piece(among), over), dim=-1)
        among, read = block.softmax(scores).split([keys.shape[2], trunk_keys.shape[2]], dim=-1)  # [G, H, C·Q, ·]
        mixed = self._by_reader(among, query.shape[2]) @ values + self._by_reader(read @ trunk_values, query.shape[2])
        return mixed.transpose(1, 2).flatten(2)

    def _pair(self, layer: int) -> Pair:
        keys, values = self.trunk.keys_values(layer)
        if self.pieces is None:
            return keys, values
        return self.pieces.of_pictures(keys), self.pieces.of_pictures(values)

    def _by_piece(self, x: Tensor) -> Tensor:
        """[R, H, Q, ·] → [G, H, C·Q, ·]"""
        return x if self.pieces is None else x[self.pieces.readers].transpose(1, 2).flatten(2, 3)

    def _by_reader(self, x: Tensor, queries: int) -> Tensor:
        """[G, H, C·Q, ·] → [R, H, Q, ·]"""
        if self.pieces is None:
            return x
        return x.unflatten(2, (-1, queries)).transpose(1, 2).flatten(0, 1)[self.pieces.place]


@dataclass(frozen=True)
class Pieces:
    """Readers grouped by picture and cut into G pieces of at most C, the mean number of readers per picture. A piece
    belongs to one picture, and padding stays below the number of readers and pictures together.

    picture [R]: the picture of each reader · readers [G, C], padded with repeated readers · pictures [G], None if these
    are all in order · place [R]: position of each reader in the pieces.
    """

    picture: Tensor
    readers: Tensor
    pictures: Tensor | None
    place: Tensor

    @classmethod
    def of(cls, picture: NDArray[np.int64], pictures: int, transfer: Transfer) -> Pieces:
        """picture [R]: which of the trunk's `pictures` pictures each reader reads."""
        order = np.argsort(picture, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(picture[order])) + 1)
        most = -(-len(picture) // len(groups))
        pieces = [group[start : start + most] for group in groups for start in range(0, len(group), most)]
        readers = np.stack([np.pad(piece, (0, most - len(piece)), mode="edge") for piece in pieces])
        place = np.empty(len(picture), np.int64)
        for number, piece in enumerate(pieces):
            place[piece] = number * most + np.arange(len(piece))
        first_pictures = picture[readers[:, 0]]
        in_order = len(first_pictures) == pictures and (first_pictures == np.arange(pictures)).all()
        pictures_read = None if in_order else transfer.send(first_pictures)
        return cls(transfer.send(picture), transfer.send(readers), pictures_read, transfer.send(place))

    def of_pictures(self, x: Tensor) -> Tensor:
        """[n, ·] → [G, ·]"""
        return x if self.pictures is None else x[self.pictures]


def _heads(block: FrozenBlock, x: Tensor) -> Tensor:
    return x.unflatten(-1, (block.heads, -1)).transpose(1, 2)  # [B, N, D] → [B, H, N, d]
