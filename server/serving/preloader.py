"""When an alias moves, the version that it moves to is loaded ahead of the first request for it.

    store: "a task changed" ─► is a version of it on the rack? ─► aliases that pointed at one ─► load what they point at
                                 └ no: the task gets no requests

A request that comes meanwhile waits for the same load. A version that cannot be loaded is only logged here: a request
for it fails with the reason.
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
    """Watches a store on behalf of a rack. Belongs to the event loop; a thread waits for changes."""

    def __init__(self, store: Store, residency: Residency) -> None:
        self._store, self._residency = store, residency
        self._stop = threading.Event()
        self._loads: set[asyncio.Task[None]] = set()
        self._revisions: dict[tuple[str, str], int] = {}  # of each task's aliases, as last seen
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Follow changes from now on. Raises StoreUnavailable."""
        loop, changes = asyncio.get_running_loop(), self._store.watch(self._stop)

        def listen() -> None:
            for change in changes:
                if not self._stop.is_set():
                    loop.call_soon_threadsafe(self._changed, change.task)

        self._thread = threading.Thread(target=listen, name="preloader", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Follow no more changes. Loads that requests wait for go on."""
        self._stop.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        for load in self._loads:
            load.cancel()

    def _changed(self, task: str) -> None:
        if self._residency.resident_versions(task):
            load = asyncio.ensure_future(self._load_successors(task))
            self._loads.add(load)
            load.add_done_callback(self._loads.discard)

    async def _load_successors(self, task: str) -> None:
        resident = self._residency.resident_versions(task)
        try:
            versions = await asyncio.to_thread(lambda: set(self._successors(task, resident)))
            await asyncio.gather(*(self._residency.load(task, version) for version in versions - resident))
        except Exception as error:  # a request for the version will raise it to its client
            log.info("task %s: its next version is not loaded ahead: %s: %s", task, type(error).__name__, error)

    def _successors(self, task: str, resident: Set[str]) -> Iterator[str]:
        """Versions that aliases point at which pointed at a resident version before; each move counts once."""
        for name, alias in self._store.aliases(task).items():
            if self._revisions.get((task, name)) == alias.revision:
                continue
            self._revisions[task, name] = alias.revision
            *earlier, now = self._store.history(task, name)
            if any(target.version in resident for state in earlier for target in state.targets):
                yield from (target.version for target in now.targets if target.weight)
