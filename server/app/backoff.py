"""How long to wait before a process that has ended is started again."""

from __future__ import annotations

from typing import Final

LONG_LIFE_S: Final = 60.0
LONGEST_PAUSE_S: Final = 30.0


class Backoff:
    """Pauses from `first_s` to 30 s: each is twice the one before, until the process has lived for over a minute."""

    def __init__(self, first_s: float) -> None:
        self._first_s = self._next_s = first_s

    def pause_s(self, lived_s: float) -> float:
        """Return the seconds to wait before restarting a process that ended after `lived_s`."""
        pause_s = self._first_s if lived_s > LONG_LIFE_S else self._next_s
        self._next_s = min(LONGEST_PAUSE_S, 2 * pause_s)
        return pause_s
