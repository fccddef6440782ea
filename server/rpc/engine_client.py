"""The RPC client: residency and queue of an engine in another process, with the interfaces of the local ones.

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

MOST_DETAILS: Final = 4096  # versions whose labels and geometry are remembered


class RemoteResidency:
    """Residency in the engine's process. What is read without waiting comes from the connection's `state`."""

    def __init__(self, connection: EngineConnection, engine: int = 0) -> None:
        self._connection, self._engine = connection, engine
        self._details: dict[Key, tuple[tuple[str, ...], Geometry]] = {}
        self._seats = SeatCache(lambda gone: connection.send(protocol.released(gone)), lambda: connection.epoch)

    async def acquire(self, task: str, version: str) -> RemoteSeat:
        """Raises what the loader raises, and Unavailable (engine_unavailable)."""
        key = task, version
        self._connection.require()
        if self.resident(*key) and (shared := self._seats.reuse(key)) is not None:
            return shared
        details = self._details.get(key)
        reply = await self._connection.call("acquire", task=task, version=version, details=details is not None)
        if details is None:
            details = self._remember(key, reply)
        seat = RemoteSeat(self._connection.epoch, reply["seat"], reply["place"], task, version, *details, self._engine)
        self._seats.add(key, seat)
        return seat

    def release(self, seat: RemoteSeat) -> None:
        self._seats.release(seat)

    async def load(self, task: str, version: str) -> None:
        await self._connection.call("load", task=task, version=version)

    async def unload(self, task: str, version: str) -> bool:
        self._seats.forget((task, version))
        return bool(await self._connection.call("unload", task=task, version=version))

    async def pin(self, task: str, version: str, on: bool) -> bool:
        return bool(await self._connection.call("pin", task=task, version=version, on=on))

    def resident(self, task: str, version: str) -> bool:
        return f"{task}@{version}" in self._connection.state.residents

    def pinned(self, task: str, version: str) -> bool:
        return bool(self._resident_state(task, version)[1])

    def lens_bytes(self, task: str, version: str) -> int:
        return int(self._resident_state(task, version)[0])

    def _resident_state(self, task: str, version: str) -> list[Any]:
        return self._connection.state.residents.get(f"{task}@{version}", [0, False])

    def _remember(self, key: Key, reply: dict[str, Any]) -> tuple[tuple[str, ...], Geometry]:
        geometry = reply["geometry"]
        details = tuple(reply["labels"]), Geometry(**{**geometry, "fill": tuple(geometry["fill"])})
        if len(self._details) >= MOST_DETAILS:
            self._details.clear()
        self._details[key] = details
        return details


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

    def __init__(self, connection: EngineConnection, writer: PixelWriter, *, max_batch: int, max_queue: int) -> None:
        super().__init__(max_queue=max_queue, max_batch=max_batch)
        self._connection, self._writer = connection, writer
        self._sent: dict[int, _SentRow] = {}
        self._numbers = count(1)
        self._waiting = 0  # rows sent and not answered
        connection.on_frame, connection.on_lost = self._receive, self._on_lost

    def __len__(self) -> int:
        return int(self._connection.state.facts.get("waiting", 0))

    @property
    def sent(self) -> int:
        """Rows of this front end that have not left the engine."""
        return len(self._sent)

    @property
    def places(self) -> int:
        return int(self._connection.state.facts.get("places", self.max_queue))

    @property
    def trouble(self) -> str:
        return self._connection.trouble

    @property
    def beside(self) -> RowsByFlow:
        rows: RowsByFlow = self._connection.state.facts.get("beside", NO_ROWS)
        return rows

    @property
    def others(self) -> int:
        """Rows of other front ends, as the engine reported last."""
        return sum(sum(tasks.values()) for tasks in self.beside.values())

    async def run_exclusive(self, work: Any, pixels: Any, seat: RemoteSeat) -> Any:
        """Run a `RemoteCall` in the engine's process."""
        self._connection.require()
        self._require_seat(seat)
        slot, form = self._put(pixels)
        call = asyncio.ensure_future(
            self._connection.call("aside", work=work.name, seat=seat.number, slot=slot, form=int(form))
        )
        call.add_done_callback(
            partial(self._exclusive_done, pixels)
        )  # its pixels stay until then, whether or not the caller still waits
        return work.read(await asyncio.shield(call))

    def check_integrity(self) -> None:
        super().check_integrity()
        assert self._waiting == sum(not sent.answered for sent in self._sent.values()), "rows that wait"
        assert bool(self._sent) or not self._writer.used, "slots without rows"

    # --- the queue, as admission sees it ------------------------------------------------------------------------------

    def _taken(self) -> int:
        """As far as this front end knows. Rows inside the forward take no place."""
        return max(0, self._reserved + self._waiting + self.others - self.max_batch)

    @property
    def _counted(self) -> int:
        return self._waiting

    def _backlog_s(self) -> float:
        return float(self._connection.state.facts.get("retry_after_s", 1.0))

    def _at_rest(self) -> bool:
        return not self._waiting

    def _sweep(self, *, at_most_every_s: float = 0.0) -> None:
        """The engine's process drops its rows itself."""

    async def _refuse_waiting(self) -> None:
        self._abandon_all(shutting_down())

    # --- rows on their way --------------------------------------------------------------------------------------------

    def _require_seat(self, seat: RemoteSeat | None) -> None:
        if seat is not None and seat.epoch != self._connection.epoch:
            raise engine_unavailable(AWAY)

    def _put(self, pixels: Any) -> tuple[int, protocol.Form]:
        try:
            return self._writer.put(pixels)
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
                self._writer.drop(row.image)
            raise
        self._waiting += len(rows)
        for row in rows:
            self._shares.take(row.flow, 1)
        sent = [self._as_sent(*one) for one in taken]
        for at in range(0, len(sent), protocol.MOST_ROWS):
            self._connection.send(protocol.submit(sent[at : at + protocol.MOST_ROWS]))

    def _as_sent(self, row: Row, slot: int, form: protocol.Form) -> SentRow:
        number = next(self._numbers)
        self._sent[number] = _SentRow(row)
        row.reply.add_done_callback(partial(self._withdrawn, number))
        seat = 0 if row.seat is None else row.seat.number
        return SentRow(number, seat, slot, form, row.deadline, row.arrived, row.tenant, request_id())

    def _withdrawn(self, number: int, reply: asyncio.Future[Any]) -> None:
        """The client has left: tell the engine that it need not answer."""
        sent = self._sent.get(number)
        if sent is not None and not sent.answered and reply.cancelled():
            self._answered(sent)
            self._connection.send(protocol.numbers(Kind.CANCEL, [number]))

    def _receive(self, frame: Frame) -> None:
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
            self._left(frame.number)

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

    def _left(self, number: int) -> None:
        row = self._sent.pop(number).row
        self._writer.drop(row.image)
        try:
            row.leave()
        except Exception:
            log.exception("a row of task %s could not let go of its seat", row.task)

    def _on_lost(self) -> None:
        self._abandon_all(engine_unavailable(AWAY))

    def _abandon_all(self, why: Unavailable) -> None:
        """Answer all rows under way with this error: the engine will not."""
        for number, sent in list(self._sent.items()):
            if not sent.answered:
                metrics.ROWS.labels("refused").inc()
            self._settle(sent, why)
            self._left(number)

    def _exclusive_done(self, pixels: Any, call: asyncio.Future[Any]) -> None:
        self._writer.drop(pixels)
        if not call.cancelled():
            call.exception()  # the caller has it already


def take_over_tasks(states: Sequence[EngineState]) -> None:
    """Take over the engines' choice of tasks with a metrics label of their own, since engines count the rows."""
    metrics.TASKS.adopt(sorted({task for state in states for task in state.facts.get("tasks", [])}))
