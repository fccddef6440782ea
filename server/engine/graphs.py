"""CUDA graphs: a batch of rows that bring only prefixes is one launch instead of hundreds.

    rows ─► batch bucket b, length bucket p ─► tables and pixels into the graph's buffers ─► replay ─► features [n, D]

A graph is recorded for fixed shapes and addresses, so everything that differs from batch to batch is data: the pixels,
the picture of each row, the numbers of its prompts in the rack's slab (`Prompts`), and which of these are real. Lenses
come and go without a new recording, because the slab never moves.

Padding. A batch of n rows runs in the smallest bucket b ≥ n, prompts of at most p in the smallest bucket of lengths.
- Prompts beyond a row's own are vector 0 and masked, so its softmax gives them exactly 0.
- A row beyond the last one shows picture 0 and sees no prompt: it is the plain forward of a picture, finite whatever
  the buffers held before, and no operation of the forward reads across rows. Its features are discarded.
- Pictures beyond the last one are left over from earlier batches. No real row shows them.

`rows_by_graph` decides by rule which rows a graph takes: pictures in uint8, and lenses that bring only prefixes or a
head, pooled as the backbone pools. Rows that carry tokens or additions, pool otherwise or read the trunk have different
shapes in every batch; they run through the ordinary forward, launched before the host waits for either.
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

LENGTHS: Final = (0, 16, 64, 256)  # prompts per layer
# The largest rounding difference from the ordinary forward, relative to the norm of a row's features.
BOUNDS: Final = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 0.1, "float8": 0.2}
Bucket = tuple[int, int]  # rows, prompts per layer


@dataclass(frozen=True)
class Buffers:
    """The inputs and outputs of a graph. pixels: uint8 [B, S, S, 3] · norms: mean and std, [B, 2, 3] · picture: [B],
    the picture of each row · numbers: [2, L, B, P] · seen: [L, B, P] · features: [B, D]."""

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
            torch.ones(rows, 2, 3, device=device),  # unused pictures must not be divided by zero
            torch.zeros(rows, dtype=torch.int64, device=device),
            torch.zeros(2, *table, dtype=torch.int64, device=device),
            torch.zeros(table, dtype=torch.bool, device=device),
            torch.zeros(rows, spec.dim, dtype=backbone.dtype, device=device),
        )


@dataclass(frozen=True, kw_only=True)
class BufferedCondition(Plain):
    """Prefixes by vector number from the slab (a `lens.Condition`)."""

    slab: Tensor
    numbers: Tensor
    seen: Tensor

    def prefix(self, layer: int) -> Prefix | None:
        if not self.seen.shape[-1]:
            return None
        keys, values = (self.slab[numbers[layer]] for numbers in self.numbers)
        return Prefix(keys, values, self.seen[layer])


class Graph:
    """One recorded forward, for at most `bucket` rows and prompts."""

    def __init__(self, backbone: Backbone, slab: Tensor, bucket: Bucket, recorder: Recorder) -> None:
        self.bucket, self._backbone = bucket, backbone
        self._buffers = buffers = Buffers.of(backbone, bucket)
        self._condition = BufferedCondition(slab=slab, numbers=buffers.numbers, seen=buffers.seen)
        self._replay = recorder.record(self._forward)

    def features(
        self, images: Sequence[ImageInput], rows: Sequence[ImageSeat], rack: Rack, transfer: Transfer
    ) -> Tensor:
        """Pooled features [rows, D]; each row names one of `images`."""
        buffers, pictures = self._buffers, list(dict.fromkeys(picture for picture, _ in rows))
        place = {picture: number for number, picture in enumerate(pictures)}
        picture = np.zeros(self.bucket[0], np.int64)
        picture[: len(rows)] = [place[number] for number, _ in rows]
        prompts = rack.prompts([seat.place for _, seat in rows], *self.bucket)
        transfer.fill(buffers.pixels, [images[number][0] for number in pictures])
        transfer.fill(buffers.norms, [np.array(images[number][1:], np.float32) for number in pictures])
        transfer.put(buffers.picture, picture)
        transfer.put(buffers.numbers, prompts.numbers)
        transfer.put(buffers.seen, prompts.seen)
        self._replay()
        return buffers.features[: len(rows)].clone()  # copied before the next replay, in stream order

    def _forward(self) -> None:
        buffers, backbone = self._buffers, self._backbone
        mean, std = buffers.norms.unbind(1)
        x = vit.embed(backbone, normalise(buffers.pixels, mean, std, backbone.dtype))
        buffers.features.copy_(vit.forward(backbone, x[buffers.picture], self._condition))


@dataclass
class Counts:
    """Graphs that were refused or disabled, and trunk rows by path."""

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
    drift: float = 0.0  # the largest difference from the ordinary forward that a check measured
    on_rows: Callable[[int, int], None] = lambda by_graph, beside: None

    def rows_by_graph(self, images: Sequence[ImageInput], rows: Sequence[ImageSeat]) -> list[int]:
        """Return the numbers of the rows that run by graph. Head-only rows stay with readers of the plain trunk, which
        they share."""
        if self.graphs and self.rack.slab is not self.slab:
            self.disable("the rack's memory has moved")
        longest = max((prompts for _, prompts in self.graphs), default=-1)
        readers = any(self.rack.reads(seat.place) for _, seat in rows)
        by_graph = [
            number
            for number, (picture, seat) in enumerate(rows)
            if images[picture][0].dtype == np.uint8
            and self._fits(seat.place, longest)
            and not (readers and self.rack.plain(seat.place))
        ]
        self.counts.by_graph += len(by_graph)
        self.counts.beside += len(rows) - len(by_graph)
        self.on_rows(len(by_graph), len(rows) - len(by_graph))
        return by_graph

    def features(self, images: Sequence[ImageInput], rows: Sequence[ImageSeat], transfer: Transfer) -> Tensor | None:
        """Pooled features [rows, D] of rows that `rows_by_graph` returned; None if a graph failed, which disables all
        graphs."""
        try:
            return self._features(images, rows, transfer)
        except torch.OutOfMemoryError:
            raise  # the batch is too large, the graph is fine: the caller halves the batch
        except RuntimeError as error:
            self.disable(error)
            return None

    def _features(self, images: Sequence[ImageInput], rows: Sequence[ImageSeat], transfer: Transfer) -> Tensor:
        """Replay several times if there are more rows than the largest graph takes."""
        features, start = [], 0
        while start < len(rows):
            graph = self._smallest_graph(rows[start:])
            part = rows[start : start + graph.bucket[0]]
            features.append(graph.features(images, part, self.rack, transfer))
            start += len(part)
        return torch.cat(features)

    def disable(self, why: object) -> None:
        """Send every row through the ordinary forward from now on."""
        log.error("CUDA graphs are disabled, the ordinary forward serves: %s", why)
        self.counts.refused += len(self.graphs)
        self.graphs.clear()

    def _fits(self, place: Place, longest: int) -> bool:
        return self.rack.prefix_only(place) and self.rack.longest(place) <= longest

    def _smallest_graph(self, rows: Sequence[ImageSeat]) -> Graph:
        """The smallest graph for all of the rows; if none is large enough, the graph with the most rows among those
        with enough prompts."""
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
