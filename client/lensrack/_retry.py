"""Whether a call is retried, and after how long. Pure: the clock and the random source are parameters."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

RETRIED_STATUSES = frozenset({429, 502, 503, 504})
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 8.0
LONGEST_RETRY_AFTER_S = 60.0


def parse_retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """Return the seconds in a Retry-After header: a number or an HTTP date (RFC 9110, section 10.2.3)."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        return _until(value, now or datetime.now(UTC))
    return seconds if 0 <= seconds < float("inf") else None


def _until(date: str, now: datetime) -> float | None:
    try:
        moment = parsedate_to_datetime(date)
    except ValueError:
        return None
    if moment.tzinfo is None:  # "-0000": a date in UTC of unknown origin
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - now).total_seconds())


@dataclass
class Attempts:
    """The attempts of one call: how many and how much time are left.

    `timeout_s` is the time for all attempts and the pauses between them; None sets no limit.
    """

    max_retries: int
    timeout_s: float | None
    clock: Callable[[], float] = time.monotonic
    dice: Callable[[], float] = random.random

    def __post_init__(self) -> None:
        self._started = self.clock()
        self.retries = 0

    def left_s(self) -> float | None:
        """Return the seconds left, or None without a limit."""
        if self.timeout_s is None:
            return None
        return self.timeout_s - (self.clock() - self._started)

    def next_pause_s(self, retry_after_s: float | None = None) -> float | None:
        """Count another attempt and return the seconds before it; None if no attempt or no time is left."""
        if self.retries >= self.max_retries:
            return None
        pause_s = self._pause_s(retry_after_s)
        left_s = self.left_s()
        if left_s is not None and pause_s >= left_s:
            return None
        self.retries += 1
        return pause_s

    def _pause_s(self, retry_after_s: float | None) -> float:
        """Return the server's Retry-After plus jitter, so that clients do not all retry at once; else a backoff."""
        backoff = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0**self.retries)
        if retry_after_s is None:
            return backoff * (0.5 + self.dice() / 2)
        return min(retry_after_s, LONGEST_RETRY_AFTER_S) + FIRST_PAUSE_S * self.dice()
