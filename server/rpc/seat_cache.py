"""A front end's cache of seats at an engine: requests for the same version share a seat instead of calling for each.

A seat without users is kept for a moment, for the next request for the same version. No seat is shared for long,
however busy: the engine cannot evict a version whose seat is held, and another task may wait for its slot. A version
that is no longer resident, by the engine's last state, is not shared either."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from server.engine.images.decode import Geometry

Key = tuple[str, str]
UNUSED_S: Final = 0.005  # an unused seat is kept once to twice as long
SHARED_S: Final = 0.03  # from its acquisition; afterwards it is released with its last user


@dataclass(frozen=True)
class RemoteSeat:
    """A seat at an engine. `number`: the engine's name for it on connection `epoch`; `slot`: its rack slot; `engine`:
    which of several."""

    epoch: int
    number: int
    slot: int
    task: str
    version: str
    labels: tuple[str, ...]
    geometry: Geometry
    engine: int = 0


@dataclass(eq=False)
class _CachedSeat:
    """A seat with its users. `hits`: how often it was given out without a call, for the engine's hit count."""

    seat: RemoteSeat
    until: float
    users: int = 1
    hits: int = 0


class SeatCache:
    """Seats by version. `give_back` gets the numbers of released seats, each with its hits; `epoch` returns the current
    connection, on which alone a seat is valid. Belongs to one event loop."""

    def __init__(
        self,
        give_back: Callable[[Mapping[int, int]], None],
        epoch: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._give_back, self._epoch, self._clock = give_back, epoch, clock
        self._shared: dict[Key, _CachedSeat] = {}
        self._all: dict[int, _CachedSeat] = {}  # by the identity of the seat
        self._unused: dict[int, _CachedSeat] = {}
        self._unused_before: dict[int, _CachedSeat] = {}  # unused since before the last timer
        self._timer: asyncio.TimerHandle | None = None

    def reuse(self, key: Key) -> RemoteSeat | None:
        """A seat of this version that is in use or was just now; None where there is none. To be released like any
        other."""
        cached = self._shared.get(key)
        if cached is None or cached.seat.epoch != self._epoch() or self._clock() > cached.until:
            return None
        cached.users += 1
        cached.hits += 1
        self._unused.pop(id(cached.seat), None)
        self._unused_before.pop(id(cached.seat), None)
        return cached.seat

    def add(self, key: Key, seat: RemoteSeat) -> None:
        """Cache a seat that was just acquired, with one user."""
        self.forget(key)
        self._shared[key] = self._all[id(seat)] = _CachedSeat(seat, self._clock() + SHARED_S)

    def release(self, seat: RemoteSeat) -> None:
        cached = self._all[id(seat)]
        cached.users -= 1
        if cached.users:
            return
        if self._shared.get((seat.task, seat.version)) is cached and self._clock() <= cached.until:
            self._keep(cached)
        else:
            self._release([cached])

    def forget(self, key: Key) -> None:
        """Share this version's seat no longer."""
        cached = self._shared.pop(key, None)
        if cached is not None and not cached.users:
            self._release([cached])

    def _keep(self, cached: _CachedSeat) -> None:
        self._unused[id(cached.seat)] = cached
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(UNUSED_S, self._release_unused)

    def _release_unused(self) -> None:
        """Release, in one call, the seats that were unused for a whole period."""
        self._timer = None
        expired, self._unused_before, self._unused = self._unused_before, self._unused, {}
        self._release(list(expired.values()))
        if self._unused_before:
            self._timer = asyncio.get_running_loop().call_later(UNUSED_S, self._release_unused)

    def _release(self, expired: Sequence[_CachedSeat]) -> None:
        for cached in expired:
            seat = cached.seat
            for table in (self._all, self._unused, self._unused_before):
                table.pop(id(seat), None)
            if self._shared.get((seat.task, seat.version)) is cached:
                del self._shared[seat.task, seat.version]
        if counts := {cached.seat.number: cached.hits for cached in expired if cached.seat.epoch == self._epoch()}:
            self._give_back(counts)
