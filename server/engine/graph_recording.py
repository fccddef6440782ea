"""Records the forward as CUDA graphs, and compares each graph with the ordinary forward."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from .backbone import Backbone
from .batch import Work
from .engine import Engine
from .graphs import BOUNDS, Bucket, Graph, Graphs
from .images.decode import Geometry
from .lens import Lens
from .rack import Rack
from .recorder import Recorder
from .residency import Seat
from .spec import Spec

log = logging.getLogger(__name__)


@torch.inference_mode()
def record_buckets(
    backbone: Backbone, rack: Rack, recorder: Callable[[], Recorder], buckets: Sequence[Bucket]
) -> Graphs:
    """Record a graph for each bucket; keep those that answer as the ordinary forward does.

    A bucket that cannot be recorded, or that answers differently, is logged and counted, and its rows use the ordinary
    forward. The rack must have room for two lenses with the longest prompts; buckets with more prompts than it can hold
    are left out.
    """
    graphs = Graphs(rack, rack.slab)
    try:
        active = recorder()
    except RuntimeError as error:
        graphs.counts.refused = len(buckets)
        log.warning("no CUDA graphs are recorded: %s", error)
        return graphs
    for bucket in buckets:
        _add(graphs, backbone, bucket, active)
    log.info("%d CUDA graphs serve, %d were refused", len(graphs.graphs), graphs.counts.refused)
    return graphs


def _add(graphs: Graphs, backbone: Backbone, bucket: Bucket, recorder: Recorder) -> None:
    rows, prompts = bucket
    try:
        with _SampleRows(backbone, graphs.rack, bucket) as sample:
            if not sample.seats:
                log.info("no CUDA graph for %d prompts: the rack holds no lens of so many", prompts)
                return
            graph = Graph(backbone, graphs.slab, bucket, recorder)
            drift = sample.drift(graph)
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


class _SampleRows:
    """Random lenses on the rack and random pictures: rows that fill a bucket, with prompts of three lengths."""

    def __init__(self, backbone: Backbone, rack: Rack, bucket: Bucket) -> None:
        self._backbone, self._rack, self._bucket = backbone, rack, bucket
        self.seats: list[Seat] = []

    def __enter__(self) -> _SampleRows:
        longest = self._bucket[1]
        for length in sorted({longest, longest // 3, 0}, reverse=True):
            lens = _lens(self._backbone, length)
            if self._rack.can_allocate(lens):
                self.seats.append(_seat(self._backbone.spec, self._rack, lens))
            elif length == longest:
                break
        return self

    def __exit__(self, *_: object) -> None:
        for seat in self.seats:
            self._rack.free(seat.place)

    def drift(self, graph: Graph) -> float:
        """Difference from the ordinary forward, in a full batch and in one with padding: of the worst row, the norm of
        the difference relative to the norm of the features. Infinite if a feature is not a number."""
        alone = Graphs(self._rack, self._rack.slab, {graph.bucket: graph})
        plain, by_graph = Engine(self._backbone, self._rack), Engine(self._backbone, self._rack, alone)
        pairs = [(plain.run(work), by_graph.run(work)) for work in self._batches()]
        return max(
            _relative_difference(plain_row, graph_row)
            for pair in pairs
            for plain_row, graph_row in zip(*pair, strict=True)
        )

    def _batches(self) -> Iterator[list[Work]]:
        most, size = self._bucket[0], self._backbone.spec.image_size
        drawn = np.random.default_rng(0)
        pictures = [drawn.integers(0, 256, (size, size, 3), np.uint8) for _ in range(most)]
        for rows in sorted({most, most // 2 + 1}, reverse=True):
            yield [(pictures[row], self.seats[(row + rows) % len(self.seats)]) for row in range(rows)]


def _relative_difference(expected: np.ndarray, actual: np.ndarray) -> float:
    apart = float(np.linalg.norm(actual - expected)) / max(float(np.linalg.norm(expected)), 1e-12)
    return apart if math.isfinite(apart) else float("inf")


def _lens(backbone: Backbone, length: int) -> Lens:
    """A lens with large random prompts, whose logits are the features themselves."""
    dim, generator = backbone.spec.dim, torch.Generator().manual_seed(length)
    keys, values = ([torch.randn(length, dim, generator=generator) for _ in range(backbone.spec.depth)] for _ in "kv")
    return Lens(tuple(keys), tuple(values), torch.zeros(0, dim), torch.eye(dim), torch.zeros(dim))


def _seat(spec: Spec, rack: Rack, lens: Lens) -> Seat:
    place = rack.allocate(lens)
    rack.write(place, lens)
    geometry = Geometry(spec.image_size, "bicubic", 1.0, "center")
    return Seat("made", "0" * 64, place, ("",) * lens.classes, geometry, (0.5,) * 3, (0.5,) * 3)
