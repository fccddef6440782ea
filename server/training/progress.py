"""How far a fit is, for whoever watches."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """After each step, and once more when an epoch has been judged.

    `loss` is the step's, at an epoch's end the epoch's mean; `eta_s` is None until an epoch has been timed. While a
    search tries recipes, `trial` of `trials` is under way; `tried` is what a trial that has just ended gave. `learned`
    images were in a step that has just been made.
    """

    epoch: int = 0
    epochs: int = 0
    step: int = 0
    steps: int = 0
    loss: float | None = None
    val_accuracy: float | None = None
    eta_s: float | None = None
    epoch_ended: bool = False
    trial: int = 0
    trials: int = 0
    tried: dict[str, Any] | None = None
    learned: int = 0


Watcher = Callable[[Progress], None]


def nobody(progress: Progress) -> None:
    """For a fit that nobody watches."""


class Clock:
    """Time left, from the time an epoch has taken so far."""

    def __init__(self, epochs: int) -> None:
        self._epochs, self._started = epochs, time.perf_counter()

    def eta_s(self, done: float) -> float | None:
        """`done` epochs, a fraction included, are over."""
        if done < 1:
            return None
        return round((time.perf_counter() - self._started) / done * (self._epochs - done), 1)
