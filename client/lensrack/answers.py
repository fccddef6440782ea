"""The results of predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ._core import Reply
from .errors import ApiError
from .wire import Prediction

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """One image's best labels, best first, and the version of the task's bundle that gave them.

    An ensemble has several `versions`, in the order of the request; `version` is then all of them, joined by `+`.
    """

    task: str
    version: str
    predictions: tuple[Prediction, ...]
    versions: tuple[str, ...] = ()

    @property
    def best(self) -> Prediction:
        """The best label with its score."""
        return self.predictions[0]

    @property
    def label(self) -> str:
        return self.best.label

    @property
    def score(self) -> float:
        """The best label's probability, 0 to 1."""
        return self.best.score

    def __iter__(self) -> Iterator[Prediction]:
        return iter(self.predictions)

    def to_dict(self) -> dict[str, Any]:
        """Return the answer as plain values for JSON: task, version, versions, and predictions with label and score."""
        labels = [prediction.model_dump() for prediction in self.predictions]
        return {"task": self.task, "version": self.version, "versions": list(self.versions), "predictions": labels}


@dataclass(frozen=True)
class ManyAnswers:
    """One image's answers by task; `many[task]` returns an Answer or raises the task's error."""

    answers: dict[str, Answer]
    errors: dict[str, ApiError] = field(default_factory=dict)

    def __getitem__(self, task: str) -> Answer:
        if task in self.errors:
            raise self.errors[task]
        return self.answers[task]


@dataclass(frozen=True)
class RawResponse(Generic[T]):
    """The `value` that a method returned, with its HTTP responses, in order.

    `status`, `headers`, `content`, `request_id` and `timings_s` are those of the last response.
    """

    value: T
    replies: tuple[Reply, ...]

    @property
    def status(self) -> int:
        return self.replies[-1].status

    @property
    def headers(self) -> Mapping[str, str]:
        return self.replies[-1].headers

    @property
    def content(self) -> bytes:
        return self.replies[-1].content

    @property
    def request_id(self) -> str:
        return self.replies[-1].request_id

    @property
    def timings_s(self) -> dict[str, float]:
        return self.replies[-1].timings_s
