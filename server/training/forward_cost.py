"""What a lens costs in the forward that serves it: its time on the rack beside the plain frozen ViT's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np

from server.engine.backbone import Backbone
from server.engine.engine import Engine
from server.engine.rack import Rack, demand
from server.engine.residency import Loaded, Seat

ROWS: Final = 8  # different pictures of one task
ROUNDS: Final = 7


class Cost(NamedTuple):
    """`forward`: time as a multiple of the plain ViT's. `lens_bytes`: what the lens takes of the rack."""

    forward: float
    lens_bytes: int


def measured(backbone: Backbone, loaded: Loaded, tick: Callable[[], None]) -> Cost:
    """A forward of `ROWS` rows of one task through the engine, beside one of the plain ViT with the same pictures.

    The two take turns and the median of the rounds' ratios counts, so that a busy machine disturbs little. `tick` is
    called after every round.
    """
    spec = backbone.spec
    pixels = np.random.default_rng(0).integers(0, 256, (ROWS, spec.image_size, spec.image_size, 3), np.uint8)
    rack = Rack(
        dim=spec.dim, slots=1, vectors=max(1, demand(loaded.lens)), device=backbone.device, dtype=backbone.dtype
    )
    place = rack.allocate(loaded.lens)
    rack.write(place, loaded.lens)
    engine = Engine(backbone, rack)
    seat = Seat("", "", place, loaded.labels, loaded.geometry, loaded.mean, loaded.std)
    rounds = []
    for turn in range(ROUNDS + 1):
        own = _timed(lambda: engine.run([(image, seat) for image in pixels]))
        bare = _timed(lambda: engine.embed(list(pixels)))
        rounds += [own / bare] if turn else []  # the first pays for set-up
        tick()
    return Cost(round(statistics.median(rounds), 3), rack.size_bytes(place))


def _timed(run: Callable[[], object]) -> float:
    """Seconds. Both kinds of run end with their answers on the CPU, so nothing is left under way on a device."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
