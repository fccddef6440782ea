"""A task's answers to pictures whose labels are known: accuracy, classes, confusion and the pictures answered wrongly.

folder/<label>/… ── Scoring.paths ──> [a client asks] ── Scoring.take ──> Scoring.result() ──> Evaluation
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ._folders import LeftOut, pictures_in
from .answers import Answer
from .errors import InvalidInput, LensrackError, concerns_image

Z_95 = 1.959964  # the normal distribution's quantile for 95 %


@dataclass(frozen=True)
class Mistake:
    """A picture whose best label is not its own; `score` is the answer's probability."""

    image: Path
    label: str
    answer: str
    score: float


@dataclass(frozen=True)
class Unreadable:
    """A picture without an answer, and why."""

    image: Path
    label: str
    error: str


@dataclass(frozen=True)
class ClassScore:
    """A label's pictures in the folder, how many of them are answered rightly, and how often it was the answer."""

    label: str
    images: int
    correct: int
    answered: int

    @property
    def recall(self) -> float | None:
        """The share of the label's pictures that are answered rightly; None without pictures."""
        return self.correct / self.images if self.images else None

    @property
    def precision(self) -> float | None:
        """The share of the answers with this label that are right; None without such answers."""
        return self.correct / self.answered if self.answered else None


@dataclass(frozen=True)
class Evaluation:
    """How a task answers a folder of class folders.

    `confusion[label][answer]` counts pictures. `unreadable` pictures have no answer and count in no figure. `versions`
    are those that answered: several where an alias splits its requests or moved during the run.
    """

    task: str
    versions: tuple[str, ...]
    images: int
    correct: int
    classes: tuple[ClassScore, ...]
    confusion: dict[str, dict[str, int]]
    wrong: tuple[Mistake, ...]
    unreadable: tuple[Unreadable, ...]
    unknown_labels: tuple[str, ...]
    left_out: LeftOut

    @property
    def accuracy(self) -> float:
        """The share of the pictures whose best label is their own, 0 to 1."""
        return self.correct / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy: what this many pictures can tell."""
        return wilson(self.correct, self.images)

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain values for JSON."""
        low, high = self.interval
        return {
            "task": self.task,
            "versions": list(self.versions),
            "images": self.images,
            "correct": self.correct,
            "accuracy": self.accuracy,
            "interval_95_wilson": [low, high],
            "classes": [{**asdict(one), "recall": one.recall, "precision": one.precision} for one in self.classes],
            "confusion": self.confusion,
            "wrong": [{**asdict(mistake), "image": str(mistake.image)} for mistake in self.wrong],
            "unreadable": [{**asdict(picture), "image": str(picture.image)} for picture in self.unreadable],
            "unknown_labels": list(self.unknown_labels),
            "left_out": self.left_out.counts(),
        }


def wilson(correct: int, images: int) -> tuple[float, float]:
    """Return Wilson's score interval (1927) of a share, at 95 %."""
    share, z2 = correct / images, Z_95**2 / images
    middle = (share + z2 / 2) / (1 + z2)
    half = Z_95 / (1 + z2) * math.sqrt(share * (1 - share) / images + z2 / (4 * images))
    return max(0.0, middle - half), min(1.0, middle + half)


class Scoring:
    """Pictures with their labels, which are the names of their folders; takes the answers in the same order."""

    def __init__(self, task: str, folder: str | Path) -> None:
        """Find the pictures. Raises InvalidInput for anything but a folder of class folders with pictures."""
        self._task, self._folder, self.left_out = task, Path(folder), LeftOut()
        if not self._folder.is_dir():
            raise InvalidInput(f"expected a folder of class folders, got {folder}")
        found = [(path, path.relative_to(self._folder).parts) for path in pictures_in([self._folder], self.left_out)]
        self._labelled = [(path, parts[0]) for path, parts in found if len(parts) > 1]
        self.left_out.other += [path for path, parts in found if len(parts) == 1]  # without a label
        if not self._labelled:
            raise InvalidInput(f"{folder} has no class folders with pictures: expected {folder}/LABEL/PICTURE")
        self._answers: list[Answer | LensrackError] = []
        self._unknown: tuple[str, ...] | None = None

    @property
    def paths(self) -> list[Path]:
        return [path for path, _ in self._labelled]

    @property
    def taken(self) -> int:
        """The number of pictures whose answers were taken."""
        return len(self._answers)

    def take(self, answer: Answer | LensrackError) -> Answer | None:
        """Take the next picture's answer. Returns the first, whose version's labels `check_labels` needs.

        Raises errors that concern all pictures, such as an unknown task.
        """
        if isinstance(answer, LensrackError) and not concerns_image(answer):
            raise answer
        self._answers.append(answer)
        return answer if self._unknown is None and isinstance(answer, Answer) else None

    def check_labels(self, known: Sequence[str]) -> None:
        """Compare the folders' names with the labels of the version. Raises InvalidInput if it has none of them."""
        labels = list(dict.fromkeys(label for _, label in self._labelled))
        self._unknown = tuple(label for label in labels if label not in known)
        if len(self._unknown) == len(labels):
            raise InvalidInput(
                f"{self._folder}: expected folders that are named after classes of task {self._task}, such as "
                f"{_listed(known)}; got {_listed(labels)}"
            )

    def result(self) -> Evaluation:
        """Return the figures. Raises InvalidInput if no picture was answered."""
        pairs = list(zip(self._labelled, self._answers, strict=True))
        answered = [(path, label, got) for (path, label), got in pairs if isinstance(got, Answer)]
        unreadable = tuple(
            Unreadable(path, label, str(got)) for (path, label), got in pairs if isinstance(got, LensrackError)
        )
        if not answered:
            raise InvalidInput(
                f"no picture of {self._folder} was answered; {unreadable[0].image}: {unreadable[0].error}"
            )
        counts = Counter((label, got.label) for _, label, got in answered)
        return Evaluation(
            task=self._task,
            versions=tuple(dict.fromkeys(version for *_, got in answered for version in got.versions)),
            images=len(answered),
            correct=sum(count for (label, answer), count in counts.items() if label == answer),
            classes=_classes(counts),
            confusion=_confusion(counts),
            wrong=tuple(
                Mistake(path, label, got.label, got.score) for path, label, got in answered if got.label != label
            ),
            unreadable=unreadable,
            unknown_labels=self._unknown or (),
            left_out=self.left_out,
        )


def _classes(counts: Counter[tuple[str, str]]) -> tuple[ClassScore, ...]:
    images, answers = Counter[str](), Counter[str]()
    for (label, answer), count in counts.items():
        images[label] += count
        answers[answer] += count
    return tuple(
        ClassScore(label, images[label], counts[label, label], answers[label]) for label in sorted({*images, *answers})
    )


def _confusion(counts: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    table: dict[str, dict[str, int]] = {}
    for (label, answer), count in sorted(counts.items()):
        table.setdefault(label, {})[answer] = count
    return table


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(map(repr, labels[:5])) + (", …" if len(labels) > 5 else "")
