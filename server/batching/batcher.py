"""The queue in the engine's process: from the event loop to the engine's thread and back.

    admission ─▶ scheduler ─▶ one batch ─▶ engine thread ─▶ replies
        │            │                          └ engine_failed 500 (only the row that caused it)
        │            └ deadline_exceeded 504; rows whose client has left are dropped
        └ queue_full 429, shutting_down 503; engine_unavailable 503 while the watchdog has suspended it

Work-conserving: while the engine is busy, rows gather; when it is free, it takes what waits. The event loop owns the
queue, so there are no locks; a batch costs one hand-over to the engine's thread and one back.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from server.errors import DeadlineExceeded, Internal, ServiceError
from server.observability import metrics, tracing

from .admission import Queue, engine_unavailable, shutting_down
from .batch_limit import BatchLimit
from .engine_thread import BatchUnderWay, Engine, EngineThread, Outcome
from .fair_share import with_reserve
from .queue_limit import QueueLimit
from .row import Row
from .scheduler import FlowKey, Scheduler, equal_shares, equal_weights

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(eq=False)
class _Batch:
    rows: list[Row]
    taken_at: float
    begun: BatchUnderWay


class Batcher(Queue):
    """Queues rows, hands batches to the engine, answers the rows. Belongs to one event loop."""

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch: int,
        max_queue: int,
        clock: Callable[[], float] = time.monotonic,
        weight: Callable[[FlowKey], float] = equal_weights,
        share: Callable[[str], float] = equal_shares,
        target_s: float = 0.0,
        wait_s: float = 0.0,
    ) -> None:
        super().__init__(max_queue=max_queue, max_batch=max_batch, clock=clock)
        self.thread = EngineThread(engine, clock)
        self._limit = BatchLimit(max_batch, target_s)
        self._places = QueueLimit(max_queue, max_batch, wait_s)
        metrics.BATCH_LIMIT.set(max_batch)
        self._scheduler = Scheduler(with_reserve(max_queue), weight=weight, share=share)
        self._arrived = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None
        self._busy = False
        self._suspended = ""
        self._swept_at = -math.inf
        self._inside: list[Row] = []  # rows of batches under way that have not left the engine
        self._finished_at = -math.inf  # when the last batch did
        self._rows_per_s = 0.0  # measured while busy; 0 until the first batch

    def __len__(self) -> int:
        return len(self._scheduler)

    async def run_exclusive(self, work: Callable[[Any, Any], T], pixels: Any, seat: Any) -> T:
        return await self.thread.run_exclusive(lambda: work(pixels, seat))

    @property
    def places(self) -> int:
        return self._places.rows

    @property
    def trouble(self) -> str:
        return self._suspended

    def suspend(self, why: str) -> None:
        """Refuse rows (503 engine_unavailable) until `resume`: new ones, waiting ones and those inside the engine.

        Rows inside are refused at once, but keep their seats until the engine is done with them.
        """
        self._suspended = why
        for row in self._scheduler.clear():
            self._settle(row, engine_unavailable(why), "refused")
        for row in self._inside:
            if not row.reply.done():
                row.reply.set_exception(engine_unavailable(why))
        metrics.QUEUE_ROWS.set(0)
        self._note_idle()

    def resume(self) -> None:
        self._suspended = ""

    async def _refuse_waiting(self) -> None:
        for row in self._scheduler.clear():
            self._settle(row, shutting_down(), "refused")
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)
        self.thread.close()

    def oldest_s(self) -> float:
        """Seconds that the oldest waiting row has waited; 0 when none waits. For the event loop's thread."""
        arrived = self._scheduler.oldest()
        return 0.0 if arrived is None else max(0.0, self.clock() - arrived)

    def check_integrity(self) -> None:
        self._scheduler.check_integrity()
        super().check_integrity()

    # --- the queue, as admission sees it ------------------------------------------------------------------------------

    def _taken(self) -> int:
        return len(self._scheduler) + self._reserved

    @property
    def _counted(self) -> int:
        return len(self._scheduler) + self._scheduler.set_aside + len(self._inside)

    def _backlog_s(self) -> float:
        return self._taken() / self._rows_per_s if self._rows_per_s else 0.0

    def _at_rest(self) -> bool:
        return not self._busy and not len(self._scheduler)

    def _sweep(self, *, at_most_every_s: float = 0.0) -> None:
        if self.clock() - self._swept_at >= at_most_every_s:
            self._swept_at = self.clock()
            self._scheduler.sweep()

    def _enqueue(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._scheduler.offer(row)
            self._shares.take(row.flow, 1)
        metrics.QUEUE_ROWS.set(len(self._scheduler))
        self._busy = True
        self._arrived.set()
        if self._serving is None or self._serving.done():
            # in a context of its own: it serves all requests, not only the one that happened to be the first
            loop = asyncio.get_running_loop()
            self._serving = loop.create_task(self._serve(), name="batcher", context=Context())

    # --- batches ------------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        """Serve batches for ever. Every row leaves and is answered, whatever goes wrong."""
        try:
            await self._serve_in_turn()
        finally:  # usually a drain that ran out of time: no client may be left waiting
            why: ServiceError = Internal("the engine could not answer this image", code="engine_failed")
            if self._stopped:
                why = shutting_down()
            self._give_up(list(self._inside), why)

    async def _serve_in_turn(self) -> None:
        """Take a batch, then finish the one before it, where the engine can compute one batch ahead."""
        before: _Batch | None = None
        while True:
            if before is None:
                await self._arrived.wait()
            batch = await self._take()
            if before is not None:
                await self._finish(before)
            before = batch
            if before is not None and not self.thread.ahead:
                await self._finish(before)
                before = None
            if before is None and not len(self._scheduler):
                self._arrived.clear()
                self._busy = False
                self._note_idle()

    async def _take(self) -> _Batch | None:
        now = self.clock()
        rows, expired = self._scheduler.take(now, self._limit.rows)
        self._count_dropped(expired)
        if not rows:
            return None
        self._inside += rows
        metrics.BATCH_ROWS.observe(len(rows))
        metrics.BATCH_TASKS.observe(len({id(row.seat) for row in rows}))
        return _Batch(rows, now, await self.thread.begin(rows))

    async def _finish(self, batch: _Batch) -> None:
        try:
            await self._answer(batch)
        except Exception:
            log.exception("a batch of %d rows failed around the engine", len(batch.rows))
            left = [row for row in batch.rows if row in self._inside]
            self._give_up(left, Internal("the engine could not answer this image", code="engine_failed"))

    def _give_up(self, rows: Sequence[Row], why: ServiceError) -> None:
        for row in rows:
            self._inside.remove(row)
            self._settle(row, why, "failed" if isinstance(why, Internal) else "refused")

    async def _answer(self, batch: _Batch) -> None:
        outcomes, forward = await self.thread.finish(batch.begun)
        now = self.clock()
        compute_s = now - batch.taken_at
        self._learn(len(batch.rows), now - max(batch.taken_at, self._finished_at))  # of two at once, each its own time
        self._finished_at = now
        metrics.FORWARD_S.observe(forward[1] - forward[0])
        if tracing.enabled():
            tasks = len({id(row.seat) for row in batch.rows})
            about = {"lensrack.batch.rows": len(batch.rows), "lensrack.batch.tasks": tasks}
            tracing.record_batch(
                ((row.context, row.arrived) for row in batch.rows), batch.taken_at, forward, now, about
            )
        for row, outcome in zip(batch.rows, outcomes, strict=True):
            row.watch.queue_s, row.watch.compute_s = batch.taken_at - row.arrived, compute_s
            metrics.QUEUE_S.observe(row.watch.queue_s)
            self._inside.remove(row)
            self._settle(row, outcome, "failed" if isinstance(outcome, ServiceError) else "answered")

    def _learn(self, rows: int, seconds: float) -> None:
        """Learn from a forward of this many rows and its duration."""
        self._measure(rows, seconds)
        self._limit.learn(rows, seconds)
        self._places.learn(rows, seconds)
        metrics.BATCH_LIMIT.set(self._limit.rows)

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
        """Answer a row if its client still waits, release it, and count it."""
        self._shares.give_back(row.flow, 1)
        if not row.reply.done():
            if isinstance(outcome, ServiceError):
                row.reply.set_exception(outcome)
            else:
                row.reply.set_result(outcome)
        for work in (row.leave, partial(_count, row, how)):
            try:
                work()
            except Exception:  # a failing seat or metric must not cost the rows behind this one their answers
                log.exception("a row of task %s could not let go of its seat, or be counted", row.task)


def _count(row: Row, how: str) -> None:
    metrics.ROWS.labels(how).inc()
    if row.task:  # rows for features have no task
        metrics.TASK_ROWS.labels(metrics.TASKS.count(row.task), how).inc()
