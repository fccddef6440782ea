"""Versions that could not be loaded: damaged in the store, fitted on another backbone, too large.

A quarantined version is not loaded again for RETRY_S, so that a broken bundle costs one attempt in that time instead of
one for each request.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

log = logging.getLogger(__name__)

RETRY_S: Final = 30.0  # after which a bundle that was put again, or a store that was repaired, is noticed
FORGOTTEN_S: Final = 600.0  # a version that was not requested for so long is no longer counted


@dataclass
class _Entry:
    error: Exception
    until: float
    requested_at: float


class Quarantine:
    """By (task, version), with the error. Belongs to the event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: dict[tuple[str, str], _Entry] = {}

    def check(self, task: str, version: str) -> None:
        """Raises what loading the version raised, until it may be tried again."""
        entry = self._entries.get((task, version))
        if entry is None:
            return
        entry.requested_at = self._clock()
        if entry.requested_at < entry.until:
            raise entry.error.with_traceback(None)

    def put(self, task: str, version: str, error: Exception) -> None:
        now = self._clock()
        if (task, version) not in self._entries:
            log.error(
                "task %s: version %s cannot be loaded and is quarantined: %s",
                task,
                version,
                getattr(error, "detail", repr(error)),
                exc_info=None if hasattr(error, "detail") else error,
            )
        self._entries[task, version] = _Entry(error, now + RETRY_S, now)

    def release(self, task: str, version: str) -> None:
        if self._entries.pop((task, version), None) is not None:
            log.warning("task %s: version %s can be loaded again", task, version)

    def count(self) -> int:
        """Versions that were requested within the last FORGOTTEN_S; others are dropped."""
        oldest = self._clock() - FORGOTTEN_S
        self._entries = {key: entry for key, entry in self._entries.items() if entry.requested_at > oldest}
        return len(self._entries)
