"""What is kept of jobs that are over, and for how long. Any worker may clean up, and several at once do no harm."""

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
    """Forgets jobs that finished more than `keep_s` ago (0: never), and checkpoints that no job goes on from."""

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
        """Clean up at the first call and then every `EVERY_S` at most."""
        if self._clock() - self._last >= EVERY_S:
            self.clean_up()
            self._last = self._clock()

    def clean_up(self) -> None:
        # by a clock that was set forward all would seem old
        if self._keep_s > 0 and (old := self._jobs.prune(self._keep_s + self._wall.ahead_s())):
            log.info("forgot %d jobs that finished more than %g s ago", len(old), self._keep_s)
        for job_id in sorted(self._checkpoints.jobs()):
            if self.over(job_id):
                self._checkpoints.forget(job_id)

    def over(self, job_id: str) -> bool:
        """Whether nothing will be done for this job any more; one that is not known is over too."""
        try:
            return self._jobs.get(job_id).finished
        except NotFound:
            return True
