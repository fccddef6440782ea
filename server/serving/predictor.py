"""One prediction, from a task's reference and images to labels.

    Refs ("cats", "live") ─▶ version and seat   `server.serving.resolver`
                   images ─▶ pixels             decoded and cut to the seat's geometry, in threads
                   pixels ─▶ rows ─▶ logits     queued among the rows of all tasks, computed in one batch
                   logits ─▶ labels             softmax and the best k, in float64: `server.serving.answers`

An ensemble, "cats@live+candidate", is several versions of one task: their rows go together and their probabilities are
averaged. It costs a row for each version and image, as the authors of VPT advise: one picture in several rows, each
with prompts of its own.

A seat is released when the last of its rows has left the engine, however the request ends.
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
from .decoding import Image, ImageBatch, ModelInput
from .quarantine import Quarantine
from .residency import Residency
from .resolver import Catalogue, Ref, Refs, Resolver

T = TypeVar("T")


@dataclass(frozen=True)
class _EngineOutput:
    """`logits`: the first version's of each image, then the second's, …; `labels`: each version's."""

    versions: tuple[str, ...]
    labels: list[Sequence[str]]
    logits: list[np.ndarray[Any, Any]]
    timings: Timings


@dataclass(frozen=True)
class _Request:
    """What all tasks of a request share."""

    images: ImageBatch
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
        self._resolver = Resolver(store, residency, self.quarantine)
        self._batcher, self._pool = batcher, pool
        self._limits, self._geometry, self._fingerprint = limits, geometry, fingerprint
        self._requests: dict[str, Counter[str]] = {}

    def scoped(self, store: Catalogue, residency: Residency) -> Predictor:
        """A copy restricted to one tenant's store and rack."""
        scoped = copy.copy(self)
        scoped._resolver = self._resolver.scoped(store, residency)
        return scoped

    async def predict(
        self, refs: Refs, images: Sequence[Image], top_k: int, *, key: str, tenant: str, timeout_s: float
    ) -> Answer:
        """Answer for one task, or for an ensemble of its versions.

        Raises ServiceError kinds and the store's errors.
        """
        with self._open(images, len(refs), key, (tenant, refs[0].task), timeout_s) as request:
            return await within_timeout(timeout_s, self._answer(refs, top_k, request))

    async def outputs(self, ref: Ref, images: Sequence[Image], *, key: str, tenant: str, timeout_s: float) -> Outputs:
        """Return the logits and probabilities of one version. Raises like `predict`."""
        with self._open(images, 1, key, (tenant, ref.task), timeout_s) as request:
            output = await within_timeout(timeout_s, self._run((ref,), request))
        scores = np.stack([probabilities(row) for row in output.logits])
        logits = np.stack(output.logits).astype(np.float64)
        return Outputs(ref.task, output.versions[0], tuple(output.labels[0]), logits, scores, output.timings)

    async def predict_many(
        self, refs: Mapping[str, Refs], images: Sequence[Image], top_k: int, *, key: str, tenant: str, timeout_s: float
    ) -> dict[str, Answer | Exception]:
        """Answer for many tasks about the same images, decoded once: under each key of `refs` its answer or error."""
        flow = common_flow({(tenant, ref.task) for of_task in refs.values() for ref in of_task})
        with self._open(images, sum(map(len, refs.values())), key, flow, timeout_s) as request:
            answers = [within_timeout(timeout_s, self._answer(of_task, top_k, request)) for of_task in refs.values()]
            results = await asyncio.gather(*answers, return_exceptions=True)
        return {text: _answer_or_error(result) for text, result in zip(refs, results, strict=True)}

    async def embed(self, images: Sequence[Image], *, tenant: str, timeout_s: float) -> Features:
        """Return the frozen backbone's features of images."""
        with self._open(images, 1, "", (tenant, ""), timeout_s) as request:
            return await within_timeout(timeout_s, self._embed(request))

    async def run_exclusive(
        self,
        ref: Ref,
        image: Image,
        work: Callable[[ModelInput, Any], T],
        *,
        key: str,
        tenant: str,
        timeout_s: float,
    ) -> tuple[str, Any, T]:
        """Call `work(pixels, seat)` in the engine's thread between two batches; return version, seat and result.

        For anything that is no prediction, such as attention maps.
        """
        with self._open([image], 1, key, (tenant, ref.task), timeout_s) as request:
            return await within_timeout(timeout_s, self._run_exclusive(ref, work, request))

    def request_counts(self, task: str) -> Counter[str]:
        """Requests since the start, by version of the task."""
        return self._requests.get(task, Counter())

    async def resolve(self, ref: Ref, key: str) -> str:
        """See `Resolver.resolve`."""
        return await self._resolver.resolve(ref, key)

    async def version_like(self, task: str, text: str) -> str:
        """See `Resolver.version_like`."""
        return await self._resolver.version_like(task, text)

    # --- the steps --------------------------------------------------------------------------------------------------

    async def _answer(self, refs: Refs, top_k: int, request: _Request) -> Answer:
        output = await self._run(refs, request)
        scores = mean_scores([probabilities(row) for row in output.logits], output.labels)
        predictions = [best(of_image, output.labels[0], top_k) for of_image in scores]
        return Answer(refs[0].task, output.versions, predictions, output.timings)

    async def _run(self, refs: Refs, request: _Request) -> _EngineOutput:
        started, task = self._batcher.clock(), refs[0].task
        with tracing.span("predict", {"lensrack.task": task}):
            output = await self._run_seated(refs, request)
        metrics.TASK_S.labels(metrics.TASKS.label(task)).observe(self._batcher.clock() - started)
        return output

    async def _run_seated(self, refs: Refs, request: _Request) -> _EngineOutput:
        with ExitStack() as seats:
            versions, members = [], []
            for ref in refs:
                version, lease = await self._lease(ref, request)
                seats.callback(lease.release)
                versions.append(version)
                members.append(lease)
            require_same_labels([lease.seat for lease in members], versions)
            rows = await self._all_rows(refs[0].task, members, request)
            logits = await _submit_and_wait(rows, request.reservation)
        labels = [lease.seat.labels for lease in members]
        return _EngineOutput(tuple(versions), labels, logits, _timings(request, rows))

    async def _lease(self, ref: Ref, request: _Request) -> tuple[str, _SeatLease]:
        with tracing.span("seat"):
            version, seat = await self._resolver.acquire(ref, request.key)
        self._requests.setdefault(ref.task, Counter())[version] += 1
        return version, _SeatLease(seat, partial(self._resolver.release, seat))

    async def _all_rows(self, task: str, members: Sequence[_SeatLease], request: _Request) -> list[Row]:
        rows: list[Row] = []
        try:
            for lease in members:
                rows += await self._rows(task, lease, request)
        except BaseException:
            _release_all(rows)
            raise
        return rows

    async def _rows(self, task: str, lease: _SeatLease, request: _Request) -> list[Row]:
        """A row for each image, cut to the seat's geometry."""
        with tracing.span("decode"):
            pixels = await request.images.inputs(lease.seat.geometry)
        rows = [self._row(task, lease, image, request) for image in pixels]
        request.images.link(rows)
        return rows

    async def _run_exclusive(
        self, ref: Ref, work: Callable[[ModelInput, Any], T], request: _Request
    ) -> tuple[str, Any, T]:
        version, seat = await self._resolver.acquire(ref, request.key)
        try:
            [pixels] = await request.images.inputs(seat.geometry)
            return version, seat, await self._batcher.run_exclusive(work, pixels, seat)
        finally:
            self._resolver.release(seat)

    async def _embed(self, request: _Request) -> Features:
        pixels = await request.images.inputs(self._geometry)
        rows = [self._row("", _SeatLease(None, _release_nothing), image, request) for image in pixels]
        vectors = np.stack(await _submit_and_wait(rows, request.reservation))
        check_finite(vectors)
        return Features(self._fingerprint, vectors, _timings(request, rows))

    def _row(self, task: str, lease: _SeatLease, image: ModelInput, request: _Request) -> Row:
        reply = asyncio.get_running_loop().create_future()
        row = Row(task, request.tenant, lease.seat, image, request.deadline, self._batcher.clock(), reply)
        row.leave = lease.share()
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
    def _open(
        self, images: Sequence[Image], tasks: int, key: str, flow: FlowKey, timeout_s: float
    ) -> Iterator[_Request]:
        """A request's reservation in the queue and its images; neither outlives it."""
        self._check_size(len(images), tasks)
        with self._batcher.reserve(len(images) * tasks, flow) as reservation:
            batch = ImageBatch(images, self._pool, self._limits.max_image_pixels, self._limits.margin)
            try:
                yield _Request(batch, reservation, key, flow[0], self._batcher.clock() + timeout_s)
            finally:
                batch.close()
                if batch.decode_s:
                    metrics.DECODE_S.observe(batch.decode_s)


@dataclass(eq=False)
class _SeatLease:
    """A seat that a request and its rows share; `give_back` is called when the last of them releases it."""

    seat: Any
    give_back: Callable[[], None]
    users: int = field(default=1)

    def share(self) -> Callable[[], None]:
        """One user more; return what it calls at its end."""
        self.users += 1
        return self.release

    def release(self) -> None:
        self.users -= 1
        if self.users == 0:
            self.give_back()


def _release_nothing() -> None:
    """Rows of the bare backbone have no seat."""


async def _submit_and_wait(rows: Sequence[Row], reservation: Reservation) -> list[np.ndarray[Any, Any]]:
    """Queue rows and return all replies; cancel those that are not there when the wait ends early."""
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
    """For rows that were never queued: the queue releases the seats of all others."""
    for row in rows:
        row.leave()


async def within_timeout(timeout_s: float, work: Awaitable[T]) -> T:
    """Return the result of `work`. Raises DeadlineExceeded after `timeout_s`."""
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError as error:
        raise DeadlineExceeded(f"the answer was not ready within {timeout_s:g} s") from error


def _timings(request: _Request, rows: Sequence[Row]) -> Timings:
    return Timings(
        decode_s=request.images.decode_s,
        queue_s=max(row.watch.queue_s for row in rows),
        compute_s=max(row.watch.compute_s for row in rows),
    )


def _answer_or_error(result: Answer | BaseException) -> Answer | Exception:
    if isinstance(result, BaseException) and not isinstance(result, Exception):
        raise result
    return result
