"""Delivers changes to any number of watchers in the same process."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Final

from prompts_store.store import Change

STOP_CHECK_S: Final = 0.1
"""How long a watcher waits for a change before it checks its stop event; one call cannot wait for both."""


class Broadcast:
    """One queue for each watcher; the queue goes when its watcher is garbage-collected."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues: weakref.WeakSet[queue.Queue[Change]] = weakref.WeakSet()

    def publish(self, task: str) -> None:
        """Report a change of `task` to every watcher."""
        with self._lock:
            watchers = list(self._queues)
        for watcher in watchers:
            watcher.put(Change(task))

    def subscribe(self, stop: threading.Event) -> Iterator[Change]:
        """Yield every change published after this call, until `stop` is set."""
        changes: queue.Queue[Change] = queue.Queue()
        with self._lock:
            self._queues.add(changes)
        return _until(stop, changes)


def _until(stop: threading.Event, changes: queue.Queue[Change]) -> Iterator[Change]:
    while not stop.is_set():
        try:
            change = changes.get(timeout=STOP_CHECK_S)
        except queue.Empty:
            continue
        yield change
