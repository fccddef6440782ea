"""Versions that could not be loaded: damaged in the store, for another backbone, too large.

They are not asked for again for a while, so that a broken bundle costs a look now and then and not one a request.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

log = logging.getLogger(__name__)

RETRY_S: Final = 30.0  # a bundle that was put again, or a store that was mended, is found by then
FORGOTTEN_S: Final = 600.0  # a version that nobody has asked for so long is nobody's trouble any more


@dataclass
class _Held:
    error: Exception
    until: float
    asked_at: float


class Quarantine:
    """By (task, version), with the reason. Belongs to the event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._held: dict[tuple[str, str], _Held] = {}

    def check(self, task: str, version: str) -> None:
        """Raises what loading the version raised, until it may be tried again."""
        held = self._held.get((task, version))
        if held is None:
            return
        held.asked_at = self._clock()
        if held.asked_at < held.until:
            raise held.error.with_traceback(None)

    def put(self, task: str, version: str, error: Exception) -> None:
        now = self._clock()
        if (task, version) not in self._held:
            log.error(
                "task %s: version %s cannot be loaded and is quarantined: %s",
                task,
                version,
                getattr(error, "detail", repr(error)),
                exc_info=None if hasattr(error, "detail") else error,
            )
        self._held[task, version] = _Held(error, now + RETRY_S, now)

    def release(self, task: str, version: str) -> None:
        if self._held.pop((task, version), None) is not None:
            log.warning("task %s: version %s can be loaded again", task, version)

    def count(self) -> int:
        """How many there are that somebody has asked for lately."""
        old = self._clock() - FORGOTTEN_S
        self._held = {key: held for key, held in self._held.items() if held.asked_at > old}
        return len(self._held)
