"""The tasks with a label of their own in the metrics: the busiest few; all others share one.

A time series costs memory in the server and in Prometheus, and a rack may serve ten thousand tasks. So traffic is
counted by Space-Saving (Metwally, Agrawal, El Abbadi, ICDT 2005), in bounded memory, and labels change hands as seldom
as possible: a series that comes and goes is of little use.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Final

OTHER: Final = "other"
REVIEW_S: Final = 60.0
TAKEOVER_RATIO: Final = 2.0  # times the traffic of the label's holder, so that two equally busy tasks do not alternate
CANDIDATES: Final = 8  # tasks without a label whose traffic is counted, for each label


class TaskLabels:
    """Labels for the `capacity` busiest tasks, `other` for the rest. Safe for threads.

    `forget(task)` is called when a task loses its label and has to remove its series, or their number would grow
    without bound. A task that is itself called `other` never gets a label. `clock` gives seconds.
    """

    def __init__(
        self, capacity: int, forget: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.capacity = capacity
        self._forget, self._clock = forget, clock
        self._traffic: dict[str, float] = {}  # of labelled tasks, halved at every review
        self._candidates: dict[str, tuple[float, float]] = {}  # estimated traffic, and the estimate's largest excess
        self._reviewed = clock()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._traffic)

    def count(self, task: str, rows: int = 1) -> str:
        """Count `rows` requested rows of a task. Returns its label."""
        with self._lock:
            if self._clock() - self._reviewed >= REVIEW_S:
                self._review()
            if self._has_label(task):
                self._traffic[task] += rows
                return task
            self._count_candidate(task, rows)
            return OTHER

    def label(self, task: str) -> str:
        """The task's label, without counting traffic."""
        with self._lock:
            return task if self._has_label(task) else OTHER

    def tasks(self) -> list[str]:
        """The tasks with a label, sorted."""
        with self._lock:
            return sorted(self._traffic)

    def adopt(self, tasks: Iterable[str]) -> None:
        """Label exactly these tasks, chosen by another process that counts the traffic."""
        with self._lock:
            labelled = set(tasks)
            for task in [name for name in self._traffic if name not in labelled]:
                self._drop(task)
            self._traffic = {task: self._traffic.get(task, 0.0) for task in labelled}
            self.capacity = len(labelled)

    def resize(self, capacity: int) -> None:
        """Change the number of labels; the least busy tasks lose theirs."""
        with self._lock:
            self.capacity = capacity
            for task in sorted(self._traffic, key=lambda name: self._traffic[name])[
                : max(0, len(self._traffic) - capacity)
            ]:
                self._drop(task)

    def _has_label(self, task: str) -> bool:
        """Whether the task has a label; it gets one if one is free."""
        if task not in self._traffic and len(self._traffic) < self.capacity and task != OTHER:
            self._traffic[task] = 0.0
            self._candidates.pop(task, None)
        return task in self._traffic

    def _count_candidate(self, task: str, rows: int) -> None:
        """Space-Saving: a new task replaces the least busy candidate and inherits its traffic as an estimate."""
        if task not in self._candidates and len(self._candidates) >= CANDIDATES * max(1, self.capacity):
            least = min(self._candidates, key=lambda name: self._candidates[name][0])
            inherited = self._candidates.pop(least)[0]
            self._candidates[task] = (inherited, inherited)
        estimate, excess = self._candidates.get(task, (0.0, 0.0))
        self._candidates[task] = (estimate + rows, excess)

    def _review(self) -> None:
        """Give labels to candidates that are certainly much busier; then halve all counts, so old traffic fades."""
        self._reviewed = self._clock()
        rising = sorted(
            ((estimate - excess, task) for task, (estimate, excess) in self._candidates.items()), reverse=True
        )
        for traffic, task in rising[: self.capacity]:
            if task == OTHER:
                continue
            if len(self._traffic) >= self.capacity:
                least = min(self._traffic, key=lambda name: self._traffic[name])
                if traffic <= TAKEOVER_RATIO * self._traffic[least]:
                    break
                self._drop(least)
            del self._candidates[task]
            self._traffic[task] = traffic
        self._traffic = {task: traffic / 2 for task, traffic in self._traffic.items()}
        self._candidates = {task: (estimate / 2, excess / 2) for task, (estimate, excess) in self._candidates.items()}

    def _drop(self, task: str) -> None:
        del self._traffic[task]
        self._forget(task)
