"""The adaptive batch size: the most rows of a forward for which 99 in 100 rows are answered within a target latency.

A row whose turn has come waits for the batch under way and then for its own: at worst two forwards. The limit is the
most rows for which twice the 99th percentile of a forward's duration is within the target. The duration is fitted to
the last forwards as a + c·n seconds for n rows; the percentile is of what they took beyond that.

Smaller batches cost throughput where a forward of many rows takes little longer than one of a single row. So the limit
never falls below the batch that reaches half of the largest batch's throughput: below it, rows lose more by waiting for
their turn than they win by small batches. The limit does not bound the queue.

Pure policy: no clock, no torch.
"""

from __future__ import annotations

import math
from typing import Final

from .latency_model import LatencyModel

EVERY: Final = 8  # forwards between two updates of the limit
PERCENTILE: Final = 0.99
BATCHES: Final = 2  # that a row waits for: the batch under way and its own
LEAST_SHARE: Final = 0.5  # of the largest batch's throughput


class BatchLimit:
    """`rows` is the limit now. most: the configured maximum; target_s: 0 keeps the maximum."""

    def __init__(self, most: int, target_s: float = 0.0) -> None:
        if most < 1 or target_s < 0:
            raise ValueError(f"expected at least one row and a target of 0 s or more, got {most} and {target_s}")
        self.rows = most
        self._most, self._target_s = most, target_s
        self._times = LatencyModel()
        self._since = 0

    def learn(self, rows: int, seconds: float) -> None:
        """Learn from a forward of this many rows and its duration."""
        if not self._target_s:
            return
        self._times.learn(rows, seconds)
        self._since += 1
        if self._since >= EVERY:
            self._since = 0
            self.rows = self._largest_in_time()

    def _largest_in_time(self) -> int:
        start, each = self._times.line()
        beyond = sorted(seconds - start - each * rows for rows, seconds in self._times.seen)
        late = max(0.0, beyond[math.ceil(PERCENTILE * len(beyond)) - 1])
        spare = self._target_s / BATCHES - start - late
        if spare >= each * self._most:
            return self._most
        in_time = math.floor(spare / each) if spare > 0 else 0
        return min(self._most, max(1, in_time, self._efficient(start, each)))

    def _efficient(self, start: float, each: float) -> int:
        """The fewest rows that reach LEAST_SHARE of the largest batch's throughput.

        n / (a + c·n) ≥ s · N / (a + c·N), solved for n.
        """
        whole = start + each * self._most
        if not whole:
            return 1
        rate = LEAST_SHARE * self._most / whole
        return math.ceil(rate * start / (1 - rate * each) - 1e-9)  # a rounding error is no row
