"""The version that an alias moves to is loaded when it moves, not when somebody asks for it.

    store: "a task changed" ─► is a version of it on the rack? ─► aliases that pointed at one ─► load what they point at
                                 └ no: nobody asks for the task

Whoever asks meanwhile waits for the same load. A version that cannot be loaded is passed over here: who asks for it is
told why, as ever.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator, Set
from typing import TYPE_CHECKING

from prompts_store import Store

if TYPE_CHECKING:  # it loads torch
    from server.engine.residency import Residency

log = logging.getLogger(__name__)


class Preloader:
    """Watches a store for a rack. Belongs to the event loop; one thread of its own waits for changes."""

    def __init__(self, store: Store, residency: Residency) -> None:
        self._store, self._residency = store, residency
        self._stop = threading.Event()
        self._under_way: set[asyncio.Task[None]] = set()
        self._followed: dict[tuple[str, str], int] = {}  # the revision of an alias that was looked at last
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """What changes from now on is followed. Raises StoreUnavailable."""
        loop, changes = asyncio.get_running_loop(), self._store.watch(self._stop)

        def listen() -> None:
            for change in changes:
                if not self._stop.is_set():
                    loop.call_soon_threadsafe(self._changed, change.task)

        self._thread = threading.Thread(target=listen, name="succession", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Loads under way go on for those who wait for them."""
        self._stop.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        for one in self._under_way:
            one.cancel()

    def _changed(self, task: str) -> None:
        if self._residency.resident_versions(task):
            following = asyncio.ensure_future(self._follow(task))
            self._under_way.add(following)
            following.add_done_callback(self._under_way.discard)

    async def _follow(self, task: str) -> None:
        resident = self._residency.resident_versions(task)
        try:
            wanted = await asyncio.to_thread(lambda: set(self._successors(task, resident)))
            await asyncio.gather(*(self._residency.load(task, version) for version in wanted - resident))
        except Exception as error:  # whatever it is, it is for those to be told of who ask for the version
            log.info("task %s: its next version is not loaded ahead: %s: %s", task, type(error).__name__, error)

    def _successors(self, task: str, resident: Set[str]) -> Iterator[str]:
        """Where aliases point that pointed at a resident version before; each of their moves counts once."""
        for name, alias in self._store.aliases(task).items():
            if self._followed.get((task, name)) == alias.revision:
                continue
            self._followed[task, name] = alias.revision
            *earlier, now = self._store.history(task, name)
            if any(target.version in resident for state in earlier for target in state.targets):
                yield from (target.version for target in now.targets if target.weight)
