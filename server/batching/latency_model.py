"""How long forwards take by their rows, from the last ones: a + c·n seconds for n rows, by least squares.

Pure policy: no clock, no torch.
"""

from __future__ import annotations

from collections import deque
from typing import Final

WINDOW: Final = 256  # forwards that are remembered


class LatencyModel:
    """`learn` is told each forward."""

    def __init__(self) -> None:
        self.seen: deque[tuple[int, float]] = deque(maxlen=WINDOW)

    def learn(self, rows: int, seconds: float) -> None:
        """A forward of so many rows took so long."""
        self.seen.append((rows, seconds))

    def line(self) -> tuple[float, float]:
        """Seconds of a forward with no rows, and of each row. From forwards of one size: all of it is the rows'.

        Raises ZeroDivisionError before the first forward.
        """
        count = len(self.seen)
        mean_rows = sum(rows for rows, _ in self.seen) / count
        mean_s = sum(seconds for _, seconds in self.seen) / count
        spread = sum((rows - mean_rows) ** 2 for rows, _ in self.seen)
        if not spread:
            return 0.0, mean_s / mean_rows
        slope = sum((rows - mean_rows) * (seconds - mean_s) for rows, seconds in self.seen) / spread
        each = min(max(slope, 0.0), mean_s / mean_rows)  # no forward costs less than nothing before its first row
        return mean_s - each * mean_rows, each

    def rate(self, rows: int) -> float:
        """Rows a second in forwards of so many. Raises ZeroDivisionError before the first forward."""
        start, each = self.line()
        return rows / max(start + each * rows, 1e-9)
