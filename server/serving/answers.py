"""From logits to answers: scores, labels, features, timings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from server.engine.images.decode import Geometry
from server.errors import Conflict, Internal

from .resolver import ENSEMBLE_SIGN

Scores = np.ndarray[Any, np.dtype[np.float64]]  # [C] or [n, C], adding up to 1


class SeatLike(Protocol):
    """A resident version, as far as scoring needs it."""

    @property
    def labels(self) -> Sequence[str]: ...
    @property
    def geometry(self) -> Geometry: ...


@dataclass(frozen=True)
class Limits:
    max_images: int
    max_image_pixels: int
    max_tasks: int
    margin: float = math.inf  # of a JPEG's size, see `server.engine.images.decode.pixels`


@dataclass(frozen=True)
class Timings:
    """Seconds: decoding all images; the longest wait of a row; the longest forward."""

    decode_s: float
    queue_s: float
    compute_s: float


@dataclass(frozen=True, slots=True)
class Scored:
    label: str
    index: int
    score: float


@dataclass(frozen=True)
class Answer:
    """`predictions[i]`: the best labels of image i, best first. `versions`: one, or an ensemble's in the request's
    order."""

    task: str
    versions: tuple[str, ...]
    predictions: list[list[Scored]]
    timings: Timings

    @property
    def version(self) -> str:
        """All versions in one text, as a reference joins them."""
        return ENSEMBLE_SIGN.join(self.versions)


@dataclass(frozen=True)
class Outputs:
    """A version's outputs for n images: `logits` [n, C] and their `probabilities` [n, C]."""

    task: str
    version: str
    labels: tuple[str, ...]
    logits: np.ndarray[Any, np.dtype[np.float64]]
    probabilities: Scores
    timings: Timings


@dataclass(frozen=True)
class Features:
    """The frozen backbone's features of n images: `vectors` [n, D]."""

    fingerprint: str
    vectors: np.ndarray[Any, Any]
    timings: Timings


def probabilities(logits: np.ndarray[Any, Any]) -> Scores:
    """Return the softmax in float64. logits: [C]. Raises Internal (engine_failed) for logits that are not finite."""
    wide = np.asarray(logits, np.float64)
    check_finite(wide)
    scores: Scores = np.exp(wide - wide.max())
    scores /= scores.sum()
    return scores


def mean_scores(rows: Sequence[Scores], labels: Sequence[Sequence[str]]) -> list[Scores]:
    """Return the mean over an ensemble's members for each image: [C], in the first member's order of labels.

    `rows`: the first member's scores of each image, then the second's, …; `labels[m]`: member m's classes.
    """
    if len(labels) == 1:
        return list(rows)
    images = len(rows) // len(labels)
    total = [np.zeros(len(labels[0])) for _ in range(images)]
    for member, classes in enumerate(labels):
        place = {label: index for index, label in enumerate(classes)}
        order = [place[label] for label in labels[0]]
        for image in range(images):
            total[image] += rows[member * images + image][order]
    return [scores / len(labels) for scores in total]


def require_same_labels(seats: Sequence[SeatLike], versions: Sequence[str]) -> None:
    """Raises Conflict (labels_differ) unless all have the same labels: other probabilities have no mean."""
    expected = set(seats[0].labels)
    for seat, version in zip(seats, versions, strict=True):
        if odd := sorted(expected.symmetric_difference(seat.labels)):
            raise Conflict(
                f"an ensemble's versions must have the same labels: {versions[0][:12]} and {version[:12]} differ in "
                f"{', '.join(repr(label[:40]) for label in odd[:5])}{' …' if len(odd) > 5 else ''}",
                code="labels_differ",
            )


def best(scores: Scores, labels: Sequence[str], top_k: int) -> list[Scored]:
    """Return the `top_k` most likely labels (all, where there are fewer); ties by index. scores: [C]."""
    order = np.argsort(-scores, kind="stable")[:top_k]
    return [Scored(labels[i], i, score) for i, score in zip(order.tolist(), scores[order].tolist(), strict=True)]


def check_finite(numbers: np.ndarray[Any, Any]) -> None:
    """Raises Internal (engine_failed)."""
    if not np.isfinite(numbers).all():
        raise Internal("the engine gave numbers that are not finite", code="engine_failed")
