"""Admission control, once: may these rows wait in the queue, and if not, what is the client told?

    require_room   before anything is done for a request: a full queue refuses                        429
    reserve        before its images are decoded: places are kept until the rows are ready            429, 503
      submit       the rows take their places                                                         503
    drain          no new rows; waiting rows are answered until a deadline, the rest is refused       503

`Queue` keeps the books: reservations, rows by tenant and task, and refusals. Where the rows wait is its subclass's:
in this process (`batcher.Batcher`), in the engine's (`rpc.engine_client.RemoteBatcher`), or in the processes of several
engines (`rpc.engine_pool.BalancedBatcher`). A full queue still admits a tenant or a task under its share, see
`fair_share`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

from server.errors import QueueFull, Unavailable
from server.observability import metrics

from .fair_share import NO_FLOW, NO_ROWS, FairShares, RowsByFlow, common_flow
from .row import Row
from .scheduler import FlowKey

log = logging.getLogger(__name__)

UNAVAILABLE_RETRY_S: Final = 5.0  # an engine that is being restarted is back by then, or another server is asked
LONGEST_RETRY_S: Final = 60.0
SWEEP_S: Final = 0.05  # between two sweeps for `require_room`, which must cost next to nothing


class Reservation:
    """Places in the queue that are kept for a request until its rows are ready."""

    def __init__(self, places: int, enter: Callable[[Sequence[Row]], None]) -> None:
        self.places = places
        self._enter = enter

    def submit(self, rows: Sequence[Row]) -> None:
        """Queue rows in the places kept for them. Raises Unavailable, and ValueError for more rows than places."""
        if len(rows) > self.places:
            raise ValueError(f"{self.places} places were reserved, {len(rows)} rows came")
        self.places -= len(rows)
        self._enter(rows)


class Queue(ABC):
    """The bounded queue before the engine. Belongs to one event loop; `clock` is the clock of deadlines.

    `max_queue`: the most rows that may ever wait; `max_batch`: the most rows of one forward.
    """

    def __init__(self, *, max_queue: int, max_batch: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_queue, self.max_batch, self.clock = max_queue, max_batch, clock
        self._shares = FairShares()
        self._reservations: set[Reservation] = set()
        self._reserved = 0  # places of these
        self._closing = False  # nothing new is admitted
        self._stopped = False  # nothing is queued any more, reserved or not
        self._draining: asyncio.Future[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    # --- what a request asks ------------------------------------------------------------------------------------------

    def require_room(self, in_flight: int, flow: FlowKey = NO_FLOW) -> None:
        """Refuse a request that certainly finds no place. Cheap: it is asked before a request's body is read.

        `in_flight`: requests on their way to the queue or back; they are bounded by what the queue could ever hold.
        Raises QueueFull. A queue that drains, or whose engine is away, says so in `reserve`.
        """
        if self._closing or self.trouble or self.under_share(flow):
            return
        if in_flight >= self.most_in_flight:
            raise self._full(f"{in_flight} requests are waiting or being answered")
        if self.free < 1:
            self._sweep(at_most_every_s=SWEEP_S)
        if self.free < 1:
            raise self._full(f"all {self.places} places of the queue are taken")

    @contextmanager
    def reserve(self, rows: int, flow: FlowKey = NO_FLOW) -> Iterator[Reservation]:
        """Keep places for rows whose images are still to be decoded. Places that stay unused are free afterwards.

        Raises QueueFull (with Retry-After), Unavailable (shutting_down, engine_unavailable). Rows whose places were
        reserved before a drain are served.
        """
        self._admit(rows, flow)
        reservation = Reservation(rows, partial(self._enter, flow))
        self._reservations.add(reservation)
        self._reserved += rows
        self._shares.take(flow, rows)
        self._idle.clear()
        try:
            yield reservation
        finally:
            self._reservations.remove(reservation)
            self._unreserve(flow, reservation.places)
            self._note_idle()

    def submit(self, rows: Sequence[Row]) -> None:
        """Queue all of these rows or none. Raises what `reserve` raises."""
        with self.reserve(len(rows), common_flow({row.flow for row in rows})) as reservation:
            reservation.submit(rows)

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing new, answer the waiting rows for at most `timeout_s`, refuse the rest (503 shutting_down).

        The first call decides; a later one waits for the same end.
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
            log.warning("%d rows were still waiting at shutdown", len(self))
        self._stopped = True
        await self._refuse_waiting()

    # --- the books ----------------------------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        """Places that are neither taken nor reserved; below 0 where rows wait in the reserve for the under-served."""
        return self.places - self._taken()

    @property
    def most_in_flight(self) -> int:
        """Requests that may be on their way to the queue or back."""
        return self.places + 2 * self.max_batch

    def under_share(self, flow: FlowKey, rows: int = 1) -> bool:
        """Whether a full queue admits so many rows of this flow all the same: see `FairShares.admits`."""
        taken, most, places = self._taken(), self.max_queue, self.places
        return self._shares.admits(flow, rows, taken=taken, most=most, places=places, beside=self.beside)

    def check_integrity(self) -> None:
        """Raise AssertionError where the books do not balance."""
        assert all(reservation.places >= 0 for reservation in self._reservations), "reserved places"
        assert self._reserved == sum(reservation.places for reservation in self._reservations), "sum of reserved places"
        self._shares.check_integrity(self._reserved + self._counted)

    def _admit(self, rows: int, flow: FlowKey) -> None:
        if self._closing:
            raise shutting_down()
        self._require_engine()
        if not self._fits(rows, flow):
            self._sweep()
        if not self._fits(rows, flow):
            taken = f"{self._taken()} of {self.places} places are taken"
            raise self._full(f"the queue has no room for {rows} more rows: {taken}", rows)

    def _fits(self, rows: int, flow: FlowKey) -> bool:
        """A request of many rows is admitted whenever a single row would be, else traffic of single rows starves it. It
        may exceed the adaptive limit, never `max_queue`."""
        if self.free >= 1 and self._taken() + rows <= self.max_queue:
            return True
        return self.under_share(flow, rows)

    def _enter(self, flow: FlowKey, rows: Sequence[Row]) -> None:
        self._unreserve(flow, len(rows))  # whatever becomes of the rows, they use up the places kept for them
        if self._stopped:
            raise shutting_down()
        self._require_engine()
        self._enqueue(rows)

    def _unreserve(self, flow: FlowKey, places: int) -> None:
        self._reserved -= places
        self._shares.give_back(flow, places)

    def _require_engine(self) -> None:
        if trouble := self.trouble:
            raise engine_unavailable(trouble)

    def _full(self, detail: str, rows: int = 1) -> QueueFull:
        metrics.ROWS.labels("refused").inc(rows)
        return QueueFull(detail, retry_after_s=self.retry_after_s())

    def retry_after_s(self) -> float:
        """Whole seconds until the waiting rows are answered, at the measured rate: at least 1, at most 60."""
        return float(min(LONGEST_RETRY_S, max(1, math.ceil(self._backlog_s()))))

    def _note_idle(self) -> None:
        if not self._reservations and self._at_rest():
            self._idle.set()

    # --- where the rows wait ------------------------------------------------------------------------------------------

    @abstractmethod
    def __len__(self) -> int:
        """Rows that wait."""

    @property
    @abstractmethod
    def places(self) -> int:
        """Rows that may wait now: at most `max_queue`, fewer while the engine is slow, see `queue_limit`."""

    @property
    @abstractmethod
    def trouble(self) -> str:
        """Why no rows are taken for the time being; "" when they are."""

    @property
    def beside(self) -> RowsByFlow:
        """Rows of other front ends in the same queue."""
        return NO_ROWS

    @abstractmethod
    async def run_exclusive(self, work: Any, pixels: Any, seat: Any) -> Any:
        """Run other work, such as attention maps, in the engine's thread between two batches.

        The caller has reserved a place. `work` takes pixels and a seat.
        """

    @abstractmethod
    def _taken(self) -> int:
        """Places that are taken or reserved."""

    @property
    @abstractmethod
    def _counted(self) -> int:
        """Rows in `_shares`, reservations aside."""

    @abstractmethod
    def _enqueue(self, rows: Sequence[Row]) -> None:
        """Queue rows whose places were reserved, and count each in `_shares`."""

    @abstractmethod
    def _backlog_s(self) -> float:
        """Seconds until the rows that wait are answered."""

    @abstractmethod
    def _at_rest(self) -> bool:
        """Whether no row waits or is being answered."""

    @abstractmethod
    async def _refuse_waiting(self) -> None:
        """The drain is over: refuse the rows that still wait (503 shutting_down)."""

    @abstractmethod
    def _sweep(self, *, at_most_every_s: float = 0.0) -> None:
        """Make room by dropping rows whose clients have left. `at_most_every_s`: skip it where it was done just now."""


def shutting_down() -> Unavailable:
    return Unavailable("the server is shutting down", code="shutting_down")


def engine_unavailable(detail: str) -> Unavailable:
    return Unavailable(detail, code="engine_unavailable", retry_after_s=UNAVAILABLE_RETRY_S)
