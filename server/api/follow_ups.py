"""What follows a change that has been made: the answer to the client tells of the change, and does not fail for it.

A deletion, for example, is done once the store has deleted; that feedback and the device's memory follow is this
server's affair. An action that fails is tried again behind the answer until it succeeds or the process ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from itertools import chain, repeat
from typing import Final

log = logging.getLogger(__name__)

PATIENCE_S: Final = 5.0  # for which the answer waits for an action
RETRY_S: Final = (1.0, 5.0, 30.0)  # between attempts; the last is repeated


class FollowUps:
    """Belongs to the event loop."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()

    async def do(self, what: str, action: Callable[[], Awaitable[object]]) -> None:
        """Run `action`, and return when it has succeeded, has failed once, or has taken PATIENCE_S. `what`: for the
        log."""
        tried = asyncio.Event()
        task = asyncio.create_task(self._until_done(what, action, tried), name=what)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await tried.wait()
        except TimeoutError:
            log.warning("%s: goes on behind the answer", what)

    async def _until_done(self, what: str, action: Callable[[], Awaitable[object]], tried: asyncio.Event) -> None:
        for pause in chain(RETRY_S, repeat(RETRY_S[-1])):
            try:
                await action()
            except Exception as error:  # whatever it is, the change that it follows has been made
                log.warning("%s: failed, and is tried again: %s", what, getattr(error, "detail", repr(error)))
            else:
                return
            finally:
                tried.set()
            await asyncio.sleep(pause)
