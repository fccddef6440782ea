"""How many rows may wait: what the engine works off within `wait_s`, as measured, and not more than `most`.

A queue of a fixed length is seconds on a slow machine and milliseconds on a fast one. Bounded in time, who is let in
waits about as long whatever the machine and however many more are asking; the others are told at once to come again.

Two full batches may wait always: forwards under load are to be full, and a client that sends as many at once is no
flood, however slow the engine is. Before anything has been measured it is `most`.

Pure policy: no clock, no torch.
"""

from __future__ import annotations

import math
from typing import Final

from .latency_model import LatencyModel

EVERY: Final = 8  # forwards between two looks at them
LEAST_BATCHES: Final = 2


class QueueLimit:
    """`rows` is how many may wait now. most: the most ever; batch: a full one; wait_s: 0 leaves it at `most`."""

    def __init__(self, most: int, batch: int, wait_s: float) -> None:
        if most < 1 or batch < 1 or wait_s < 0:
            raise ValueError(f"expected one row at least and no time below 0 s, got {most}, {batch} and {wait_s}")
        self.rows = self.most = most
        self._batch, self._wait_s = batch, wait_s
        self._times = LatencyModel()
        self._since = 0

    def learn(self, rows: int, seconds: float) -> None:
        """A forward of so many rows took so long."""
        if not self._wait_s:
            return
        self._times.learn(rows, seconds)
        self._since += 1
        if self._since >= min(EVERY, len(self._times.seen)):
            self._since = 0
            in_time = math.ceil(self._times.rate(self._batch) * self._wait_s)
            self.rows = min(self.most, max(LEAST_BATCHES * self._batch, in_time))
