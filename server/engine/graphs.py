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
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Final

import numpy as np
import torch
from torch import Tensor

from . import vit
from .backbone import Backbone, Spec
from .crossing import Crossing
from .engine import Engine, Row, Shown, Work, normalise
from .images import Geometry
from .lens import Lens, Plain, Prefix
from .rack import Place, Rack
from .recorder import Recorder
from .residency import Seat

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

    def features(self, shown: Sequence[Shown], rows: Sequence[Row], rack: Rack, crossing: Crossing) -> Tensor:
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

    def takes(self, shown: Sequence[Shown], rows: Sequence[Row]) -> list[int]:
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

    def features(self, shown: Sequence[Shown], rows: Sequence[Row], crossing: Crossing) -> Tensor | None:
        """Pooled features [rows, D] of rows that `takes` named; None where a graph failed, and all are given up."""
        try:
            return self._features(shown, rows, crossing)
        except torch.OutOfMemoryError:
            raise  # of the batch, not of the graph: the batch is halved
        except RuntimeError as error:
            self.give_up(error)
            return None

    def _features(self, shown: Sequence[Shown], rows: Sequence[Row], crossing: Crossing) -> Tensor:
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

    def _for(self, rows: Sequence[Row]) -> Graph:
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


@torch.inference_mode()
def recorded(backbone: Backbone, rack: Rack, recorder: Callable[[], Recorder], wanted: Sequence[Bucket]) -> Graphs:
    """A graph for each bucket that can be recorded and answers as the ordinary forward does.

    What cannot be recorded, or answers otherwise, is logged and counted, and its rows go the ordinary way. The rack is
    to have room for two lenses of the longest prompts; buckets of longer ones than it can hold are left out.
    """
    graphs = Graphs(rack, rack.slab)
    try:
        using = recorder()
    except RuntimeError as error:
        graphs.counts.refused = len(wanted)
        log.warning("no CUDA graphs are recorded: %s", error)
        return graphs
    for bucket in wanted:
        _add(graphs, backbone, bucket, using)
    log.info("%d CUDA graphs serve, %d were refused", len(graphs.graphs), graphs.counts.refused)
    return graphs


def _add(graphs: Graphs, backbone: Backbone, bucket: Bucket, recorder: Recorder) -> None:
    rows, prompts = bucket
    try:
        with _Made(backbone, graphs.rack, bucket) as made:
            if not made.seats:
                log.info("no CUDA graph for %d prompts: the rack holds no lens of so many", prompts)
                return
            graph = Graph(backbone, graphs.slab, bucket, recorder)
            drift = made.drift(graph)
    except RuntimeError as error:
        graphs.counts.refused += 1
        log.warning("no CUDA graph of %d rows and %d prompts: %s", rows, prompts, str(error).splitlines()[0])
        return
    graphs.drift = max(graphs.drift, drift)
    if drift <= BOUNDS[backbone.precision]:
        graphs.graphs[bucket] = graph
    else:
        graphs.counts.refused += 1
        log.error("the CUDA graph of %d rows and %d prompts answers otherwise: %.1e off", rows, prompts, drift)


class _Made:
    """Made lenses on the rack and made pictures: rows that fill a bucket, with prompts of three lengths."""

    def __init__(self, backbone: Backbone, rack: Rack, bucket: Bucket) -> None:
        self._backbone, self._rack, self._bucket = backbone, rack, bucket
        self.seats: list[Seat] = []

    def __enter__(self) -> _Made:
        longest = self._bucket[1]
        for length in sorted({longest, longest // 3, 0}, reverse=True):
            lens = _lens(self._backbone, length)
            if self._rack.can_allocate(lens):
                self.seats.append(_seated(self._backbone.spec, self._rack, lens))
            elif length == longest:
                break
        return self

    def __exit__(self, *_: object) -> None:
        for seat in self.seats:
            self._rack.free(seat.place)

    def drift(self, graph: Graph) -> float:
        """From the ordinary forward, in a full batch and in one with padding: of the row that is furthest off, the
        difference's length as a share of the features'. Infinite where a feature is not a number."""
        alone = Graphs(self._rack, self._rack.slab, {graph.bucket: graph})
        plain, by_graph = Engine(self._backbone, self._rack), Engine(self._backbone, self._rack, alone)
        pairs = [(plain.run(work), by_graph.run(work)) for work in self._batches()]
        return max(_apart(one, other) for pair in pairs for one, other in zip(*pair, strict=True))

    def _batches(self) -> Iterator[list[Work]]:
        most, size = self._bucket[0], self._backbone.spec.image_size
        drawn = np.random.default_rng(0)
        pictures = [drawn.integers(0, 256, (size, size, 3), np.uint8) for _ in range(most)]
        for rows in sorted({most, most // 2 + 1}, reverse=True):
            yield [(pictures[row], self.seats[(row + rows) % len(self.seats)]) for row in range(rows)]


def _apart(wanted: np.ndarray, got: np.ndarray) -> float:
    apart = float(np.linalg.norm(got - wanted)) / max(float(np.linalg.norm(wanted)), 1e-12)
    return apart if math.isfinite(apart) else float("inf")


def _lens(backbone: Backbone, length: int) -> Lens:
    """Prompts that no row can overlook, and the features themselves as logits."""
    dim, generator = backbone.spec.dim, torch.Generator().manual_seed(length)
    keys, values = ([torch.randn(length, dim, generator=generator) for _ in range(backbone.spec.depth)] for _ in "kv")
    return Lens(tuple(keys), tuple(values), torch.zeros(0, dim), torch.eye(dim), torch.zeros(dim))


def _seated(spec: Spec, rack: Rack, lens: Lens) -> Seat:
    place = rack.allocate(lens)
    rack.write(place, lens)
    geometry = Geometry(spec.image_size, "bicubic", 1.0, "center")
    return Seat("made", "0" * 64, place, ("",) * lens.classes, geometry, (0.5,) * 3, (0.5,) * 3)
