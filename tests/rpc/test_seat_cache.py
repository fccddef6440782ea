"""Seats of a front end: shared while somebody has them and a moment longer, given back once, never under anybody."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Mapping

import pytest

from server.engine.images.decode import Geometry
from server.rpc.seat_cache import SHARED_S, UNUSED_S, RemoteSeat, SeatCache
from tests.rpc.far_floor import settled

pytestmark = pytest.mark.anyio

FISH = ("fish", "1")
GEOMETRY = Geometry(8, "bicubic", 1.0, "center")


class Desk:
    """What a front end has before it: the engine's numbers, what comes back, a clock and a connection."""

    def __init__(self) -> None:
        self.now, self.epoch, self._numbers = 0.0, 1, itertools.count(1)
        self.back: dict[int, int] = {}
        self.seats = SeatCache(self._give_back, lambda: self.epoch, lambda: self.now)

    def _give_back(self, gone: Mapping[int, int]) -> None:
        assert gone
        assert not self.back.keys() & gone.keys(), "given back twice"
        self.back.update(gone)

    def take(self, key: tuple[str, str] = FISH) -> RemoteSeat:
        """At the engine, whether there is one to share or not."""
        seat = RemoteSeat(self.epoch, next(self._numbers), 0, *key, ("a",), GEOMETRY)
        self.seats.add(key, seat)
        return seat


async def test_who_comes_while_somebody_sits_there_gets_the_same_seat():
    desk = Desk()
    seat = desk.take()
    assert desk.seats.reuse(FISH) is seat
    assert desk.seats.reuse(("fish", "2")) is None
    desk.seats.release(seat)
    await asyncio.sleep(3 * UNUSED_S)
    assert desk.back == {}, "somebody sits on it"
    desk.seats.release(seat)
    assert desk.back == {}
    await settled(lambda: desk.back == {seat.number: 1})
    assert desk.seats.reuse(FISH) is None


async def test_who_comes_soon_after_gets_it_too_and_it_is_given_back_once():
    desk = Desk()
    seat = desk.take()
    for _ in range(5):
        desk.seats.release(seat)
        assert desk.seats.reuse(FISH) is seat
    await asyncio.sleep(3 * UNUSED_S)
    assert desk.back == {}
    desk.seats.release(seat)
    await settled(lambda: desk.back == {seat.number: 5})


async def test_none_is_shared_for_long():
    desk = Desk()
    seat = desk.take()
    assert desk.seats.reuse(FISH) is seat
    desk.now += 1.01 * SHARED_S
    assert desk.seats.reuse(FISH) is None
    desk.seats.release(seat)
    desk.seats.release(seat)
    assert desk.back == {seat.number: 1}, "at once: somebody may wait for its place"


async def test_a_seat_that_is_taken_anew_takes_the_place_of_the_one_before():
    desk = Desk()
    old, new = desk.take(), desk.take()
    assert desk.seats.reuse(FISH) is new
    desk.seats.release(old)
    assert desk.back == {old.number: 0}
    desk.seats.release(new)
    desk.seats.release(new)
    newest = desk.take()
    assert desk.back == {old.number: 0, new.number: 1}, "nobody sat on it"
    desk.seats.release(newest)
    await settled(lambda: newest.number in desk.back)


async def test_what_is_to_leave_the_rack_is_not_kept():
    desk = Desk()
    empty = desk.take()
    desk.seats.release(empty)
    desk.seats.forget(FISH)
    assert desk.back == {empty.number: 0}
    taken = desk.take()
    desk.seats.forget(FISH)
    assert desk.seats.reuse(FISH) is None
    assert taken.number not in desk.back
    desk.seats.release(taken)
    assert taken.number in desk.back


async def test_seats_of_a_connection_that_is_gone_are_neither_shared_nor_given_back():
    desk = Desk()
    sat_on, empty = desk.take(), desk.take(("cat", "1"))
    desk.seats.release(empty)
    desk.epoch += 1
    assert desk.seats.reuse(FISH) is None
    assert desk.seats.reuse(("cat", "1")) is None
    desk.seats.release(sat_on)
    await asyncio.sleep(3 * UNUSED_S)
    assert desk.back == {}
    assert not desk.seats._all
    assert not desk.seats._shared


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_happens_each_goes_back_once_and_never_under_anybody(seed: int):
    desk, drawn = Desk(), random.Random(seed)
    sitting: list[RemoteSeat] = []
    taken, shared = 0, 0
    for _ in range(300):
        desk.now += drawn.choice((0, 0, SHARED_S / 3))
        key = drawn.choice((FISH, ("cat", "1"), ("dog", "1")))
        match drawn.choice("ttttlllllfs"):
            case "t":
                seat = desk.seats.reuse(key)
                shared, taken = shared + (seat is not None), taken + (seat is None)
                sitting.append(seat or desk.take(key))
            case "l" if sitting:
                desk.seats.release(sitting.pop(drawn.randrange(len(sitting))))
            case "f":
                desk.seats.forget(key)
            case "s":
                await asyncio.sleep(drawn.choice((0, UNUSED_S, 2 * UNUSED_S)))
        assert not desk.back.keys() & {seat.number for seat in sitting}
    for seat in sitting:
        desk.seats.release(seat)
    await settled(lambda: len(desk.back) == taken)
    assert sum(desk.back.values()) == shared > 0
    assert not desk.seats._all
    assert not desk.seats._shared
