"""Time of day that is safe against clock changes while the process runs: by hand, by NTP, or after sleep.

Deadlines that must not come early use `earliest`; those that must not come late use `latest`. Both compare the wall
clock with its value at the start of the process plus the steps of a steady clock. A clock that was wrong at the start
is not detected.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class WallClock:
    """Seconds since the epoch."""

    def __init__(self, wall: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic) -> None:
        self._wall, self._steady = wall, steady
        self._began = wall() - steady()

    def earliest(self) -> float:
        """The time, not later than the steady clock says."""
        return min(self._wall(), self._began + self._steady())

    def latest(self) -> float:
        """The time, not earlier than the steady clock says."""
        return max(self._wall(), self._began + self._steady())

    def ahead_s(self) -> float:
        """Seconds by which the clock has been set forward; 0 if it has been set back."""
        return max(0.0, self._wall() - self._began - self._steady())
