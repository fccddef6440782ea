"""Signs of life of forks, which the process manager reads from outside.

A process that stands still (SIGSTOP, a debugger, an event loop in an endless loop) cannot notice it itself: its
watchdog stands still as well.
"""

from __future__ import annotations

import asyncio
import mmap
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

BEAT_S: Final = 0.5
_TIME: Final = struct.Struct("d")  # aligned, so that it is written at once


class Heartbeats:
    """A time of `time.monotonic` for each of `count` processes, in memory that forks share."""

    def __init__(self, count: int) -> None:
        self._memory = mmap.mmap(-1, _TIME.size * count)

    def beat(self, number: int) -> None:
        _TIME.pack_into(self._memory, _TIME.size * number, time.monotonic())

    def age_s(self, number: int) -> float:
        """Return how long ago the process of a `number` gave its last sign."""
        return time.monotonic() - float(_TIME.unpack_from(self._memory, _TIME.size * number)[0])

    @asynccontextmanager
    async def beating(self, number: int) -> AsyncIterator[None]:
        """Beat from the running event loop, as long as that turns."""

        async def beat() -> None:
            while True:
                self.beat(number)
                await asyncio.sleep(BEAT_S)

        task = asyncio.create_task(beat(), name="heartbeat")
        try:
            yield
        finally:
            task.cancel()
