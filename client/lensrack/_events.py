"""Following a job: where one stands among its events, and how long to bear with a server that is away. Pure."""

from __future__ import annotations

import time
from collections.abc import Callable

from ._calls import job_events
from ._core import Call
from .errors import ConnectError, LensrackError, RateLimitedError, RequestTimeout, ServerError
from .wire import JobEvent, JobEvents

LOST = (ConnectError, RequestTimeout, ServerError, RateLimitedError)
"""What a server that restarts looks like from outside."""

POLL_S = 20.0
OUTAGE_S = 120.0
PAUSE_S = 1.0


class EventCursor:
    """The way through a job's events, from `after` to the last one.

    A broken connection is forgiven until the server has been away for OUTAGE_S; `timeout_s` ends the whole.
    """

    def __init__(
        self, job: str, after: int = 0, timeout_s: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.job, self.after, self.finished = job, after, False
        self._clock, self._timeout_s = clock, timeout_s
        self._asked = self._answered = self._started = clock()

    def call(self) -> Call[JobEvents]:
        """The next request. Raises RequestTimeout when the time for the whole is up."""
        self._asked, left_s = self._clock(), self._left_s()
        limit_s = None if self._timeout_s is None else left_s + PAUSE_S
        return job_events(self.job, after=self.after, wait_s=min(POLL_S, left_s), limit_s=limit_s)

    def take(self, page: JobEvents) -> list[JobEvent]:
        """The page's events that are new."""
        self._answered = self._clock()
        new = [event for event in page.events if event.seq > self.after]
        self.after = max(self.after, page.next)
        self.finished = page.finished
        return new

    def rest_s(self, new: list[JobEvent]) -> float:
        """A server that does not hold the request until there is news must not be asked in a tight loop."""
        held_s = self._answered - self._asked
        return 0.0 if new or self.finished else max(0.0, min(PAUSE_S, self._left_s()) - held_s)

    def lost(self, error: LensrackError) -> float:
        """The pause before asking again. Raises the error when the server has been away for too long."""
        if self._clock() - self._answered > OUTAGE_S:
            raise error
        return min(PAUSE_S, self._left_s())

    def _left_s(self) -> float:
        if self._timeout_s is None:
            return POLL_S
        left_s = self._timeout_s - (self._clock() - self._started)
        if left_s <= 0:
            raise RequestTimeout(f"job {self.job} has not finished within {self._timeout_s:g} s; it goes on")
        return left_s
