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
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from lensrack import wire
from server.batching.batcher import Reservation
from server.batching.fair_share import NO_FLOW
from server.batching.row import Row
from server.batching.scheduler import FlowKey
from server.errors import QueueFull, ServiceError, Unavailable
from server.observability import metrics

from .connection import AWAY, RETRY_S, EngineConnection
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
        raise Unavailable(self.trouble, code="engine_unavailable", retry_after_s=RETRY_S)

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
            raise Unavailable(AWAY, code="engine_unavailable", retry_after_s=RETRY_S)
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


class BalancedBatcher:
    """See `server.batching.batcher.Batcher`. There are as many queues as engines; a request is promised a place in some
    of them, and its rows get it where their seats are. Each engine has the last word."""

    def __init__(self, engines: EnginePool) -> None:
        self._engines = engines
        one = engines.all[0].batcher
        self.max_queue, self.clock = one.max_queue, one.clock  # of one queue: a request must fit into any
        self._kept = 0  # places promised
        self._open = 0  # requests that were promised some and have not ended
        self._closing = self._stopped = False
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return sum(len(one.batcher) for one in self._engines.up)

    @property
    def places(self) -> int:
        """Of all queues."""
        return sum(one.batcher.places for one in self._engines.up)

    @contextmanager
    def promise(self, rows: int, flow: FlowKey = NO_FLOW) -> Iterator[Reservation]:
        """Raises QueueFull, Unavailable (shutting_down, engine_unavailable)."""
        if self._closing:
            raise Unavailable("the server is shutting down", code="shutting_down")
        self._engines.require()
        if self._free() < 1 and not self._quiet(flow, rows):
            raise self._full(f"no queue has room for {rows} more rows", rows)
        room = Reservation(rows, self._enqueue)
        self._kept += rows
        self._open += 1
        self._idle.clear()
        try:
            yield room
        finally:
            self._kept -= room.places
            self._open -= 1
            if not self._open:
                self._idle.set()

    def submit(self, rows: Sequence[Row]) -> None:
        with self.promise(len(rows)) as room:
            room.submit(rows)

    def require_room(self, inside: int, flow: FlowKey = NO_FLOW) -> None:
        """Raises QueueFull."""
        up = self._engines.up
        if self._closing or not up or self._quiet(flow):
            return
        if inside >= sum(one.batcher.most_inside for one in up):
            raise self._full(f"{inside} requests are waiting or being answered")
        if self._free() < 1:
            raise self._full("all places of all queues are taken")

    async def aside(self, work: Any, pixels: Any, seat: RemoteSeat) -> Any:
        """Run a work of an engine's, which is a `Named` one."""
        return await self._engines.all[seat.engine].batcher.aside(work, pixels, seat)

    async def drain(self, timeout_s: float) -> None:
        """Take no new rows, answer the waiting ones for at most `timeout_s`, refuse the rest (503 shutting_down)."""
        self._closing = True
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        self._stopped = True
        await asyncio.gather(*(one.batcher.drain(0.0) for one in self._engines.all))

    def check_integrity(self) -> None:
        assert self._kept >= 0, "places kept"
        assert all(one.seats >= 0 for one in self._engines.all), "seats taken"
        for one in self._engines.all:
            one.batcher.check_integrity()

    # --- inside -----------------------------------------------------------------------------------------------------

    def _quiet(self, flow: FlowKey, rows: int = 1) -> bool:
        return any(one.batcher.quiet(flow, rows) for one in self._engines.up)

    def _free(self) -> int:
        return sum(max(0, one.batcher.free) for one in self._engines.up) - self._kept

    def _full(self, detail: str, rows: int = 1) -> QueueFull:
        metrics.ROWS.labels("refused").inc(rows)
        waits_s = (float(one.line.mirror.facts.get("retry_after_s", 1.0)) for one in self._engines.up)
        return QueueFull(detail, retry_after_s=float(min(60, max(1, math.ceil(min(waits_s, default=1.0))))))

    def _enqueue(self, rows: Sequence[Row]) -> None:
        """Rows of an ensemble may have seats at several engines. What one of them does not take is answered so."""
        self._kept -= len(rows)
        if self._stopped:
            raise Unavailable("the server is shutting down", code="shutting_down")
        for engine, own in self._by_engine(rows):
            try:
                engine.batcher.submit(own)
            except ServiceError as error:
                for row in own:
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
