"""How many rows a forward may have so that 99 in 100 are answered in time, learned from how long forwards take.

A row whose turn has come waits for the batch under way and then for its own: twice the time of a forward at the worst.
The limit is the most rows for which twice the 99th percentile of that is within the target. What a forward of n rows
takes is fitted to the last ones as a + c·n (least squares); the percentile adds what 99 in 100 of them took beyond.

Smaller batches cost throughput where a forward of many rows takes little more than that of one. So the limit never
falls below what reaches half of the throughput of the largest batch: behind that, what the rows lose by waiting for
their turn is more than what they win by small batches. It says nothing about how long the queue is.

Pure policy: no clock, no torch.
"""

from __future__ import annotations

import math
from typing import Final

from .latency_model import LatencyModel

EVERY: Final = 8  # forwards between two looks at them; so a limit stays for a while
PERCENTILE: Final = 0.99
BATCHES: Final = 2  # that a row waits for: the one under way and its own
LEAST_SHARE: Final = 0.5  # of the largest batch's throughput


class BatchLimit:
    """`rows` is the limit now; `learn` is told each forward. most: what it never exceeds; target_s: 0 sets no limit."""

    def __init__(self, most: int, target_s: float = 0.0) -> None:
        if most < 1 or target_s < 0:
            raise ValueError(f"expected at least one row and a target of 0 s or more, got {most} and {target_s}")
        self.rows = most
        self._most, self._target_s = most, target_s
        self._times = LatencyModel()
        self._since = 0

    def learn(self, rows: int, seconds: float) -> None:
        """A forward of so many rows took so long."""
        if not self._target_s:
            return
        self._times.learn(rows, seconds)
        self._since += 1
        if self._since >= EVERY:
            self._since = 0
            self.rows = self._found()

    def _found(self) -> int:
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
        wanted = LEAST_SHARE * self._most / whole
        return math.ceil(wanted * start / (1 - wanted * each))
