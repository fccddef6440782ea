"""The adaptive queue limit: as many rows may wait as the engine answers within `wait_s`, as measured; `most` at most.

A queue of fixed length takes seconds on a slow machine and milliseconds on a fast one. With a limit in time, an
admitted row waits about as long on any machine and under any load; the rest is refused at once.

Two full batches may always wait: forwards under load should be full, and a client that sends as many rows at once is no
flood, however slow the engine. Before the first measurement the limit is `most`.

Pure policy: no clock, no torch.
"""

from __future__ import annotations

import math
from typing import Final

from .latency_model import LatencyModel

EVERY: Final = 8  # forwards between two updates of the limit
LEAST_BATCHES: Final = 2


class QueueLimit:
    """`rows` may wait now. most: the configured maximum; batch: rows of a full batch; wait_s: 0 keeps the maximum."""

    def __init__(self, most: int, batch: int, wait_s: float) -> None:
        if most < 1 or batch < 1 or wait_s < 0:
            raise ValueError(f"expected one row at least and no time below 0 s, got {most}, {batch} and {wait_s}")
        self.rows = self.most = most
        self._batch, self._wait_s = batch, wait_s
        self._times = LatencyModel()
        self._since = 0

    def learn(self, rows: int, seconds: float) -> None:
        """Learn from a forward of this many rows and its duration."""
        if not self._wait_s:
            return
        self._times.learn(rows, seconds)
        self._since += 1
        if self._since >= min(EVERY, len(self._times.seen)):
            self._since = 0
            in_time = math.ceil(self._times.rate(self._batch) * self._wait_s)
            self.rows = min(self.most, max(LEAST_BATCHES * self._batch, in_time))
