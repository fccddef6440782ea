"""Retention: how long finished jobs and checkpoints are kept. Any worker may clean up, several at the same time too."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Final

from server.clock import WallClock
from server.errors import NotFound
from server.jobs.store import JobStore

from .checkpoints import Checkpoints

log = logging.getLogger(__name__)

EVERY_S: Final = 600.0


class Retention:
    """Deletes jobs that finished more than `keep_s` ago (0: never), and the checkpoints of finished jobs."""

    def __init__(
        self,
        jobs: JobStore,
        checkpoints: Checkpoints,
        keep_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: WallClock | None = None,
    ) -> None:
        self._jobs, self._checkpoints, self._keep_s, self._clock = jobs, checkpoints, keep_s, clock
        self._wall = wall or WallClock()
        self._last = -math.inf

    def when_due(self) -> None:
        """Clean up at the first call, and then at most every `EVERY_S`."""
        if self._clock() - self._last >= EVERY_S:
            self.clean_up()
            self._last = self._clock()

    def clean_up(self) -> None:
        # without the correction, a clock that was set forward makes all jobs seem old
        if self._keep_s > 0 and (old := self._jobs.prune(self._keep_s + self._wall.ahead_s())):
            log.info("deleted %d jobs that finished more than %g s ago", len(old), self._keep_s)
        for job_id in sorted(self._checkpoints.jobs()):
            if self.is_over(job_id):
                self._checkpoints.forget(job_id)

    def is_over(self, job_id: str) -> bool:
        """Whether no further attempt at this job will be made; true for an unknown job."""
        try:
            return self._jobs.get(job_id).finished
        except NotFound:
            return True
