"""One /predict, from bytes to labels.

    "cats@live" ─▶ version and seat    see `server.serving.resolver`
         images ─▶ pixels              decoded and cut to the seat's geometry, in threads
         pixels ─▶ rows ─▶ logits      queued among the rows of all tasks, answered by one forward
         logits ─▶ labels              softmax and the best k, in float64

An ensemble, "cats@live+candidate", is several versions of one task: their rows go together and their probabilities are
averaged. It costs a row for each version and image, as the authors of VPT advise: one picture in several rows, each
with prompts of its own.

Whatever happens on the way, the seat is given back: when the last row has left the engine, not before.
"""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np

from server.batching.admission import Queue, Reservation
from server.batching.fair_share import common_flow
from server.batching.row import Row
from server.batching.scheduler import FlowKey
from server.engine.images.decode import Geometry
from server.errors import DeadlineExceeded, Unprocessable
from server.observability import metrics, tracing

from .answers import (
    Answer,
    Features,
    Limits,
    Outputs,
    Timings,
    best,
    check_finite,
    mean_scores,
    probabilities,
    require_same_labels,
)
from .decoding import Fitted, Image, ImageBatch
from .quarantine import Quarantine
from .residency import Residency
from .resolver import Catalogue, Ref, Refs, Resolver

T = TypeVar("T")


@dataclass(frozen=True)
class _EngineOutput:
    """What the engine gave: `logits` are the first version's of each image, then the second's, …; `labels` are each
    version's."""

    versions: tuple[str, ...]
    labels: list[Sequence[str]]
    logits: list[np.ndarray[Any, Any]]
    timings: Timings


@dataclass(frozen=True)
class _Request:
    """What belongs to a request rather than to one of its tasks."""

    pictures: ImageBatch
    reservation: Reservation
    key: str
    tenant: str
    deadline: float  # of the batcher's clock


class Predictor:
    """Answers predictions. Belongs to the event loop; `pool` decodes, the batcher's thread computes."""

    def __init__(
        self,
        store: Catalogue,
        residency: Residency,
        batcher: Queue,
        pool: Executor,
        *,
        limits: Limits,
        geometry: Geometry,
        fingerprint: str,
    ) -> None:
        """`geometry` and `fingerprint` are the bare backbone's, for `embed`."""
        self.quarantine = Quarantine()
        self._seating = Resolver(store, residency, self.quarantine)
        self._batcher, self._pool = batcher, pool
        self._limits, self._geometry, self._fingerprint = limits, geometry, fingerprint
        self._asked: dict[str, Counter[str]] = {}

    def within(self, store: Catalogue, residency: Residency) -> Predictor:
        """The same predictor as who may see only a part of store and rack is to have it."""
        narrowed = copy.copy(self)
        narrowed._seating = self._seating.within(store, residency)
        return narrowed

    async def predict(
        self, refs: Refs, images: Sequence[Image], top_k: int, *, key: str, tenant: str, timeout_s: float
    ) -> Answer:
        """Ask one task, or an ensemble of its versions, about images.

        Raises ServiceError kinds and the store's errors.
        """
        with self._asking(images, len(refs), key, (tenant, refs[0].task), timeout_s) as asking:
            return await within_timeout(timeout_s, self._answer(refs, top_k, asking))

    async def outputs(self, ref: Ref, images: Sequence[Image], *, key: str, tenant: str, timeout_s: float) -> Outputs:
        """Ask one version about images, and be told all that it says of them. Raises like `predict`."""
        with self._asking(images, 1, key, (tenant, ref.task), timeout_s) as asking:
            given = await within_timeout(timeout_s, self._ask([ref], asking))
        scores = np.stack([probabilities(row) for row in given.logits])
        logits = np.stack(given.logits).astype(np.float64)
        return Outputs(ref.task, given.versions[0], tuple(given.labels[0]), logits, scores, given.timings)

    async def predict_many(
        self, refs: Mapping[str, Refs], images: Sequence[Image], top_k: int, *, key: str, tenant: str, timeout_s: float
    ) -> dict[str, Answer | Exception]:
        """Ask many tasks about the same images, decoded once: under each key of `refs` its answer or its error."""
        flow = common_flow({(tenant, one.task) for of_task in refs.values() for one in of_task})
        with self._asking(images, sum(map(len, refs.values())), key, flow, timeout_s) as asking:
            asked = [within_timeout(timeout_s, self._answer(of_task, top_k, asking)) for of_task in refs.values()]
            results = await asyncio.gather(*asked, return_exceptions=True)
        return {text: _result(result) for text, result in zip(refs, results, strict=True)}

    async def embed(self, images: Sequence[Image], *, tenant: str, timeout_s: float) -> Features:
        """The frozen backbone's features of images."""
        with self._asking(images, 1, "", (tenant, ""), timeout_s) as asking:
            return await within_timeout(timeout_s, self._embed(asking))

    async def run_exclusive(
        self, ref: Ref, image: Image, work: Callable[[Fitted, Any], T], *, key: str, tenant: str, timeout_s: float
    ) -> tuple[str, Any, T]:
        """What `work` makes of an image and its seat, in the engine's thread between two batches; with the version and
        the seat. For what is no prediction, such as where the network looks."""
        with self._asking([image], 1, key, (tenant, ref.task), timeout_s) as asking:
            return await within_timeout(timeout_s, self._run_exclusive(ref, work, asking))

    def asked(self, task: str) -> Counter[str]:
        """How often each version of a task has been asked since the start."""
        return self._asked.get(task, Counter())

    async def resolve(self, ref: Ref, key: str) -> str:
        """See `Resolver.resolve`."""
        return await self._seating.resolve(ref, key)

    async def version_like(self, task: str, text: str) -> str:
        """See `Resolver.version_like`."""
        return await self._seating.version_like(task, text)

    # --- the steps --------------------------------------------------------------------------------------------------

    async def _answer(self, refs: Sequence[Ref], top_k: int, asking: _Request) -> Answer:
        given = await self._ask(refs, asking)
        scores = mean_scores([probabilities(row) for row in given.logits], given.labels)
        predictions = [best(of_image, given.labels[0], top_k) for of_image in scores]
        return Answer(refs[0].task, given.versions, predictions, given.timings)

    async def _ask(self, refs: Sequence[Ref], asking: _Request) -> _EngineOutput:
        """`refs` are of one task."""
        began, task = self._batcher.clock(), refs[0].task
        with tracing.span("predict", {"lensrack.task": task}):
            given = await self._given(refs, asking)
        metrics.TASK_S.labels(metrics.TASKS.label(task)).observe(self._batcher.clock() - began)
        return given

    async def _given(self, refs: Sequence[Ref], asking: _Request) -> _EngineOutput:
        with ExitStack() as seats:
            versions, members = [], []
            for ref in refs:
                with tracing.span("seat"):
                    version, seat = await self._seating.take(ref, asking.key)
                hold = _SeatLease(partial(self._seating.release, seat))
                seats.callback(hold.drop)
                self._asked.setdefault(ref.task, Counter())[version] += 1
                versions.append(version)
                members.append((seat, hold))
            require_same_labels([seat for seat, _ in members], versions)
            rows = await self._all_rows(refs[0].task, members, asking)
            logits = await _submit_and_wait(rows, asking.reservation)
        labels = [seat.labels for seat, _ in members]
        return _EngineOutput(tuple(versions), labels, logits, _timings(asking, rows))

    async def _all_rows(self, task: str, members: Sequence[tuple[Any, _SeatLease]], asking: _Request) -> list[Row]:
        rows: list[Row] = []
        try:
            for seat, hold in members:
                rows += await self._rows(task, seat, hold, asking)
        except BaseException:
            _release_all(rows)
            raise
        return rows

    async def _rows(self, task: str, seat: Any, hold: _SeatLease, asking: _Request) -> list[Row]:
        """A row an image, cut as this version asks."""
        with tracing.span("decode"):
            pixels = await asking.pictures.fitted(seat.geometry)
        rows = [self._row(task, seat, image, hold, asking) for image in pixels]
        asking.pictures.show(rows)
        return rows

    async def _run_exclusive(self, ref: Ref, work: Callable[[Fitted, Any], T], asking: _Request) -> tuple[str, Any, T]:
        version, seat = await self._seating.take(ref, asking.key)
        try:
            [pixels] = await asking.pictures.fitted(seat.geometry)
            return version, seat, await self._batcher.run_exclusive(work, pixels, seat)
        finally:
            self._seating.release(seat)

    async def _embed(self, asking: _Request) -> Features:
        pixels = await asking.pictures.fitted(self._geometry)
        rows = [self._row("", None, image, _SeatLease(_nothing), asking) for image in pixels]
        vectors = np.stack(await _submit_and_wait(rows, asking.reservation))
        check_finite(vectors)
        return Features(self._fingerprint, vectors, _timings(asking, rows))

    def _row(self, task: str, seat: Any, image: Fitted, hold: _SeatLease, asking: _Request) -> Row:
        reply = asyncio.get_running_loop().create_future()
        row = Row(task, asking.tenant, seat, image, asking.deadline, self._batcher.clock(), reply)
        row.leave = hold.share()
        return row

    # --- what the steps lean on -------------------------------------------------------------------------------------

    def _check_size(self, images: int, tasks: int) -> None:
        if not 1 <= images <= self._limits.max_images:
            raise Unprocessable(f"images: expected 1 to {self._limits.max_images}, got {images}")
        if not 1 <= tasks <= self._limits.max_tasks:
            raise Unprocessable(f"task: expected 1 to {self._limits.max_tasks} tasks and versions, got {tasks}")
        if images * tasks > self._batcher.max_queue:
            raise Unprocessable(
                f"expected at most {self._batcher.max_queue} images x tasks in one request, got {images * tasks}"
            )

    @contextmanager
    def _asking(
        self, images: Sequence[Image], tasks: int, key: str, flow: FlowKey, timeout_s: float
    ) -> Iterator[_Request]:
        """A request's room in the queue and its images; neither outlives it."""
        self._check_size(len(images), tasks)
        with self._batcher.reserve(len(images) * tasks, flow) as reservation:
            shown = ImageBatch(images, self._pool, self._limits.max_image_pixels, self._limits.margin)
            try:
                yield _Request(shown, reservation, key, flow[0], self._batcher.clock() + timeout_s)
            finally:
                shown.close()
                if shown.decode_s:
                    metrics.DECODE_S.observe(shown.decode_s)


@dataclass(eq=False)
class _SeatLease:
    """A seat in use by a request and its rows; given back when the last of them lets go."""

    release: Callable[[], None]
    users: int = field(default=1)

    def share(self) -> Callable[[], None]:
        self.users += 1
        return self.drop

    def drop(self) -> None:
        self.users -= 1
        if self.users == 0:
            self.release()


def _nothing() -> None:
    """There is no seat to give back."""


async def _submit_and_wait(rows: Sequence[Row], reservation: Reservation) -> list[np.ndarray[Any, Any]]:
    """Queue rows and wait for all replies; on the way out, whatever the reason, nobody waits for one any more."""
    try:
        reservation.submit(rows)
    except BaseException:
        _release_all(rows)
        raise
    try:
        if len(rows) == 1:
            return [await rows[0].reply]
        return list(await asyncio.gather(*(row.reply for row in rows)))
    finally:
        for row in rows:
            row.reply.cancel()


def _release_all(rows: Sequence[Row]) -> None:
    """They have not come into the queue, and so nobody else lets go of their seats."""
    for row in rows:
        row.leave()


async def within_timeout(timeout_s: float, work: Awaitable[T]) -> T:
    """Wait at most so long. Raises DeadlineExceeded."""
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError as error:
        raise DeadlineExceeded(f"the answer was not ready within {timeout_s:g} s") from error


def _timings(asking: _Request, rows: Sequence[Row]) -> Timings:
    return Timings(
        decode_s=asking.pictures.decode_s,
        queue_s=max(row.watch.queue_s for row in rows),
        compute_s=max(row.watch.compute_s for row in rows),
    )


def _result(result: Answer | BaseException) -> Answer | Exception:
    if isinstance(result, BaseException) and not isinstance(result, Exception):
        raise result
    return result
