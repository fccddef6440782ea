"""Following a job: the position among its events, and how long to retry while the server is unreachable. Pure."""

from __future__ import annotations

import time
from collections.abc import Callable

from ._core import Call
from ._endpoints import job_events
from .errors import ConnectError, LensrackError, RateLimitedError, RequestTimeout, ServerError
from .wire import JobEvent, JobEvents, JobProgress

LOST = (ConnectError, RequestTimeout, ServerError, RateLimitedError)
"""Errors of calls to a server that is restarting."""

POLL_S = 20.0
PROGRESS_S = 0.9
"""Seconds between two reports of progress."""
OUTAGE_S = 120.0
PAUSE_S = 1.0


class EventCursor:
    """The position among a job's events, from number `after` to the last.

    Failures are retried until the server has not answered for OUTAGE_S; `timeout_s` limits the whole. With `progress`,
    changes of the job's progress are events, too, which the server does not store.
    """

    def __init__(
        self,
        job: str,
        after: int = 0,
        timeout_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        progress: bool = False,
    ) -> None:
        self.job, self.after, self.finished = job, after, False
        self._clock, self._timeout_s = clock, timeout_s
        self._wait_s, self._with_progress, self._shown = PROGRESS_S if progress else POLL_S, progress, JobProgress()
        self._sent_at = self._answered_at = self._started_at = clock()

    def call(self) -> Call[JobEvents]:
        """Return the next request. Raises RequestTimeout after `timeout_s`."""
        self._sent_at, left_s = self._clock(), self._left_s()
        limit_s = None if self._timeout_s is None else left_s + PAUSE_S
        return job_events(self.job, after=self.after, wait_s=min(self._wait_s, left_s), limit_s=limit_s)

    def take(self, page: JobEvents) -> list[JobEvent]:
        """Return the new events of a page."""
        self._answered_at = self._clock()
        new = [event for event in page.events if event.seq > self.after]
        self.after = max(self.after, page.next)
        self.finished = page.finished
        if self._with_progress and page.progress and page.progress != self._shown and not page.finished:
            self._shown = page.progress
            data = page.progress.model_dump()
            new.append(JobEvent(seq=self.after, type="progress", at=time.time(), data=data))
        return new

    def rest_s(self, new: list[JobEvent]) -> float:
        """Return the seconds to wait, for a server that answers at once without events must not be polled in a loop."""
        held_s = self._answered_at - self._sent_at
        return 0.0 if new or self.finished else max(0.0, min(PAUSE_S, self._left_s()) - held_s)

    def lost(self, error: LensrackError) -> float:
        """Return the seconds before the next request. Raises `error` when the server has failed for too long."""
        if self._clock() - self._answered_at > OUTAGE_S:
            raise error
        return min(PAUSE_S, self._left_s())

    def _left_s(self) -> float:
        if self._timeout_s is None:
            return POLL_S
        left_s = self._timeout_s - (self._clock() - self._started_at)
        if left_s <= 0:
            raise RequestTimeout(f"job {self.job} has not finished within {self._timeout_s:g} s; it goes on")
        return left_s
