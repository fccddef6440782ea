"""What a server has acknowledged, and what it may therefore answer: the judge of a chaos run.

Each version answers with labels of its own and with a known score, so that an answer which mixes two versions, or is of
another version than it names, cannot pass. Each task has one writer, so that its acknowledged changes have an order;
clients of any number read it. A change without an acknowledgement may have happened or not.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from prompts_store import Backbone, Bundle, Manifest, Preprocess

STALE_S: Final = 4.0  # after which nobody may answer any more with what was replaced
LOGIT: Final = 3.0
SCORE: Final = math.exp(LOGIT) / (math.exp(LOGIT) + 1)


def bundle(task: str, number: int, fingerprint: str) -> Bundle:
    """A version whose answer to any picture is its own first label, with SCORE."""
    manifest = Manifest(
        task=task, method="linear", backbone=Backbone("untrained", fingerprint),
        labels=(f"{task} {number} yes", f"{task} {number} no"), prompt_lengths=(0,) * 6,
        preprocess=Preprocess(96, (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center"), metrics={}, recipe={},
        dataset=None, parent=None, created_at=float(number), lensrack_version="0.1.0",
    )  # fmt: skip
    bias = np.array([LOGIT, 0.0], np.float32)
    return Bundle.build(manifest, {"head.weight": np.zeros((2, 192), np.float32), "head.bias": bias})


@dataclass
class _State:
    """What the live alias of a task may point at: the versions, and until when the earlier ones may answer."""

    live: set[str | None] = field(default_factory=lambda: {None})  # None: the task may be absent
    until: dict[str | None, float] = field(default_factory=dict)
    stored: dict[str, bool] = field(default_factory=dict)  # version → whether that it is stored was acknowledged


class Ledger:
    """Safe for threads. `faults` collects what must never happen, `counts` everything else."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tasks: dict[str, _State] = {}
        self._labels: dict[str, str] = {}
        self.faults: list[str] = []
        self.counts: Counter[str] = Counter()

    def count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def fault(self, text: str) -> None:
        with self._lock:
            self.faults.append(text)

    def will_store(self, new: Bundle) -> None:
        with self._lock:
            self._labels[new.version] = new.manifest.labels[0]
            self._tasks.setdefault(new.manifest.task, _State()).stored.setdefault(new.version, False)

    @contextmanager
    def changing(self, task: str, live: str | None) -> Iterator[Any]:
        """Around a request that makes `live` the live version, or deletes the task (None). The block calls what it gets
        when the change was acknowledged; without that it may have happened, or may still."""
        acknowledged: list[bool] = []
        with self._lock:
            state = self._tasks.setdefault(task, _State())
            before = set(state.live)
            state.live.add(live)
        try:
            yield lambda: acknowledged.append(True)
        finally:
            if acknowledged:
                with self._lock:
                    now = time.monotonic()
                    state.until.update(dict.fromkeys(before - {live}, now + STALE_S))
                    state.until.pop(live, None)
                    state.live = {live}
                    if live is None:
                        state.stored.clear()
                    else:
                        state.stored[live] = True

    def check(self, task: str, asked_at: float, answer: dict[str, Any]) -> None:
        """An answer with status 200, to a request that began at `asked_at` of `time.monotonic`."""
        version, best = answer["version"], answer["predictions"][0][0]
        if best["label"] != self._labels.get(version) or abs(best["score"] - SCORE) > 1e-5:
            self.fault(
                f"{task}: version {version[:12]} answered {best}, expected {self._labels.get(version)!r} {SCORE}"
            )
        if not self._may(task, version, asked_at):
            self.fault(f"{task}: answered by {version[:12]}, which had been replaced {STALE_S:g} s before or earlier")

    def check_absent(self, task: str, asked_at: float) -> None:
        """An answer that there is no such task, or no such alias."""
        if not self._may(task, None, asked_at):
            self.fault(f"{task}: answered as if it did not exist")

    def _may(self, task: str, version: str | None, asked_at: float) -> bool:
        with self._lock:
            state = self._tasks.setdefault(task, _State())
            return version in state.live or state.until.get(version, 0.0) >= asked_at

    def expected(self) -> dict[str, tuple[set[str | None], set[str]]]:
        """By task: the versions that may be live, and those that must be stored."""
        with self._lock:
            return {
                task: (set(state.live), {version for version, known in state.stored.items() if known})
                for task, state in self._tasks.items()
            }
