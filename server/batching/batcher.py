"""The one bounded queue between the event loop and the engine's thread.

    submit(rows) ─▶ scheduler ─▶ one batch ─▶ engine thread ─▶ replies
        │               │                          └ engine_failed 500 (only the row that caused it)
        │               └ deadline_exceeded 504; rows that nobody waits for are dropped
        └ queue_full 429, shutting_down 503; engine_unavailable 503 while the watchdog has suspended it

Work-conserving: while the engine is busy rows gather, when it is free it takes what is there. The event loop owns the
queue, so there are no locks; a batch costs one hand-over to the engine's thread and one back.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from server.errors import DeadlineExceeded, Internal, QueueFull, ServiceError, Unavailable
from server.observability import metrics, tracing

from .batch_limit import BatchLimit
from .engine_thread import BatchUnderWay, Engine, EngineThread, Outcome
from .fair_share import NO_FLOW, FairShares, common_flow, with_reserve
from .queue_limit import QueueLimit
from .row import Row
from .scheduler import FlowKey, Scheduler, equal_shares, equal_weights

log = logging.getLogger(__name__)

T = TypeVar("T")
SUSPENDED_RETRY_S = 5.0  # a server that ends itself is back, or another one asked, by then
SWEEP_S = 0.05  # between two looks for rows that nobody waits for, where the queue is only asked whether it has room


@dataclass(eq=False)
class _Batch:
    rows: list[Row]
    taken_at: float
    begun: BatchUnderWay


class Reservation:
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
        share: Callable[[str], float] = equal_shares,
        target_s: float = 0.0,
        wait_s: float = 0.0,
    ) -> None:
        self.max_queue = max_queue
        self.clock = clock
        self.thread = EngineThread(engine, clock)
        self._max_batch = max_batch
        self._limit = BatchLimit(max_batch, target_s)
        self._places = QueueLimit(max_queue, max_batch, wait_s)
        metrics.BATCH_LIMIT.set(max_batch)
        self._shares = FairShares()
        self._scheduler = Scheduler(with_reserve(max_queue), weight=weight, share=share)
        self._arrived = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._serving: asyncio.Task[None] | None = None
        self._busy = False
        self._closing = False
        self._draining: asyncio.Future[None] | None = None
        self._stopped = False
        self._suspended = ""  # why no rows are taken for the time being
        self._promised: set[Reservation] = set()
        self._kept = 0  # places of these
        self._swept_at = -math.inf
        self._inside: list[Row] = []  # the rows of batches under way that have not been let go of
        self._finished_at = -math.inf  # the last batch
        self._rows_per_s = 0.0  # measured while busy; 0 until the first batch

    def __len__(self) -> int:
        return len(self._scheduler)

    @contextmanager
    def promise(self, rows: int, flow: FlowKey = NO_FLOW) -> Iterator[Reservation]:
        """Keep room for rows whose images are still to be decoded: a full queue is told before that work is done.

        Raises QueueFull (with Retry-After) or Unavailable (shutting_down). Rows promised before a drain are served.
        """
        self._admit(rows, flow)
        room = Reservation(rows, partial(self._enqueue, flow))
        self._promised.add(room)
        self._kept += rows
        self._shares.take(flow, rows)
        self._idle.clear()
        try:
            yield room
        finally:
            self._promised.remove(room)
            self._kept -= room.places
            self._shares.give_back(flow, room.places)
            self._note_idle()

    def require_room(self, inside: int, flow: FlowKey = NO_FLOW) -> None:
        """Raises QueueFull where a row more would certainly be refused, or where `inside`, requests on their way to the
        queue or back, are as many as it could ever hold. Cheap: it is asked before anything is done for a request. A
        server that drains or is suspended says so where it promises."""
        if self._closing or self._suspended or self._quiet(flow):
            return
        if inside >= self.places + 2 * self._max_batch:
            raise self._full(f"{inside} requests are waiting or being answered")
        if self._taken() >= self.places and self.clock() - self._swept_at >= SWEEP_S:
            self._swept_at = self.clock()
            self._scheduler.sweep()
        if self._taken() >= self.places:
            raise self._full(f"all {self.places} places of the queue are taken")

    def submit(self, rows: Sequence[Row]) -> None:
        """Queue all of these rows or none. Raises what `promise` raises."""
        with self.promise(len(rows), common_flow({row.flow for row in rows})) as room:
            room.submit(rows)

    async def aside(self, work: Callable[[Any, Any], T], pixels: Any, seat: Any) -> T:
        """Run something else in the engine's thread, between two batches. The caller has been promised room."""
        return await self.thread.aside(lambda: work(pixels, seat))

    @property
    def places(self) -> int:
        """Rows that may wait as things are: see `QueueLimit`."""
        return self._places.rows

    @property
    def suspended(self) -> str:
        """Why no rows are taken for the time being; "" when they are."""
        return self._suspended

    def suspend(self, why: str) -> None:
        """Refuse (503 engine_unavailable) what comes, what waits and what is inside the engine, until `resume`.

        Rows inside are answered and keep their seats until the engine lets go of them.
        """
        self._suspended = why
        for row in self._scheduler.clear():
            self._settle(row, self._unavailable(), "refused")
        for row in self._inside:
            if not row.reply.done():
                row.reply.set_exception(self._unavailable())
        metrics.QUEUE_ROWS.set(0)
        self._note_idle()

    def resume(self) -> None:
        self._suspended = ""

    async def drain(self, timeout_s: float) -> None:
        """Take no new rows, answer the waiting ones for at most `timeout_s`, refuse the rest (503 shutting_down).

        The first call decides; whoever calls again waits for the same end.
        """
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain(timeout_s))
        await asyncio.shield(self._draining)

    async def _drain(self, timeout_s: float) -> None:
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

    def retry_after_s(self) -> float:
        """Time to work off what waits, at the measured rate: at least a second, at most a minute."""
        if not self._rows_per_s:
            return 1.0
        return float(min(60, max(1, math.ceil(self._taken() / self._rows_per_s))))

    def check_integrity(self) -> None:
        self._scheduler.check_integrity()
        assert all(room.places >= 0 for room in self._promised), "promised rows"
        assert self._kept == sum(room.places for room in self._promised), "places kept"
        rows = len(self._scheduler) + self._scheduler.set_aside + len(self._inside)
        self._shares.check_integrity(self._kept + rows)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _admit(self, rows: int, flow: FlowKey) -> None:
        if self._closing:
            raise Unavailable("the server is shutting down", code="shutting_down")
        if self._suspended:
            raise self._unavailable()
        if not self._fits(rows, flow):
            self._scheduler.sweep()
        if not self._fits(rows, flow):
            taken = f"{self._taken()} of {self.places} places are taken"
            raise self._full(f"the queue has no room for {rows} more rows: {taken}", rows)

    def _full(self, detail: str, rows: int = 1) -> QueueFull:
        metrics.ROWS.labels("refused").inc(rows)
        return QueueFull(detail, retry_after_s=self.retry_after_s())

    def _unavailable(self) -> Unavailable:
        return Unavailable(self._suspended, code="engine_unavailable", retry_after_s=SUSPENDED_RETRY_S)

    def _fits(self, rows: int, flow: FlowKey) -> bool:
        """A request of many rows is let in where one of a single row is, or it never would be beside such; what the
        bound in time leaves of the queue may be shorter than it. `max_queue` is what there is room for at all."""
        if self._taken() < self.places and self._taken() + rows <= self.max_queue:
            return True
        return self._quiet(flow, rows)

    def _quiet(self, flow: FlowKey, rows: int = 1) -> bool:
        return self._shares.admits(flow, rows, taken=self._taken(), most=self.max_queue, places=self.places)

    def _taken(self) -> int:
        return len(self._scheduler) + self._kept

    def _enqueue(self, flow: FlowKey, rows: Sequence[Row]) -> None:
        self._kept -= len(rows)  # whatever becomes of them, they take the places that were kept for them
        self._shares.give_back(flow, len(rows))
        if self._stopped:
            raise Unavailable("the server is shutting down", code="shutting_down")
        if self._suspended:
            raise self._unavailable()
        for row in rows:
            self._scheduler.offer(row)
            self._shares.take(row.flow, 1)
        metrics.QUEUE_ROWS.set(len(self._scheduler))
        self._busy = True
        self._arrived.set()
        if self._serving is None or self._serving.done():
            # in a context of its own: it serves everybody, not the request that happened to be the first
            loop = asyncio.get_running_loop()
            self._serving = loop.create_task(self._serve(), name="batcher", context=Context())

    async def _serve(self) -> None:
        """Every row is let go of, whatever goes wrong, and the queue goes on."""
        try:
            await self._serve_in_turn()
        finally:  # a drain that ran out of time, as a rule: nobody may be left waiting
            why: ServiceError = Internal("the engine could not answer this image", code="engine_failed")
            if self._stopped:
                why = Unavailable("the server is shutting down", code="shutting_down")
            self._give_up(list(self._inside), why)

    async def _serve_in_turn(self) -> None:
        """A batch is taken; then the one before is answered, if the engine could be put to the new one meanwhile."""
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

    def _note_idle(self) -> None:
        if not self._busy and not self._promised and not len(self._scheduler):
            self._idle.set()

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
        if tracing.on():
            tasks = len({id(row.seat) for row in batch.rows})
            about = {"lensrack.batch.rows": len(batch.rows), "lensrack.batch.tasks": tasks}
            tracing.batch(((row.context, row.arrived) for row in batch.rows), batch.taken_at, forward, now, about)
        for row, outcome in zip(batch.rows, outcomes, strict=True):
            row.watch.queue_s, row.watch.compute_s = batch.taken_at - row.arrived, compute_s
            metrics.QUEUE_S.observe(row.watch.queue_s)
            self._inside.remove(row)
            self._settle(row, outcome, "failed" if isinstance(outcome, ServiceError) else "answered")

    def _learn(self, rows: int, seconds: float) -> None:
        """From a forward of so many rows that took so long."""
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
        """Answer a row that still has a listener, let go of it, and count it."""
        self._shares.give_back(row.flow, 1)
        if not row.reply.done():
            if isinstance(outcome, ServiceError):
                row.reply.set_exception(outcome)
            else:
                row.reply.set_result(outcome)
        for work in (row.leave, partial(_count, row, how)):
            try:
                work()
            except Exception:  # neither a seat nor a metric must cost the rows behind this one their answers
                log.exception("a row of task %s could not let go of its seat, or be counted", row.task)

    async def _stop(self) -> None:
        self._stopped = True
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)
        self.thread.close()


def _count(row: Row, how: str) -> None:
    metrics.ROWS.labels(how).inc()
    if row.task:  # features are nobody's
        metrics.TASK_ROWS.labels(metrics.TASKS.count(row.task), how).inc()
