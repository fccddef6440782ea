"""Residency and batcher of an engine in another process, with the words of the ones that are here.

`Predictor`, routes and tenancy do not know which pair they have: `tests/rpc/test_front_ends.py` asks both the same.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Final

from server.batching.admission import Queue, engine_unavailable, shutting_down
from server.batching.fair_share import NO_ROWS, RowsByFlow
from server.batching.row import Row
from server.engine.images.decode import Geometry
from server.errors import Internal, ServiceError, Unavailable
from server.observability import metrics

from . import protocol
from .connection import AWAY, EngineConnection, EngineState, request_id
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
    """Work in the engine's process, by name: the argument of `RemoteBatcher.run_exclusive`. `read` turns the reply into
    what the work itself would have returned."""

    name: str
    read: Callable[[Any], Any]

    def __call__(self, pixels: Any, seat: Any) -> Any:
        raise TypeError(f"{self.name} is done in the engine's process")


@dataclass(eq=False)
class _SentRow:
    row: Row
    answered: bool = False


class RemoteBatcher(Queue):
    """The queue in the engine's process, as one front end sees it: its own rows, and a view of the rest.

    A full queue is refused here, without a call; the engine has the last word.
    """

    def __init__(self, line: EngineConnection, slots: PixelWriter, *, max_batch: int, max_queue: int) -> None:
        super().__init__(max_queue=max_queue, max_batch=max_batch)
        self._line, self._slots = line, slots
        self._sent: dict[int, _SentRow] = {}
        self._numbers = count(1)
        self._waiting = 0  # rows sent and not answered
        line.on_frame, line.on_lost = self._take, self._lost

    def __len__(self) -> int:
        return int(self._line.mirror.facts.get("waiting", 0))

    @property
    def sent(self) -> int:
        """Rows of this front end that have not left the engine."""
        return len(self._sent)

    @property
    def places(self) -> int:
        return int(self._line.mirror.facts.get("places", self.max_queue))

    @property
    def trouble(self) -> str:
        return self._line.trouble

    @property
    def beside(self) -> RowsByFlow:
        held: RowsByFlow = self._line.mirror.facts.get("beside", NO_ROWS)
        return held

    @property
    def others(self) -> int:
        """Rows of other front ends, as the engine reported last."""
        return sum(sum(tasks.values()) for tasks in self.beside.values())

    async def run_exclusive(self, work: Any, pixels: Any, seat: RemoteSeat) -> Any:
        """Run a `RemoteCall` in the engine's process."""
        self._line.require()
        self._require_seat(seat)
        slot, form = self._put(pixels)
        call = asyncio.ensure_future(
            self._line.call("aside", work=work.name, seat=seat.number, slot=slot, form=int(form))
        )
        call.add_done_callback(partial(self._exclusive_done, pixels))  # its pixels stay until then, whoever waits
        return work.read(await asyncio.shield(call))

    def check_integrity(self) -> None:
        super().check_integrity()
        assert self._waiting == sum(not sent.answered for sent in self._sent.values()), "rows that wait"
        assert bool(self._sent) or not self._slots.used, "slots without rows"

    # --- the queue, as admission sees it ------------------------------------------------------------------------------

    def _taken(self) -> int:
        """As far as this front end knows. Rows inside the forward take no place."""
        return max(0, self._reserved + self._waiting + self.others - self.max_batch)

    @property
    def _counted(self) -> int:
        return self._waiting

    def _backlog_s(self) -> float:
        return float(self._line.mirror.facts.get("retry_after_s", 1.0))

    def _at_rest(self) -> bool:
        return not self._waiting

    def _sweep(self, *, at_most_every_s: float = 0.0) -> None:
        """The engine's process drops its rows itself."""

    async def _refuse_waiting(self) -> None:
        self._let_go(shutting_down())

    # --- rows on their way --------------------------------------------------------------------------------------------

    def _require_seat(self, seat: RemoteSeat | None) -> None:
        if seat is not None and seat.epoch != self._line.epoch:
            raise engine_unavailable(AWAY)

    def _put(self, pixels: Any) -> tuple[int, protocol.Form]:
        try:
            return self._slots.put(pixels)
        except ValueError as error:
            log.error("pixels that no engine takes: %s", error)
            raise Internal("the engine could not answer this image", code="engine_failed") from None

    def _enqueue(self, rows: Sequence[Row]) -> None:
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
        self._let_go(engine_unavailable(AWAY))

    def _let_go(self, why: Unavailable) -> None:
        """Nothing that was sent will be answered."""
        for number, sent in list(self._sent.items()):
            if not sent.answered:
                metrics.ROWS.labels("refused").inc()
            self._settle(sent, why)
            self._leave(number)

    def _exclusive_done(self, pixels: Any, call: asyncio.Future[Any]) -> None:
        self._slots.drop(pixels)
        if not call.cancelled():
            call.exception()  # who asked has been told


def take_over_tasks(mirrors: Sequence[EngineState]) -> None:
    """The tasks that have a label of their own in the metrics are those of the engines, where rows are counted."""
    metrics.TASKS.adopt(sorted({task for mirror in mirrors for task in mirror.facts.get("tasks", [])}))
