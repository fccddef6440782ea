"""The progress of a fit, as its callback `on_progress` receives it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Progress:
    """Reported after each step and each batch of an evaluation, and once more after an epoch's evaluation.

    `phase`: reading (the pictures), features (caching what the frozen layers give), search, head (the preliminary
    version's), fit, condense, compare or publish. `share`: the estimated share of the work that is done, 0 to 1; None
    where it is unknown. `loss` is the step's, at an epoch's end the epoch's mean. `val_accuracy` and `val_nll` are the
    last evaluated epoch's. `eta_s` is None until an epoch has been timed. `trial` counts from 1 to `trials` in a
    search, a comparison or a condensation; `trial_figures` are those of a trial that has just ended. `trained_images`
    is the number of images in the step that has just been made.
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
    phase: str = "reading"
    share: float | None = None
    val_nll: float | None = None

    def as_trial(self, phase: str, number: int, total: int, figures: dict[str, Any] | None = None) -> Progress:
        """The progress of a fit as that of a job of `total` such fits, of which it is the `number`-th. `figures`: its
        figures where it has just ended."""
        share = (number - 1 + (1.0 if figures else self.share or 0.0)) / max(1, total)
        return replace(
            self,
            phase="features" if self.phase == "features" else phase,
            share=round(min(1.0, share), 4),
            epoch_ended=False,
            eta_s=None,
            trial=number,
            trials=total,
            trial_figures=figures,
        )


OnProgress = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """The default `on_progress`."""


@dataclass
class Work:
    """The work of a fit, in pictures through the backbone; backward counts as much as forward. `trained`, `evaluated`:
    the cost of a picture in a training step and in an evaluation."""

    trained: float = 2.0
    evaluated: float = 1.0
    total: float = 0.0
    done: float = 0.0

    @property
    def share(self) -> float | None:
        return round(min(1.0, self.done / self.total), 4) if self.total else None


class ShareClock:
    """Estimates the time left from how fast the share of the work grows."""

    LEAST_S, LEAST = 2.0, 0.01  # seconds and share from which a rate can be told

    def __init__(self) -> None:
        self._began: tuple[float, float] | None = None
        self._last = 0.0

    def eta_s(self, share: float) -> float | None:
        """Seconds left; None until the rate is known. A share that falls, as at a new phase, starts the clock again."""
        now = time.perf_counter()
        if self._began is None or share < self._last:
            self._began = (share, now)
        self._last = share
        gained, spent = share - self._began[0], now - self._began[1]
        if gained < self.LEAST or spent < self.LEAST_S:
            return None
        return round(spent / gained * (1 - share), 1)


class EpochClock:
    """Estimates the time left from the duration of the epochs so far."""

    def __init__(self, epochs: int) -> None:
        self._epochs, self._started = epochs, time.perf_counter()

    def eta_s(self, done: float) -> float | None:
        """Seconds left after `done` epochs, which may be a fraction; None during the first epoch."""
        if done < 1:
            return None
        return round((time.perf_counter() - self._started) / done * (self._epochs - done), 1)
