"""Which tasks have a label of their own in the metrics: the busiest few; all others share one.

A time series costs memory in the server and in Prometheus, and a rack may serve ten thousand tasks. So a task's traffic
is counted by Space-Saving (Metwally, Agrawal, El Abbadi, ICDT 2005), whose memory is bounded too, and places are given
away as seldom as possible: a series that comes and goes is worth little to whoever looks at it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Final

OTHER: Final = "other"
REVIEW_S: Final = 60.0
TAKEN_OVER_AT: Final = 2.0  # times the traffic of whoever has the place: two equals must not swap it to and fro
WATCHED: Final = 8  # tasks without a place that are counted, for each place


class TaskLabels:
    """Labels for the `most` busiest tasks, `other` for the rest. Safe for threads.

    `forget(task)` is called when a task loses its place: its series must go, or there would be ever more of them.
    A task that is itself called `other` never gets a place. `clock` gives seconds.
    """

    def __init__(
        self, most: int, forget: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.most = most
        self._forget, self._clock = forget, clock
        self._placed: dict[str, float] = {}  # traffic, halved at every review
        self._watched: dict[str, tuple[float, float]] = {}  # traffic as estimated, and by how much that may be too much
        self._reviewed = clock()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._placed)

    def count(self, task: str, rows: int = 1) -> str:
        """Note that so many rows were asked of a task. Returns its label."""
        with self._lock:
            if self._clock() - self._reviewed >= REVIEW_S:
                self._review()
            if self._seated(task):
                self._placed[task] += rows
                return task
            self._watch(task, rows)
            return OTHER

    def label(self, task: str) -> str:
        """The task's label, for what is no traffic."""
        with self._lock:
            return task if self._seated(task) else OTHER

    def placed(self) -> list[str]:
        """The tasks that have a place."""
        with self._lock:
            return sorted(self._placed)

    def adopt(self, tasks: Iterable[str]) -> None:
        """Give the places to exactly these, as another process does that counts the traffic; nobody else gets one."""
        with self._lock:
            wanted = set(tasks)
            for task in [name for name in self._placed if name not in wanted]:
                self._give_up(task)
            self._placed = {task: self._placed.get(task, 0.0) for task in wanted}
            self.most = len(wanted)

    def limit(self, most: int) -> None:
        """Change the number of places; who has none any more is forgotten."""
        with self._lock:
            self.most = most
            for task in sorted(self._placed, key=lambda name: self._placed[name])[: max(0, len(self._placed) - most)]:
                self._give_up(task)

    def _seated(self, task: str) -> bool:
        """Whether a task has a place, which it gets when there is a free one."""
        if task not in self._placed and len(self._placed) < self.most and task != OTHER:
            self._placed[task] = 0.0
            self._watched.pop(task, None)
        return task in self._placed

    def _watch(self, task: str, rows: int) -> None:
        """Space-Saving: a task that is new takes the place of the least busy one and may inherit its traffic."""
        if task not in self._watched and len(self._watched) >= WATCHED * max(1, self.most):
            least = min(self._watched, key=lambda name: self._watched[name][0])
            inherited = self._watched.pop(least)[0]
            self._watched[task] = (inherited, inherited)
        estimate, excess = self._watched.get(task, (0.0, 0.0))
        self._watched[task] = (estimate + rows, excess)

    def _review(self) -> None:
        """Let who is certainly much busier take over; then halve everything, so that old traffic counts less."""
        self._reviewed = self._clock()
        rising = sorted(((seen - excess, task) for task, (seen, excess) in self._watched.items()), reverse=True)
        for traffic, task in rising[: self.most]:
            if task == OTHER:
                continue
            if len(self._placed) >= self.most:
                least = min(self._placed, key=lambda name: self._placed[name])
                if traffic <= TAKEN_OVER_AT * self._placed[least]:
                    break
                self._give_up(least)
            del self._watched[task]
            self._placed[task] = traffic
        self._placed = {task: traffic / 2 for task, traffic in self._placed.items()}
        self._watched = {task: (seen / 2, excess / 2) for task, (seen, excess) in self._watched.items()}

    def _give_up(self, task: str) -> None:
        del self._placed[task]
        self._forget(task)
