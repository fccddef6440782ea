"""Residency and batcher of an engine in another process, with the words of the ones that are here.

`Predictor`, routes and tenancy do not know which pair they have: `tests/rpc/test_front_ends.py` asks both the same.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Final

from server.batching.batcher import Reservation
from server.batching.fair_share import NO_FLOW, NO_ROWS, FairShares, RowsByFlow, common_flow
from server.batching.row import Row
from server.batching.scheduler import FlowKey
from server.engine.images.decode import Geometry
from server.errors import Internal, QueueFull, ServiceError, Unavailable
from server.observability import metrics

from . import protocol
from .connection import AWAY, RETRY_S, EngineConnection, EngineState, request_id
from .protocol import Frame, Kind, SentRow
from .seat_cache import Key, RemoteSeat, SeatCache
from .shared_memory import PixelWriter

log = logging.getLogger(__name__)

MOST_FACTS: Final = 4096  # versions whose labels are remembered


class RemoteResidency:
    """See `server.engine.residency.Residency`. What is asked without waiting is answered from the mirror."""

    def __init__(self, line: EngineConnection, engine: int = 0) -> None:
        self._line, self._engine = line, engine
        self._facts: dict[Key, tuple[tuple[str, ...], Geometry]] = {}
        self._seats = SeatCache(lambda gone: line.send(protocol.released(gone)), lambda: line.epoch)

    async def acquire(self, task: str, version: str) -> RemoteSeat:
        """Raises what the loader raises, and Unavailable (engine_unavailable)."""
        key = task, version
        self._line.require()
        if self.resident(*key) and (shared := self._seats.again(key)) is not None:
            return shared
        known = self._facts.get(key)
        given = await self._line.call("acquire", task=task, version=version, known=known is not None)
        if known is None:
            known = self._learn(key, given)
        seat = RemoteSeat(self._line.epoch, given["seat"], given["place"], task, version, *known, self._engine)
        self._seats.add(key, seat)
        return seat

    def release(self, seat: RemoteSeat) -> None:
        self._seats.leave(seat)

    async def load(self, task: str, version: str) -> None:
        await self._line.call("load", task=task, version=version)

    async def unload(self, task: str, version: str) -> bool:
        self._seats.forget((task, version))
        return bool(await self._line.call("unload", task=task, version=version))

    async def pin(self, task: str, version: str, on: bool) -> bool:
        return bool(await self._line.call("pin", task=task, version=version, on=on))

    def resident(self, task: str, version: str) -> bool:
        return f"{task}@{version}" in self._line.mirror.residents

    def pinned(self, task: str, version: str) -> bool:
        return bool(self._told(task, version)[1])

    def lens_bytes(self, task: str, version: str) -> int:
        return int(self._told(task, version)[0])

    def _told(self, task: str, version: str) -> list[Any]:
        return self._line.mirror.residents.get(f"{task}@{version}", [0, False])

    def _learn(self, key: Key, given: dict[str, Any]) -> tuple[tuple[str, ...], Geometry]:
        geometry = given["geometry"]
        known = tuple(given["labels"]), Geometry(**{**geometry, "fill": tuple(geometry["fill"])})
        if len(self._facts) >= MOST_FACTS:
            self._facts.clear()
        self._facts[key] = known
        return known


@dataclass(frozen=True)
class RemoteCall:
    """A work of the engine's, by name: what `Predictor.aside` is given where the engine is elsewhere. `read` makes of
    the answer what the work itself would have given."""

    name: str
    read: Callable[[Any], Any]

    def __call__(self, pixels: Any, seat: Any) -> Any:
        raise TypeError(f"{self.name} is done in the engine's process")


@dataclass(eq=False)
class _SentRow:
    row: Row
    answered: bool = False


class RemoteBatcher:
    """See `server.batching.batcher.Batcher`. The queue is the engine's; here is what this front end has in it, and a
    view of the rest. So a full queue is told without asking, and the engine has the last word."""

    def __init__(self, line: EngineConnection, slots: PixelWriter, *, max_batch: int, max_queue: int) -> None:
        self.max_queue, self.clock = max_queue, time.monotonic
        self._line, self._slots, self._max_batch = line, slots, max_batch
        self._sent: dict[int, _SentRow] = {}
        self._numbers = count(1)
        self._kept = 0  # places promised
        self._shares = FairShares()  # of what this front end has there
        self._waiting = 0  # rows sent and not answered
        self._closing = self._stopped = False
        self._idle = asyncio.Event()
        self._idle.set()
        line.on_frame, line.on_lost = self._take, self._lost

    def __len__(self) -> int:
        return int(self._line.mirror.facts.get("waiting", 0))

    @property
    def sent(self) -> int:
        """Rows of this front end that have not left the engine."""
        return len(self._sent)

    @property
    def beside(self) -> RowsByFlow:
        """Rows of other front ends, as the engine told last."""
        held: RowsByFlow = self._line.mirror.facts.get("beside", NO_ROWS)
        return held

    @property
    def others(self) -> int:
        """How many these are."""
        return sum(sum(tasks.values()) for tasks in self.beside.values())

    @property
    def free(self) -> int:
        """Places that are not taken, as far as this front end knows."""
        return self.places - self._taken()

    @property
    def most_inside(self) -> int:
        """Requests that may be on their way to the queue or back."""
        return self.places + 2 * self._max_batch

    @property
    def places(self) -> int:
        """Rows that may wait as things are in the engine's process."""
        return int(self._line.mirror.facts.get("places", self.max_queue))

    @contextmanager
    def promise(self, rows: int, flow: FlowKey = NO_FLOW) -> Iterator[Reservation]:
        """Raises QueueFull, Unavailable (shutting_down, engine_unavailable)."""
        self._admit(rows, flow)
        room = Reservation(rows, partial(self._enqueue, flow))
        self._kept += rows
        self._shares.take(flow, rows)
        self._idle.clear()
        try:
            yield room
        finally:
            self._kept -= room.places
            self._shares.give_back(flow, room.places)
            self._note_idle()

    def submit(self, rows: Sequence[Row]) -> None:
        with self.promise(len(rows), common_flow({row.flow for row in rows})) as room:
            room.submit(rows)

    def require_room(self, inside: int, flow: FlowKey = NO_FLOW) -> None:
        """Raises QueueFull."""
        if self._closing or self._line.trouble or self.quiet(flow):
            return
        if inside >= self.most_inside:
            raise self._full(f"{inside} requests are waiting or being answered")
        if self.free < 1:
            raise self._full(f"all {self.places} places of the queue are taken")

    async def aside(self, work: Any, pixels: Any, seat: RemoteSeat) -> Any:
        """Run a work of the engine's, which is a `RemoteCall` one."""
        self._line.require()
        self._require_seat(seat)
        slot, form = self._put(pixels)
        call = asyncio.ensure_future(
            self._line.call("aside", work=work.name, seat=seat.number, slot=slot, form=int(form))
        )
        call.add_done_callback(partial(self._aside_done, pixels))  # its pixels stay until then, whoever waits
        return work.read(await asyncio.shield(call))

    async def drain(self, timeout_s: float) -> None:
        """Take no new rows, answer the waiting ones for at most `timeout_s`, refuse the rest (503 shutting_down)."""
        self._closing = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            log.warning("%d rows were still waiting at shutdown", self._waiting)
        self._stopped = True
        self._let_go(Unavailable("the server is shutting down", code="shutting_down"))

    def check_integrity(self) -> None:
        assert self._kept >= 0, "places kept"
        self._shares.check_integrity(self._kept + self._waiting)
        assert self._waiting == sum(not sent.answered for sent in self._sent.values()), "rows that wait"
        assert bool(self._sent) or not self._slots.used, "slots without rows"

    # --- inside -----------------------------------------------------------------------------------------------------

    def quiet(self, flow: FlowKey, rows: int = 1) -> bool:
        """Whether a full queue lets in so many rows of this flow, as far as this front end knows."""
        queue = {"taken": self._taken(), "most": self.max_queue, "places": self.places}
        return self._shares.admits(flow, rows, **queue, beside=self.beside)

    def _admit(self, rows: int, flow: FlowKey) -> None:
        if self._closing:
            raise Unavailable("the server is shutting down", code="shutting_down")
        self._line.require()
        if (self.free < 1 or self._taken() + rows > self.max_queue) and not self.quiet(flow, rows):
            raise self._full(f"the queue has no room for {rows} more rows: it has {self.places} places", rows)

    def _taken(self) -> int:
        """Places that are taken, as far as this front end knows. Rows inside the forward take none."""
        return max(0, self._kept + self._waiting + self.others - self._max_batch)

    def _full(self, detail: str, rows: int = 1) -> QueueFull:
        metrics.ROWS.labels("refused").inc(rows)
        wait_s = float(self._line.mirror.facts.get("retry_after_s", 1.0))
        return QueueFull(detail, retry_after_s=float(min(60, max(1, math.ceil(wait_s)))))

    def _require_seat(self, seat: RemoteSeat | None) -> None:
        if seat is not None and seat.epoch != self._line.epoch:
            raise Unavailable(AWAY, code="engine_unavailable", retry_after_s=RETRY_S)

    def _put(self, pixels: Any) -> tuple[int, protocol.Form]:
        try:
            return self._slots.put(pixels)
        except ValueError as error:
            log.error("pixels that no engine takes: %s", error)
            raise Internal("the engine could not answer this image", code="engine_failed") from None

    def _enqueue(self, flow: FlowKey, rows: Sequence[Row]) -> None:
        self._kept -= len(rows)
        self._shares.give_back(flow, len(rows))
        if self._stopped:
            raise Unavailable("the server is shutting down", code="shutting_down")
        self._line.require()
        for row in rows:
            self._require_seat(row.seat)
        taken: list[tuple[Row, int, protocol.Form]] = []
        try:
            for row in rows:
                taken.append((row, *self._put(row.image)))
        except BaseException:
            for row, _, _ in taken:
                self._slots.drop(row.image)
            raise
        self._waiting += len(rows)
        for row in rows:
            self._shares.take(row.flow, 1)
        sent = [self._packed(*one) for one in taken]
        for at in range(0, len(sent), protocol.MOST_ROWS):
            self._line.send(protocol.submit(sent[at : at + protocol.MOST_ROWS]))

    def _packed(self, row: Row, slot: int, form: protocol.Form) -> SentRow:
        number = next(self._numbers)
        self._sent[number] = _SentRow(row)
        row.reply.add_done_callback(partial(self._done, number))
        seat = 0 if row.seat is None else row.seat.number
        return SentRow(number, seat, slot, form, row.deadline, row.arrived, row.tenant, request_id())

    def _done(self, number: int, reply: asyncio.Future[Any]) -> None:
        """Whoever waited has left: the engine need not answer."""
        sent = self._sent.get(number)
        if sent is not None and not sent.answered and reply.cancelled():
            self._answered(sent)
            self._line.send(protocol.numbers(Kind.CANCEL, [number]))

    def _take(self, frame: Frame) -> None:
        """Raises ProtocolError."""
        sent = self._sent.get(frame.number)
        if sent is None:
            return
        left = True
        if frame.kind == Kind.ANSWER:
            reply = protocol.read_answer(frame.payload)
            sent.row.watch.queue_s, sent.row.watch.compute_s = reply.queue_s, reply.compute_s
            self._settle(sent, reply.outcome)
            left = reply.left
        if left:
            self._leave(frame.number)

    def _settle(self, sent: _SentRow, outcome: Any) -> None:
        self._answered(sent)
        if sent.row.reply.done():
            return
        if isinstance(outcome, ServiceError):
            sent.row.reply.set_exception(outcome)
        else:
            sent.row.reply.set_result(outcome)

    def _answered(self, sent: _SentRow) -> None:
        if not sent.answered:
            sent.answered = True
            self._waiting -= 1
            self._shares.give_back(sent.row.flow, 1)
            self._note_idle()

    def _leave(self, number: int) -> None:
        row = self._sent.pop(number).row
        self._slots.drop(row.image)
        try:
            row.leave()
        except Exception:
            log.exception("a row of task %s could not let go of its seat", row.task)

    def _lost(self) -> None:
        self._let_go(Unavailable(AWAY, code="engine_unavailable", retry_after_s=RETRY_S))

    def _let_go(self, why: Unavailable) -> None:
        """Nothing that was sent will be answered."""
        for number, sent in list(self._sent.items()):
            if not sent.answered:
                metrics.ROWS.labels("refused").inc()
            self._settle(sent, why)
            self._leave(number)

    def _aside_done(self, pixels: Any, call: asyncio.Future[Any]) -> None:
        self._slots.drop(pixels)
        if not call.cancelled():
            call.exception()  # who asked has been told

    def _note_idle(self) -> None:
        if not self._kept and not self._waiting:
            self._idle.set()


def take_over_tasks(mirrors: Sequence[EngineState]) -> None:
    """The tasks that have a label of their own in the metrics are those of the engines, where rows are counted."""
    metrics.TASKS.adopt(sorted({task for mirror in mirrors for task in mirror.facts.get("tasks", [])}))
