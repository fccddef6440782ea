"""A front end's seats at an engine. Taking one is a way there and back; requests for the same task share one instead.

A seat on which nobody sits any more is kept for a moment, in case that the next request is for the same task. None is
shared for long, however much it is asked for: the engine evicts nobody who is seated, and another task may wait for the
place. What is not on the rack any more, as the engine told last, is not shared either.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from server.engine.images.decode import Geometry

Key = tuple[str, str]
KEPT_S: Final = 0.005  # a seat on which nobody sits, once to twice as long
SHARED_S: Final = 0.03  # since it was taken; then it goes back with the last who sit on it


@dataclass(frozen=True)
class RemoteSeat:
    """`number` is the engine's, for connection `epoch`; `slot` is its place on the rack; `engine`: which of several."""

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
    """`users` sit on it; it was taken `again` so many times without asking the engine, which counts them."""

    seat: RemoteSeat
    until: float
    users: int = 1
    again: int = 0


class SeatCache:
    """`give_back` gets seat numbers, each with how often it was taken again; `epoch` says which connection there is: to
    another one seats mean nothing. Belongs to one event loop."""

    def __init__(
        self,
        give_back: Callable[[Mapping[int, int]], None],
        epoch: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._give_back, self._epoch, self._clock = give_back, epoch, clock
        self._shared: dict[Key, _CachedSeat] = {}
        self._all: dict[int, _CachedSeat] = {}  # by the identity of the seat
        self._empty: dict[int, _CachedSeat] = {}
        self._empty_before: dict[int, _CachedSeat] = {}  # when it was looked last, and since
        self._look: asyncio.TimerHandle | None = None

    def again(self, key: Key) -> RemoteSeat | None:
        """One that somebody has, or has just had; to be left like any other."""
        taken = self._shared.get(key)
        if taken is None or taken.seat.epoch != self._epoch() or self._clock() > taken.until:
            return None
        taken.users += 1
        taken.again += 1
        self._empty.pop(id(taken.seat), None)
        self._empty_before.pop(id(taken.seat), None)
        return taken.seat

    def add(self, key: Key, seat: RemoteSeat) -> None:
        """It has been taken at the engine, by one who sits on it."""
        self.forget(key)
        self._shared[key] = self._all[id(seat)] = _CachedSeat(seat, self._clock() + SHARED_S)

    def leave(self, seat: RemoteSeat) -> None:
        taken = self._all[id(seat)]
        taken.users -= 1
        if taken.users:
            return
        if self._shared.get((seat.task, seat.version)) is taken and self._clock() <= taken.until:
            self._keep(taken)
        else:
            self._part([taken])

    def forget(self, key: Key) -> None:
        """Nobody new is to sit on it."""
        taken = self._shared.pop(key, None)
        if taken is not None and not taken.users:
            self._part([taken])

    def _keep(self, taken: _CachedSeat) -> None:
        self._empty[id(taken.seat)] = taken
        if self._look is None:
            self._look = asyncio.get_running_loop().call_later(KEPT_S, self._look_round)

    def _look_round(self) -> None:
        """Those on which nobody has sat since it was looked last go back, all at once."""
        self._look = None
        gone, self._empty_before, self._empty = self._empty_before, self._empty, {}
        self._part(list(gone.values()))
        if self._empty_before:
            self._look = asyncio.get_running_loop().call_later(KEPT_S, self._look_round)

    def _part(self, gone: Sequence[_CachedSeat]) -> None:
        for taken in gone:
            seat = taken.seat
            for known in (self._all, self._empty, self._empty_before):
                known.pop(id(seat), None)
            if self._shared.get((seat.task, seat.version)) is taken:
                del self._shared[seat.task, seat.version]
        if here := {one.seat.number: one.again for one in gone if one.seat.epoch == self._epoch()}:
            self._give_back(here)
