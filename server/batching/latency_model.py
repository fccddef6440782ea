"""A latency model of the forward, fitted to the last ones by least squares: a + c·n seconds for n rows.

Pure policy: no clock, no torch.
"""

from __future__ import annotations

from collections import deque
from typing import Final

WINDOW: Final = 256  # forwards that are remembered


class LatencyModel:
    """Remembers the last forwards, and fits them when asked."""

    def __init__(self) -> None:
        self.seen: deque[tuple[int, float]] = deque(maxlen=WINDOW)

    def learn(self, rows: int, seconds: float) -> None:
        """Remember a forward of this many rows and its duration."""
        self.seen.append((rows, seconds))

    def line(self) -> tuple[float, float]:
        """(a, c): seconds of an empty forward, and of each row. With forwards of one size only, a is 0.

        Raises ZeroDivisionError before the first forward.
        """
        count = len(self.seen)
        mean_rows = sum(rows for rows, _ in self.seen) / count
        mean_s = sum(seconds for _, seconds in self.seen) / count
        spread = sum((rows - mean_rows) ** 2 for rows, _ in self.seen)
        if not spread:
            return 0.0, mean_s / mean_rows
        slope = sum((rows - mean_rows) * (seconds - mean_s) for rows, seconds in self.seen) / spread
        each = min(max(slope, 0.0), mean_s / mean_rows)  # an empty forward cannot take negative time
        return mean_s - each * mean_rows, each

    def rate(self, rows: int) -> float:
        """Rows per second in forwards of this many rows. Raises ZeroDivisionError before the first forward."""
        start, each = self.line()
        return rows / max(start + each * rows, 1e-9)
