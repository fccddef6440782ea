"""The metrics of a classifier: accuracy, overall and by class, confusions, and calibration (Guo et al., On Calibration
of Modern Neural Networks, ICML 2017)."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float64]  # [n, C]
Targets = NDArray[np.int64]  # [n]

BINS: Final = 15  # of the calibration error, as Guo et al.
MATRIX_CLASSES: Final = 50  # larger confusion matrices are too big for a manifest, and for a reader
MOST_CONFUSIONS: Final = 200
_TEMPERATURES: Final = np.exp(np.linspace(np.log(0.25), np.log(4.0), 201))
_PRIOR_WIDTH: Final = 0.5  # of log T
_Z: Final = 1.959964  # of a normal distribution, 95 % are within so many standard deviations


def accuracy(logits: NDArray[np.floating[Any]], targets: Targets) -> float:
    return round(float((logits.argmax(1) == targets).mean()), 6)


def interval(accuracy: float, images: int) -> list[float]:
    """The 95 % interval of an accuracy that was measured on so many pictures (Wilson's score interval): on 54 pictures
    half of them right means 0.37 to 0.63."""
    z2 = _Z * _Z
    centre = (accuracy + z2 / (2 * images)) / (1 + z2 / images)
    width = _Z / (1 + z2 / images) * np.sqrt(accuracy * (1 - accuracy) / images + z2 / (4 * images**2))
    return [round(float(bound), 4) for bound in (max(0.0, centre - width), min(1.0, centre + width))]


def log_softmax(logits: Logits) -> Logits:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def nll(logits: Logits, targets: Targets) -> float:
    """Mean negative log-likelihood, in nats."""
    return float(-log_softmax(logits)[np.arange(len(targets)), targets].mean())


def calibration_error(logits: Logits, targets: Targets) -> float:
    """Expected calibration error: |accuracy − confidence| over 15 equal bins of confidence, weighted by their rows."""
    scores = np.exp(log_softmax(logits))
    confidence, right = scores.max(1), scores.argmax(1) == targets
    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    gaps = np.bincount(bins, weights=right - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(targets))


def temperature(logits: Logits, targets: Targets) -> float:
    """The T between 1/4 and 4 that maximises the likelihood of softmax(logits / T), with a log-normal prior around 1.

    Without the prior, a few pictures that are all answered correctly would give T → 0.
    """
    cost = [nll(logits / t, targets) * len(targets) + 0.5 * (np.log(t) / _PRIOR_WIDTH) ** 2 for t in _TEMPERATURES]
    return float(_TEMPERATURES[int(np.argmin(cost))])


def confusion(logits: Logits, targets: Targets) -> NDArray[np.int64]:
    """[C, C]: row = the true class, column = the answer."""
    classes = logits.shape[1]
    return np.bincount(targets * classes + logits.argmax(1), minlength=classes**2).reshape(classes, classes)


def split_figures(logits: Logits, targets: Targets) -> dict[str, Any]:
    """All metrics of one split, as JSON. `interval`: of the accuracy, 95 %. The accuracy of a class without pictures is
    null and not part of the mean.

    `confusion` is the matrix for up to 50 classes; for more, `confused` lists the commonest [true, answer, count].
    """
    matrix = confusion(logits, targets)
    count = matrix.sum(1)
    recall = np.divide(np.diag(matrix), count, out=np.full(len(count), np.nan), where=count > 0)
    figures: dict[str, Any] = {
        "images": len(targets),
        "accuracy": accuracy(logits, targets),
        "interval": interval(accuracy(logits, targets), len(targets)),
        "macro_accuracy": round(float(np.nanmean(recall)), 6),
        "nll": round(nll(logits, targets), 6),
        "ece": round(calibration_error(logits, targets), 6),
        "per_class": [None if np.isnan(value) else round(float(value), 6) for value in recall],
    }
    if len(matrix) <= MATRIX_CLASSES:
        return {**figures, "confusion": matrix.tolist()}
    return {**figures, "confused": _commonest(matrix)}


def _commonest(matrix: NDArray[np.int64]) -> list[list[int]]:
    wrong = matrix * (1 - np.eye(len(matrix), dtype=np.int64))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_CONFUSIONS]
    rows, columns = np.unravel_index(order, wrong.shape)
    return [[int(r), int(c), int(wrong[r, c])] for r, c in zip(rows, columns, strict=True) if wrong[r, c]]
