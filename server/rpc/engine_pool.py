"""Load balancing over several engines, each on its own device: one residency and one queue over all of them.

    a seat    ─► engines that are up ─► queue at most one batch longer than the shortest ─► where the lens is resident,
                 and of several such the least loaded; where it is resident nowhere, the engine that its name hashes to
    its rows  ─► the engine of their seat              rows without a seat (features) ─► the least loaded

So a task with little traffic is on one device, and the racks add up; a task with so much traffic that rows queue
spreads over devices. The home engine follows from the name alone (rendezvous hashing: Thaler and Ravishankar, 1998),
so front ends agree without talking to each other. An engine that is away gets no requests; only its own rows are
lost."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lensrack import wire
from server.batching.admission import Queue, engine_unavailable
from server.batching.row import Row
from server.batching.scheduler import FlowKey
from server.errors import ServiceError, Unavailable

from .connection import AWAY, EngineConnection
from .engine_client import RemoteBatcher, RemoteResidency
from .seat_cache import RemoteSeat

T = TypeVar("T")


@dataclass(eq=False)
class RemoteEngine:
    """One engine, as a front end knows it. `seats`: seats acquired there or about to be."""

    number: int
    device: str
    connection: EngineConnection
    residency: RemoteResidency
    batcher: RemoteBatcher
    seats: int = 0

    @property
    def load(self) -> int:
        """Rows that the engine has to answer, as far as known; a seat without rows yet counts as one row."""
        return max(self.seats, self.batcher.sent) + self.batcher.others


class EnginePool:
    """All engines, in the order of their devices."""

    def __init__(self, engines: Sequence[RemoteEngine], *, max_batch: int) -> None:
        self.all, self.max_batch = tuple(engines), max_batch

    @property
    def up(self) -> list[RemoteEngine]:
        return [engine for engine in self.all if not engine.connection.trouble]

    @property
    def troubles(self) -> list[str]:
        """What is wrong, for each engine that is away."""
        pairs = ((engine, engine.connection.trouble) for engine in self.all)
        return [f"engine {engine.number} ({engine.device}): {trouble}" for engine, trouble in pairs if trouble]

    @property
    def trouble(self) -> str:
        """Why no engine can be called now; "" when one can."""
        return "" if self.up else self.all[0].connection.trouble or AWAY

    def require(self) -> list[RemoteEngine]:
        """The engines that are up. Raises Unavailable (engine_unavailable)."""
        if up := self.up:
            return up
        raise engine_unavailable(self.trouble)

    def for_seat(self, task: str, version: str, among: Sequence[RemoteEngine]) -> RemoteEngine:
        def rank(engine: RemoteEngine) -> tuple[bool, int, bytes]:
            resident = engine.residency.resident(task, version)
            return not resident, engine.load if resident else 0, _home_hash(task, version, engine.number)

        return min(self._not_behind(among), key=rank)

    def for_features(self) -> RemoteEngine:
        return min(self._not_behind(self.require()), key=lambda engine: engine.load)

    def _not_behind(self, among: Sequence[RemoteEngine]) -> list[RemoteEngine]:
        """Engines with room whose load is at most one batch above the smallest."""
        with_room = [engine for engine in among if engine.batcher.free > 0] or among
        shortest = min(engine.load for engine in with_room)
        return [engine for engine in with_room if engine.load <= shortest + self.max_batch]

    async def each(self, ask: Callable[[RemoteEngine], Awaitable[T]]) -> list[T]:
        """The answers of the engines that are up; an engine that goes away meanwhile is left out. Raises what `ask`
        raises, and Unavailable where no engine answers."""
        answers = await asyncio.gather(*(ask(engine) for engine in self.require()), return_exceptions=True)
        values = []
        for answer in answers:
            if not isinstance(answer, BaseException):
                values.append(answer)
            elif not _is_away(answer):
                raise answer
        if not values:
            self.require()
            raise engine_unavailable(AWAY)
        return values

    async def rack(self) -> wire.Rack:
        """All racks as one, slots numbered consecutively."""

        async def view(engine: RemoteEngine) -> wire.Rack:
            return wire.Rack.model_validate(await engine.connection.call("view", name="rack"))

        racks = await self.each(view)
        return racks[0] if len(racks) == 1 else _merged_rack(racks)


class BalancedResidency:
    """Residency over all engines. A lens is loaded on one device; a pinned one on every device, so that no request for
    it waits for a load."""

    def __init__(self, engines: EnginePool) -> None:
        self._engines = engines

    async def acquire(self, task: str, version: str) -> RemoteSeat:
        """Raises what the loader raises, and Unavailable (engine_unavailable) where no engine is left to ask."""
        candidates = self._engines.require()
        while True:
            engine = self._engines.for_seat(task, version, candidates)
            try:
                return await _acquire(engine, task, version)
            except Unavailable as error:
                candidates = [other for other in candidates if other is not engine and not other.connection.trouble]
                if not candidates or not _is_away(error):
                    raise

    def release(self, seat: RemoteSeat) -> None:
        _release(self._engines.all[seat.engine], seat)

    async def load(self, task: str, version: str) -> None:
        self.release(await self.acquire(task, version))

    async def unload(self, task: str, version: str) -> bool:
        return any(await self._engines.each(lambda engine: engine.residency.unload(task, version)))

    async def pin(self, task: str, version: str, on: bool) -> bool:
        async def at(engine: RemoteEngine) -> bool:
            if not on:
                return await engine.residency.pin(task, version, on)
            seat = await _acquire(engine, task, version)  # while it is held, nothing can evict it
            try:
                return await engine.residency.pin(task, version, on)
            finally:
                _release(engine, seat)

        return any(await self._engines.each(at))

    def resident(self, task: str, version: str) -> bool:
        return any(engine.residency.resident(task, version) for engine in self._engines.up)

    def pinned(self, task: str, version: str) -> bool:
        return any(engine.residency.pinned(task, version) for engine in self._engines.up)

    def lens_bytes(self, task: str, version: str) -> int:
        """Bytes on all devices together."""
        return sum(engine.residency.lens_bytes(task, version) for engine in self._engines.up)


class BalancedBatcher(Queue):
    """The queues of several engines as one. A request reserves places in all of them together; its rows take places
    where their seats are, and each engine has the last word."""

    def __init__(self, engines: EnginePool) -> None:
        first = engines.all[0].batcher
        super().__init__(max_queue=first.max_queue, max_batch=first.max_batch, clock=first.clock)
        self._engines = engines  # `max_queue` is of one queue: a request must fit into any

    def __len__(self) -> int:
        return sum(len(engine.batcher) for engine in self._engines.up)

    @property
    def places(self) -> int:
        return sum(engine.batcher.places for engine in self._engines.up)

    @property
    def trouble(self) -> str:
        return self._engines.trouble

    @property
    def most_in_flight(self) -> int:
        return sum(engine.batcher.most_in_flight for engine in self._engines.up)

    def under_share(self, flow: FlowKey, rows: int = 1) -> bool:
        """Whether one of the queues admits so many rows of this flow although it is full."""
        return any(engine.batcher.under_share(flow, rows) for engine in self._engines.up)

    async def run_exclusive(self, work: Any, pixels: Any, seat: RemoteSeat) -> Any:
        """Run a `RemoteCall` in the process of the engine that the seat is on."""
        return await self._engines.all[seat.engine].batcher.run_exclusive(work, pixels, seat)

    def check_integrity(self) -> None:
        super().check_integrity()
        assert all(engine.seats >= 0 for engine in self._engines.all), "seats taken"
        for engine in self._engines.all:
            engine.batcher.check_integrity()

    # --- the queues, as admission sees them ---------------------------------------------------------------------------

    def _fits(self, rows: int, flow: FlowKey) -> bool:
        """Each queue checks the size of the request itself."""
        return self.free >= 1 or self.under_share(flow, rows)

    def _taken(self) -> int:
        return self._reserved + sum(engine.batcher.places - max(0, engine.batcher.free) for engine in self._engines.up)

    @property
    def _counted(self) -> int:
        return 0  # each engine's queue counts its rows

    def _backlog_s(self) -> float:
        return min((engine.batcher.retry_after_s() for engine in self._engines.up), default=1.0)

    def _at_rest(self) -> bool:
        return True  # a request holds its reservation until its rows are answered

    def _sweep(self, *, at_most_every_s: float = 0.0) -> None:
        """The engine's process drops its rows itself."""

    async def _refuse_waiting(self) -> None:
        await asyncio.gather(*(engine.batcher.drain(0.0) for engine in self._engines.all))

    def _enqueue(self, rows: Sequence[Row]) -> None:
        """Rows of an ensemble may have seats at several engines. An engine's refusal is the answer of its rows."""
        for engine, batch in self._by_engine(rows):
            try:
                engine.batcher.submit(batch)
            except ServiceError as error:
                for row in batch:
                    row.reply.set_exception(error)
                    row.leave()

    def _by_engine(self, rows: Sequence[Row]) -> list[tuple[RemoteEngine, list[Row]]]:
        batches: dict[RemoteEngine, list[Row]] = {}
        for row in rows:
            if row.seat is not None:
                batches.setdefault(self._engines.all[row.seat.engine], []).append(row)
        if features := [row for row in rows if row.seat is None]:
            batches.setdefault(self._engines.for_features(), []).extend(features)
        return list(batches.items())


async def _acquire(engine: RemoteEngine, task: str, version: str) -> RemoteSeat:
    engine.seats += 1
    try:
        return await engine.residency.acquire(task, version)
    except BaseException:
        engine.seats -= 1
        raise


def _release(engine: RemoteEngine, seat: RemoteSeat) -> None:
    engine.seats -= 1
    engine.residency.release(seat)


def _home_hash(task: str, version: str, engine: int) -> bytes:
    return hashlib.blake2b(f"{task}@{version}@{engine}".encode(), digest_size=8).digest()


def _is_away(error: BaseException) -> bool:
    return isinstance(error, Unavailable) and error.code == "engine_unavailable"


def _merged_rack(racks: Sequence[wire.Rack]) -> wire.Rack:
    seats, before = [], 0
    for rack in racks:
        seats += [seat.model_copy(update={"slot": before + seat.slot}) for seat in rack.seats]
        before += rack.slots
    counts = ("slots", "used_slots", "bytes", "used_bytes", "hits", "loads", "evictions")
    return wire.Rack(**{name: sum(getattr(rack, name) for rack in racks) for name in counts}, seats=seats)
