"""The forward recorded: a batch of rows that bring prefixes alone is one launch instead of hundreds.

    rows ─► batch bucket b, length bucket p ─► tables and pixels into the graph's buffers ─► replay ─► features [n, D]

A graph is recorded for shapes and addresses, so whatever differs from batch to batch is data: the pixels, which picture
a row shows, the numbers of its prompts in the rack's slab (`Prompts`), and which of these are real. Lenses come and go
without a new recording, because the slab never moves.

Padding. A batch of n rows runs in the smallest bucket b ≥ n, prompts of at most p in the smallest bucket of lengths.
- Prompts behind a row's own are vector 0 and masked, so its softmax gives them exactly 0.
- A row behind the last one shows picture 0 and sees no prompt: it is the plain forward of a picture, finite whatever
  the buffers held before, and no operation of the forward reads across rows. Its features are not looked at.
- Pictures behind the last one are whatever was shown before. No real row shows them.

What a graph takes is decided by rule (`takes`): pictures in uint8, and lenses that bring prefixes or a head alone,
pooled as the backbone pools. Rows that carry tokens or additions, pool otherwise or read the trunk have shapes of their
own in every batch; they go the ordinary way beside the graph's, launched before anybody waits for either.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Final

import numpy as np
import torch
from torch import Tensor

from . import vit
from .backbone import Backbone
from .batch import ImageInput, ImageSeat, normalise
from .lens import Plain, Prefix
from .rack import Place, Rack
from .recorder import Recorder
from .transfer import Transfer

log = logging.getLogger(__name__)

LENGTHS: Final = (0, 16, 64, 256)  # prompts of a layer
# How far rounding may bring a row's features from the ordinary forward's, as a share of their size.
BOUNDS: Final = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 0.1, "float8": 0.2}
Bucket = tuple[int, int]  # rows, prompts of a layer


@dataclass(frozen=True)
class Buffers:
    """What a graph reads and writes. pixels: uint8 [B, S, S, 3] · norms: mean and std, [B, 2, 3] · picture: [B], which
    one a row shows · numbers: [2, L, B, P] · seen: [L, B, P] · features: [B, D]."""

    pixels: Tensor
    norms: Tensor
    picture: Tensor
    numbers: Tensor
    seen: Tensor
    features: Tensor

    @classmethod
    def of(cls, backbone: Backbone, bucket: Bucket) -> Buffers:
        (rows, prompts), spec, device = bucket, backbone.spec, backbone.device
        size, table = spec.image_size, (spec.depth, rows, prompts)
        return cls(
            torch.zeros(rows, size, size, 3, dtype=torch.uint8, device=device),
            torch.ones(rows, 2, 3, device=device),  # no picture, not even one that nobody shows, is divided by zero
            torch.zeros(rows, dtype=torch.int64, device=device),
            torch.zeros(2, *table, dtype=torch.int64, device=device),
            torch.zeros(table, dtype=torch.bool, device=device),
            torch.zeros(rows, spec.dim, dtype=backbone.dtype, device=device),
        )


@dataclass(frozen=True, kw_only=True)
class Fixed(Plain):
    """Prefixes by number out of the slab (a `lens.Condition`)."""

    slab: Tensor
    numbers: Tensor
    seen: Tensor

    def prefix(self, layer: int) -> Prefix | None:
        if not self.seen.shape[-1]:
            return None
        keys, values = (self.slab[own[layer]] for own in self.numbers)
        return Prefix(keys, values, self.seen[layer])


class Graph:
    """One recorded forward, for at most `bucket` rows and prompts."""

    def __init__(self, backbone: Backbone, slab: Tensor, bucket: Bucket, recorder: Recorder) -> None:
        self.bucket, self._backbone = bucket, backbone
        self._buffers = own = Buffers.of(backbone, bucket)
        self._condition = Fixed(slab=slab, numbers=own.numbers, seen=own.seen)
        self._replay = recorder.record(self._forward)

    def features(
        self, shown: Sequence[ImageInput], rows: Sequence[ImageSeat], rack: Rack, crossing: Transfer
    ) -> Tensor:
        """Pooled features [rows, D] of rows that show some of the pictures `shown`."""
        own, pictures = self._buffers, list(dict.fromkeys(picture for picture, _ in rows))
        place = {picture: number for number, picture in enumerate(pictures)}
        picture = np.zeros(self.bucket[0], np.int64)
        picture[: len(rows)] = [place[number] for number, _ in rows]
        prompts = rack.prompts([seat.place for _, seat in rows], *self.bucket)
        crossing.fill(own.pixels, [shown[number][0] for number in pictures])
        crossing.fill(own.norms, [np.array(shown[number][1:], np.float32) for number in pictures])
        crossing.put(own.picture, picture)
        crossing.put(own.numbers, prompts.numbers)
        crossing.put(own.seen, prompts.seen)
        self._replay()
        return own.features[: len(rows)].clone()  # before the next replay, in the order of the stream

    def _forward(self) -> None:
        own, backbone = self._buffers, self._backbone
        mean, std = own.norms.unbind(1)
        x = vit.embed(backbone, normalise(own.pixels, mean, std, backbone.dtype))
        own.features.copy_(vit.forward(backbone, x[own.picture], self._condition))


@dataclass
class Counts:
    """Graphs refused or given up, and trunk rows by the way they went."""

    refused: int = 0
    by_graph: int = 0
    beside: int = 0


@dataclass
class Graphs:
    """The graphs of one engine, of one backbone over one rack."""

    rack: Rack
    slab: Tensor
    graphs: dict[Bucket, Graph] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)
    drift: float = 0.0  # the largest that a graph showed when it was checked
    on_rows: Callable[[int, int], None] = lambda by_graph, beside: None

    def takes(self, shown: Sequence[ImageInput], rows: Sequence[ImageSeat]) -> list[int]:
        """Which of the rows go by graph. Head-only rows stay with readers of the plain trunk, which they share."""
        if self.graphs and self.rack.slab is not self.slab:
            self.give_up("the rack's memory is another than it was")
        longest = max((prompts for _, prompts in self.graphs), default=-1)
        readers = any(self.rack.reads(seat.place) for _, seat in rows)
        taken = [
            number
            for number, (picture, seat) in enumerate(rows)
            if shown[picture][0].dtype == np.uint8
            and self._fits(seat.place, longest)
            and not (readers and self.rack.plain(seat.place))
        ]
        self.counts.by_graph += len(taken)
        self.counts.beside += len(rows) - len(taken)
        self.on_rows(len(taken), len(rows) - len(taken))
        return taken

    def features(self, shown: Sequence[ImageInput], rows: Sequence[ImageSeat], crossing: Transfer) -> Tensor | None:
        """Pooled features [rows, D] of rows that `takes` named; None where a graph failed, and all are given up."""
        try:
            return self._features(shown, rows, crossing)
        except torch.OutOfMemoryError:
            raise  # of the batch, not of the graph: the batch is halved
        except RuntimeError as error:
            self.give_up(error)
            return None

    def _features(self, shown: Sequence[ImageInput], rows: Sequence[ImageSeat], crossing: Transfer) -> Tensor:
        """More rows than the largest graph takes go in turns."""
        found, start = [], 0
        while start < len(rows):
            graph = self._for(rows[start:])
            part = rows[start : start + graph.bucket[0]]
            found.append(graph.features(shown, part, self.rack, crossing))
            start += len(part)
        return torch.cat(found)

    def give_up(self, why: object) -> None:
        """Every row goes the ordinary way from now on."""
        log.error("CUDA graphs are given up, the ordinary forward serves: %s", why)
        self.counts.refused += len(self.graphs)
        self.graphs.clear()

    def _fits(self, place: Place, longest: int) -> bool:
        return self.rack.prefix_only(place) and self.rack.longest(place) <= longest

    def _for(self, rows: Sequence[ImageSeat]) -> Graph:
        """The smallest graph for all of the rows; else that with the most rows that has room for their prompts."""
        prompts = max(self.rack.longest(seat.place) for _, seat in rows)
        long_enough = sorted(bucket for bucket in self.graphs if bucket[1] >= prompts)
        large_enough = (bucket for bucket in long_enough if bucket[0] >= len(rows))
        most = long_enough[-1][0]
        fallback = next(bucket for bucket in long_enough if bucket[0] == most)
        return self.graphs[next(large_enough, fallback)]


# --- at start ---------------------------------------------------------------------------------------------------------


def buckets(most: int, lengths: Iterable[int] = LENGTHS) -> list[Bucket]:
    """Powers of two up to `most` rows and `most` itself, for each length; the largest first."""
    rows = {2**power for power in range(most.bit_length()) if 2**power <= most} | {most}
    return sorted(product(rows, lengths), reverse=True)
