"""The time of day where the clock may be set while we run: by hand, by NTP after an outage, by a machine that woke up.

What must not end early asks for the `earliest` that it may be, what must not go on too long for the `latest`. Both go
by the steps of a steady clock since the process began; a clock that was wrong then is believed.
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
        return min(self._wall(), self._began + self._steady())

    def latest(self) -> float:
        return max(self._wall(), self._began + self._steady())

    def ahead_s(self) -> float:
        """By how much the clock has been set forward; 0 where it has been set back."""
        return max(0.0, self._wall() - self._began - self._steady())
