"""The one bounded queue between the event loop and the engine's thread.

    submit(rows) ─▶ scheduler ─▶ one batch ─▶ engine thread ─▶ replies
        │               │                          └ engine_failed 500 (only the row that caused it)
        │               └ deadline_exceeded 504; rows that nobody waits for are dropped
        └ queue_full 429, shutting_down 503

Work-conserving: while the engine is busy rows gather, when it is free it takes what is there. The event loop owns the
queue, so there are no locks; a batch costs one hand-over to the engine's thread and one back.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import Context
from typing import Any, Protocol, TypeVar

import numpy as np

from server import metrics, tracing
from server.batching.row import Row
from server.batching.scheduler import FlowKey, Scheduler, equal_weights
from server.errors import DeadlineExceeded, Internal, QueueFull, ServiceError, Unavailable

log = logging.getLogger(__name__)

T = TypeVar("T")
Outcome = np.ndarray[Any, Any] | ServiceError


class Engine(Protocol):
    """What runs a batch. Both calls block and are made from one thread only."""

    def run(self, work: Sequence[tuple[Any, Any]]) -> Sequence[np.ndarray[Any, Any]]:
        """Logits [C] for each (image uint8 [S, S, 3], seat)."""
        ...

    def embed(self, images: Sequence[Any]) -> np.ndarray[Any, Any]:
        """Features [n, D] of n images."""
        ...


class Room:
    """Places in the queue that are kept for a request until its rows are ready."""

    def __init__(self, places: int, enqueue: Callable[[Sequence[Row]], None]) -> None:
        self.places = places
        self._enqueue = enqueue

    def submit(self, rows: Sequence[Row]) -> None:
        if len(rows) > self.places:
            raise ValueError(f"room was kept for {self.places} rows, {len(rows)} came")
        self.places -= len(rows)
        self._enqueue(rows)


class Batcher:
    """Queues rows, hands batches to the engine, answers the rows. Belongs to one event loop."""

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch: int,
        max_queue: int,
        clock: Callable[[], float] = time.monotonic,
        weight: Callable[[FlowKey], float] = equal_weights,
    ) -> None:
        self.max_queue = max_queue
        self.clock = clock
        self._engine = engine
        self._max_batch = max_batch
        self._scheduler = Scheduler(max_queue, weight=weight)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._one_aside = asyncio.Lock()
        self._arrived = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._serving: asyncio.Task[None] | None = None
        self._busy = False
        self._closing = False
        self._stopped = False
        self._promised: set[Room] = set()
        self._rows_per_s = 0.0  # measured while busy; 0 until the first batch

    def __len__(self) -> int:
        return len(self._scheduler)

    @contextmanager
    def promise(self, rows: int) -> Iterator[Room]:
        """Keep room for rows whose images are still to be decoded: a full queue is told before that work is done.

        Raises QueueFull (with Retry-After) or Unavailable (shutting_down). Rows promised before a drain are served.
        """
        self._admit(rows)
        room = Room(rows, self._enqueue)
        self._promised.add(room)
        self._idle.clear()
        try:
            yield room
        finally:
            self._promised.remove(room)
            self._note_idle()

    def submit(self, rows: Sequence[Row]) -> None:
        """Queue all of these rows or none. Raises what `promise` raises."""
        with self.promise(len(rows)) as room:
            room.submit(rows)

    async def aside(self, work: Callable[[], T]) -> T:
        """Run something else in the engine's thread, between two batches; of several such works one at a time, so that
        batches get their turn. The caller has been promised room.

        It never returns while the work is under way, even when cancelled: what the work uses must stay where it is.
        """
        async with self._one_aside:
            running = asyncio.get_running_loop().run_in_executor(self._thread, work)
            try:
                return await asyncio.shield(running)
            finally:
                while not running.done():
                    with suppress(asyncio.CancelledError):
                        await asyncio.wait([running])

    async def drain(self, timeout_s: float) -> None:
        """Take no new rows, answer the waiting ones for at most `timeout_s`, refuse the rest (503 shutting_down)."""
        self._closing = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            log.warning("%d rows were still waiting at shutdown", len(self._scheduler))
        for row in self._scheduler.clear():
            self._settle(row, Unavailable("the server is shutting down", code="shutting_down"), "refused")
        await self._stop()

    def oldest_s(self) -> float:
        """How long the oldest waiting row has waited; 0 when none waits. For the event loop's thread."""
        arrived = self._scheduler.oldest()
        return 0.0 if arrived is None else max(0.0, self.clock() - arrived)

    def check_integrity(self) -> None:
        self._scheduler.check_integrity()
        assert all(room.places >= 0 for room in self._promised), "promised rows"

    # --- inside -----------------------------------------------------------------------------------------------------

    def _admit(self, rows: int) -> None:
        if self._closing:
            raise Unavailable("the server is shutting down", code="shutting_down")
        if self._room() < rows:
            self._scheduler.sweep()
        if self._room() < rows:
            metrics.ROWS.labels("refused").inc(rows)
            raise QueueFull(
                f"the queue has no room for {rows} more rows: {self.max_queue - self._room()} of {self.max_queue} "
                "places are taken",
                retry_after_s=self._retry_after_s(),
            )

    def _room(self) -> int:
        return self.max_queue - len(self._scheduler) - sum(room.places for room in self._promised)

    def _retry_after_s(self) -> float:
        """Time to work off what waits, at the measured rate: at least a second, at most a minute."""
        if not self._rows_per_s:
            return 1.0
        waiting = self.max_queue - self._room()
        return float(min(60, max(1, math.ceil(waiting / self._rows_per_s))))

    def _enqueue(self, rows: Sequence[Row]) -> None:
        if self._stopped:
            raise Unavailable("the server is shutting down", code="shutting_down")
        for row in rows:
            self._scheduler.offer(row)
        metrics.QUEUE_ROWS.set(len(self._scheduler))
        self._busy = True
        self._arrived.set()
        if self._serving is None or self._serving.done():
            # in a context of its own: it serves everybody, not the request that happened to be the first
            loop = asyncio.get_running_loop()
            self._serving = loop.create_task(self._serve(), name="batcher", context=Context())

    async def _serve(self) -> None:
        while True:
            await self._arrived.wait()
            now = self.clock()
            batch, expired = self._scheduler.take(now, self._max_batch)
            self._count_dropped(expired)
            if batch:
                await self._forward(batch, now)
            if not len(self._scheduler):
                self._arrived.clear()
                self._busy = False
                self._note_idle()

    def _note_idle(self) -> None:
        if not self._busy and not self._promised and not len(self._scheduler):
            self._idle.set()

    async def _forward(self, batch: list[Row], taken_at: float) -> None:
        metrics.BATCH_ROWS.observe(len(batch))
        metrics.BATCH_TASKS.observe(len({id(row.seat) for row in batch}))
        loop = asyncio.get_running_loop()
        try:
            outcomes, forward = await loop.run_in_executor(self._thread, self._timed, batch)
        except BaseException:  # cancelled by a drain that ran out of time: nobody may be left waiting
            for row in batch:
                self._settle(row, Unavailable("the server is shutting down", code="shutting_down"), "refused")
            raise
        now = self.clock()
        compute_s = now - taken_at
        metrics.FORWARD_S.observe(forward[1] - forward[0])
        self._measure(len(batch), compute_s)
        if tracing.on():
            about = {"lensrack.batch.rows": len(batch), "lensrack.batch.tasks": len({id(row.seat) for row in batch})}
            tracing.batch(((row.context, row.arrived) for row in batch), taken_at, forward, now, about)
        for row, outcome in zip(batch, outcomes, strict=True):
            row.watch.queue_s, row.watch.compute_s = taken_at - row.arrived, compute_s
            metrics.QUEUE_S.observe(row.watch.queue_s)
            self._settle(row, outcome, "failed" if isinstance(outcome, ServiceError) else "answered")

    def _timed(self, rows: Sequence[Row]) -> tuple[list[Outcome], tuple[float, float]]:
        """In the engine's thread: every row's outcome, and when the forward began and ended."""
        began = self.clock()
        return self._answer(rows), (began, self.clock())

    def _answer(self, rows: Sequence[Row]) -> list[Outcome]:
        """In the engine's thread: every row's outcome. A batch that fails is halved until the culprit stands alone."""
        try:
            return list(self._run(rows))
        except Exception as error:
            if len(rows) > 1:
                middle = len(rows) // 2
                return self._answer(rows[:middle]) + self._answer(rows[middle:])
            if isinstance(error, ServiceError):
                return [error]
            rows[0].context.run(log.exception, "the engine failed on a row of task %s", rows[0].task)
            return [Internal("the engine could not answer this image", code="engine_failed")]

    def _run(self, rows: Sequence[Row]) -> Iterable[np.ndarray[Any, Any]]:
        answers: list[Any] = [None] * len(rows)
        asked = [i for i, row in enumerate(rows) if row.seat is not None]
        plain = [i for i, row in enumerate(rows) if row.seat is None]
        if asked:
            logits = self._engine.run([(rows[i].image, rows[i].seat) for i in asked])
            answers = _place(answers, asked, logits)
        if plain:
            features = self._engine.embed([rows[i].image for i in plain])
            answers = _place(answers, plain, list(features))
        return answers

    def _measure(self, rows: int, seconds: float) -> None:
        rate = rows / max(seconds, 1e-6)
        self._rows_per_s = rate if not self._rows_per_s else 0.8 * self._rows_per_s + 0.2 * rate

    def _count_dropped(self, expired: Sequence[Row]) -> None:
        for row in expired:
            self._settle(row, DeadlineExceeded("the request's time was up before the engine was free"), "expired")
        for row in self._scheduler.pop_departed():
            self._settle(row, None, "departed")
        metrics.QUEUE_ROWS.set(len(self._scheduler))

    def _settle(self, row: Row, outcome: Outcome | None, how: str) -> None:
        """Answer a row that still has a listener, count it, and let go of it."""
        metrics.ROWS.labels(how).inc()
        if row.task:  # features are nobody's
            metrics.TASK_ROWS.labels(metrics.TASKS.count(row.task), how).inc()
        if not row.reply.done():
            if isinstance(outcome, ServiceError):
                row.reply.set_exception(outcome)
            else:
                row.reply.set_result(outcome)
        row.leave()

    async def _stop(self) -> None:
        self._stopped = True
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)
        self._thread.shutdown(wait=False, cancel_futures=True)


def _place(answers: list[Any], where: Sequence[int], values: Sequence[Any]) -> list[Any]:
    if len(values) != len(where):
        raise Internal(f"the engine gave {len(values)} answers for {len(where)} rows", code="engine_failed")
    for i, value in zip(where, values, strict=True):
        answers[i] = value
    return answers
