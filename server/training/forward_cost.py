"""The cost of serving a lens: the time of its forward against the plain frozen ViT's, and its bytes on the rack."""

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
    """`forward`: time as a multiple of the plain ViT's. `lens_bytes`: memory of the lens on the rack."""

    forward: float
    lens_bytes: int


def measure(backbone: Backbone, loaded: Loaded, tick: Callable[[], None]) -> Cost:
    """Time a forward of `ROWS` rows of one task against a forward of the plain ViT on the same pictures.

    The two alternate, and the result is the median of the rounds' ratios, so that load on the machine has little
    influence. `tick` is called after every round.
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
        lens_s = _timed(lambda: engine.run([(image, seat) for image in pixels]))
        plain_s = _timed(lambda: engine.embed(list(pixels)))
        rounds += [lens_s / plain_s] if turn else []  # the first round includes set-up
        tick()
    return Cost(round(statistics.median(rounds), 3), rack.size_bytes(place))


def _timed(run: Callable[[], object]) -> float:
    """Seconds that `run` takes. It returns answers on the CPU, so no work is left on the device."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
