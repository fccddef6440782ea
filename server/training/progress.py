"""The progress of a fit, as its callback `on_progress` receives it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """Reported after each step, and once more after an epoch's evaluation.

    `loss` is the step's, at an epoch's end the epoch's mean. `eta_s` is None until an epoch has been timed. `trial`
    counts from 1 to `trials` in a search, a comparison or a condensation; `trial_figures` are those of a trial that has
    just ended. `trained_images` is the number of images in the step that has just been made.
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
    trial_figures: dict[str, Any] | None = None
    trained_images: int = 0


OnProgress = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """The default `on_progress`."""


class EpochClock:
    """Estimates the time left from the duration of the epochs so far."""

    def __init__(self, epochs: int) -> None:
        self._epochs, self._started = epochs, time.perf_counter()

    def eta_s(self, done: float) -> float | None:
        """Seconds left after `done` epochs, which may be a fraction; None during the first epoch."""
        if done < 1:
            return None
        return round((time.perf_counter() - self._started) / done * (self._epochs - done), 1)
