"""Calls that depend on one another, written once for both clients.

A step is a call to send or work for a thread; its outcome, or what it raised, comes back into the generator.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar

from . import _calls, wire
from ._calls import Images
from ._core import Call
from ._images import ImageInput
from .answers import Answer, ManyAnswers
from .errors import ConflictError, NotFoundError

T = TypeVar("T")

Step: TypeAlias = Call[Any] | Callable[[], Any]
Steps: TypeAlias = Generator[Step, Any, T]

REMEMBERED_S = 60.0  # how tasks cut their pictures; a stale one is noticed by the server and costs a second request
_OTHERWISE = "geometry_differs"


class Geometries:
    """How tasks cut their pictures, as far as it is known. None: their versions do it in several ways."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[str, tuple[float, wire.Geometry | None]] = {}

    def of(self, ref: str) -> Steps[wire.Geometry | None]:
        at, geometry = self._known.get(ref, (float("-inf"), None))
        if self._clock() - at > REMEMBERED_S:
            geometry = yield from _look_up(ref)
            self._known[ref] = self._clock(), geometry
        return geometry

    def forget(self, ref: str) -> None:
        self._known.pop(ref, None)


def _look_up(ref: str) -> Steps[wire.Geometry | None]:
    """What all versions behind `task`, `task@alias` or `task@one+other` agree on."""
    task, _, names = ref.partition("@")
    found: set[wire.Geometry] = set()
    try:
        aliases = {alias.name: alias for alias in (yield _calls.get_task(task)).aliases}
        for name in (names or "live").split("+"):
            targets = [target.version for target in aliases[name].targets] if name in aliases else [name]
            for version in targets:
                found.add(wire.Geometry.of((yield _calls.get_version(task, version)).preprocess))
    except (NotFoundError, KeyError):
        return None  # whoever asks is told what is not there, in the words of a prediction
    return found.pop() if len(found) == 1 else None


def predict(geometries: Geometries, task: str, images: Images, *, top_k: int, key: str | None) -> Steps[list[Answer]]:
    """Pictures cut here; as they are where the task's versions cut them otherwise by now."""
    ask = partial(_calls.predict, task, images, top_k=top_k, key=key)
    geometry = yield from geometries.of(task)
    if geometry is not None:
        try:
            answers: list[Answer] = yield (yield partial(ask, geometry=geometry))
            return answers
        except ConflictError as error:
            if error.code != _OTHERWISE:
                raise
            geometries.forget(task)
    answers = yield (yield ask)
    return answers


def predict_many(
    geometries: Geometries, tasks: Sequence[str], image: ImageInput, *, top_k: int, key: str | None
) -> Steps[ManyAnswers]:
    """As `predict`, where all tasks cut their pictures alike."""
    ask = partial(_calls.predict_many, tasks, image, top_k=top_k, key=key)
    found = set()
    for task in [] if isinstance(tasks, str) else tasks:
        found.add((yield from geometries.of(task)))
    if len(found) == 1 and (geometry := found.pop()) is not None:
        try:
            many: ManyAnswers = yield (yield partial(ask, geometry=geometry))
            if not any(error.code == _OTHERWISE for error in many.errors.values()):
                return many
        except ConflictError as error:
            if error.code != _OTHERWISE:
                raise
        for task in tasks:
            geometries.forget(task)
    many = yield (yield ask)
    return many
