"""Several engines before one front end, each on a device of its own: a pair of residency and batcher over all of them.

    a seat    ─► engines that can be asked ─► no queue a batch longer than the shortest ─► where the lens is, and of
                 several the one with the least to do; where it is nowhere, where its name belongs
    its rows  ─► where their seat is              rows without one, features ─► the least to do

So what is asked a little is on one device, and each device's rack holds others; what is asked so much that rows gather
spreads. Where names belong follows from them alone (rendezvous hashing: Thaler and Ravishankar, 1998), so front ends
that do not talk to each other agree. An engine that is away is asked nothing, and what it had, it alone has lost.
"""

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
    """One of them, as a front end knows it. `seats`: those that it has taken there, or is about to."""

    number: int
    device: str
    line: EngineConnection
    residency: RemoteResidency
    batcher: RemoteBatcher
    seats: int = 0

    @property
    def load(self) -> int:
        """Rows that it has before it, as far as they are known; whoever has a seat is about to send some."""
        return max(self.seats, self.batcher.sent) + self.batcher.others


class EnginePool:
    """All of them, in the order of their devices."""

    def __init__(self, engines: Sequence[RemoteEngine], *, max_batch: int) -> None:
        self.all, self.max_batch = tuple(engines), max_batch

    @property
    def up(self) -> list[RemoteEngine]:
        return [one for one in self.all if not one.line.trouble]

    @property
    def troubles(self) -> list[str]:
        """What is wrong with those that cannot be asked."""
        told = ((one, one.line.trouble) for one in self.all)
        return [f"engine {one.number} ({one.device}): {trouble}" for one, trouble in told if trouble]

    @property
    def trouble(self) -> str:
        """Why nothing can be asked just now; "" when one of them can."""
        return "" if self.up else self.all[0].line.trouble or AWAY

    def require(self) -> list[RemoteEngine]:
        """Those that are up. Raises Unavailable (engine_unavailable)."""
        if up := self.up:
            return up
        raise engine_unavailable(self.trouble)

    def for_seat(self, task: str, version: str, among: Sequence[RemoteEngine]) -> RemoteEngine:
        def rank(one: RemoteEngine) -> tuple[bool, int, bytes]:
            resident = one.residency.resident(task, version)
            return not resident, one.load if resident else 0, _home_hash(task, version, one.number)

        return min(self._not_behind(among), key=rank)

    def for_features(self) -> RemoteEngine:
        return min(self._not_behind(self.require()), key=lambda one: one.load)

    def _not_behind(self, among: Sequence[RemoteEngine]) -> list[RemoteEngine]:
        """Those that have not more than a batch more before them than the one with the least, and room."""
        roomy = [one for one in among if one.batcher.free > 0] or among
        least = min(one.load for one in roomy)
        return [one for one in roomy if one.load <= least + self.max_batch]

    async def each(self, ask: Callable[[RemoteEngine], Awaitable[T]]) -> list[T]:
        """What those that are up answer; one that leaves meanwhile is left out. Raises what `ask` raises, and
        Unavailable where nobody answers."""
        answers = await asyncio.gather(*(ask(one) for one in self.require()), return_exceptions=True)
        given = []
        for answer in answers:
            if not isinstance(answer, BaseException):
                given.append(answer)
            elif not _has_left(answer):
                raise answer
        if not given:
            self.require()
            raise engine_unavailable(AWAY)
        return given

    async def rack(self) -> wire.Rack:
        """All racks as one: slots are numbered through."""

        async def view(one: RemoteEngine) -> wire.Rack:
            return wire.Rack.model_validate(await one.line.call("view", name="rack"))

        racks = await self.each(view)
        return racks[0] if len(racks) == 1 else _merged_rack(racks)


class BalancedResidency:
    """See `server.engine.residency.Residency`. A lens that is asked for is made resident on one device; one that is
    pinned, on every one, so that no question for it ever waits for a load."""

    def __init__(self, engines: EnginePool) -> None:
        self._engines = engines

    async def acquire(self, task: str, version: str) -> RemoteSeat:
        """Raises what the loader raises, and Unavailable (engine_unavailable) where no engine is left to ask."""
        left = self._engines.require()
        while True:
            engine = self._engines.for_seat(task, version, left)
            try:
                return await _seated(engine, task, version)
            except Unavailable as error:
                left = [one for one in left if one is not engine and not one.line.trouble]
                if not left or not _has_left(error):
                    raise

    def release(self, seat: RemoteSeat) -> None:
        _give_back(self._engines.all[seat.engine], seat)

    async def load(self, task: str, version: str) -> None:
        self.release(await self.acquire(task, version))

    async def unload(self, task: str, version: str) -> bool:
        return any(await self._engines.each(lambda one: one.residency.unload(task, version)))

    async def pin(self, task: str, version: str, on: bool) -> bool:
        async def at(one: RemoteEngine) -> bool:
            if not on:
                return await one.residency.pin(task, version, on)
            seat = await _seated(one, task, version)  # while it is held, nothing can evict it
            try:
                return await one.residency.pin(task, version, on)
            finally:
                _give_back(one, seat)

        return any(await self._engines.each(at))

    def resident(self, task: str, version: str) -> bool:
        return any(one.residency.resident(task, version) for one in self._engines.up)

    def pinned(self, task: str, version: str) -> bool:
        return any(one.residency.pinned(task, version) for one in self._engines.up)

    def lens_bytes(self, task: str, version: str) -> int:
        """On all devices."""
        return sum(one.residency.lens_bytes(task, version) for one in self._engines.up)


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
        found: dict[RemoteEngine, list[Row]] = {}
        for row in rows:
            if row.seat is not None:
                found.setdefault(self._engines.all[row.seat.engine], []).append(row)
        if features := [row for row in rows if row.seat is None]:
            found.setdefault(self._engines.for_features(), []).extend(features)
        return list(found.items())


async def _seated(engine: RemoteEngine, task: str, version: str) -> RemoteSeat:
    engine.seats += 1
    try:
        return await engine.residency.acquire(task, version)
    except BaseException:
        engine.seats -= 1
        raise


def _give_back(engine: RemoteEngine, seat: RemoteSeat) -> None:
    engine.seats -= 1
    engine.residency.release(seat)


def _home_hash(task: str, version: str, engine: int) -> bytes:
    return hashlib.blake2b(f"{task}@{version}@{engine}".encode(), digest_size=8).digest()


def _has_left(error: BaseException) -> bool:
    return isinstance(error, Unavailable) and error.code == "engine_unavailable"


def _merged_rack(racks: Sequence[wire.Rack]) -> wire.Rack:
    seats, before = [], 0
    for rack in racks:
        seats += [seat.model_copy(update={"slot": before + seat.slot}) for seat in rack.seats]
        before += rack.slots
    counts = ("slots", "used_slots", "bytes", "used_bytes", "hits", "loads", "evictions")
    return wire.Rack(**{name: sum(getattr(rack, name) for rack in racks) for name in counts}, seats=seats)
