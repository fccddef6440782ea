"""Predictions with `client_resize`, as steps that both clients run.

A step is a call to send, or blocking work; its result, or the error it raised, is sent back into the generator.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar

from . import _endpoints, wire
from ._core import Call
from ._endpoints import Images
from ._images import ImageInput
from .answers import Answer, ManyAnswers
from .errors import ConflictError, NotFoundError

T = TypeVar("T")

Step: TypeAlias = Call[Any] | Callable[[], Any]
Steps: TypeAlias = Generator[Step, Any, T]

CACHED_S = 60.0  # a task's geometry; the server refuses a stale one, which costs a second request
_STALE_GEOMETRY = "geometry_differs"  # an error code


class Geometries:
    """A cache of how tasks resize their pictures. None: the versions of a task do it differently."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._cache: dict[str, tuple[float, wire.Geometry | None]] = {}

    def of(self, ref: str) -> Steps[wire.Geometry | None]:
        """Return the geometry of `task`, `task@alias` or `task@one+other`, from the cache or the server."""
        at, geometry = self._cache.get(ref, (float("-inf"), None))
        if self._clock() - at > CACHED_S:
            geometry = yield from _look_up(ref)
            self._cache[ref] = self._clock(), geometry
        return geometry

    def forget(self, ref: str) -> None:
        self._cache.pop(ref, None)


def _look_up(ref: str) -> Steps[wire.Geometry | None]:
    """Return the geometry that all versions of a reference share, or None."""
    task, _, names = ref.partition("@")
    geometries: set[wire.Geometry] = set()
    try:
        aliases = {alias.name: alias for alias in (yield _endpoints.get_task(task)).aliases}
        for name in (names or "live").split("+"):
            targets = [target.version for target in aliases[name].targets] if name in aliases else [name]
            for version in targets:
                geometries.add(wire.Geometry.of((yield _endpoints.get_version(task, version)).preprocess))
    except (NotFoundError, KeyError):
        return None  # the prediction itself reports what does not exist
    return geometries.pop() if len(geometries) == 1 else None


def predict(geometries: Geometries, task: str, images: Images, *, top_k: int, key: str | None) -> Steps[list[Answer]]:
    """Send resized pictures; send the originals where the task's versions have no common or another geometry."""
    request = partial(_endpoints.predict, task, images, top_k=top_k, key=key)
    geometry = yield from geometries.of(task)
    if geometry is not None:
        try:
            answers: list[Answer] = yield (yield partial(request, geometry=geometry))
            return answers
        except ConflictError as error:
            if error.code != _STALE_GEOMETRY:
                raise
            geometries.forget(task)
    answers = yield (yield request)
    return answers


def predict_many(
    geometries: Geometries, tasks: Sequence[str], image: ImageInput, *, top_k: int, key: str | None
) -> Steps[ManyAnswers]:
    """As `predict`; pictures are resized only where all tasks have the same geometry."""
    request = partial(_endpoints.predict_many, tasks, image, top_k=top_k, key=key)
    shared = set()
    for task in [] if isinstance(tasks, str) else tasks:
        shared.add((yield from geometries.of(task)))
    if len(shared) == 1 and (geometry := shared.pop()) is not None:
        try:
            many: ManyAnswers = yield (yield partial(request, geometry=geometry))
            if not any(error.code == _STALE_GEOMETRY for error in many.errors.values()):
                return many
        except ConflictError as error:
            if error.code != _STALE_GEOMETRY:
                raise
        for task in tasks:
            geometries.forget(task)
    many = yield (yield request)
    return many
