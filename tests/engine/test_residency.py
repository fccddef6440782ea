"""Loading once, pinning, evicting the least recently used, waiting for room, leaving when the last row is answered."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from server.engine.images.decode import Geometry
from server.engine.lens import Lens
from server.engine.rack import Rack
from server.engine.residency import Loaded, Residency
from server.errors import ServiceError, Unavailable

pytestmark = pytest.mark.anyio
DIM = 4


class Shelf:
    """A loader that counts, can be held back, and can fail."""

    def __init__(self) -> None:
        self.loads: Counter[str] = Counter()
        self.gate = threading.Event()
        self.gate.set()
        self.broken: set[str] = set()

    def load(self, task: str, version: str) -> Loaded:
        self.loads[task] += 1
        self.gate.wait(10)
        if task in self.broken:
            raise RuntimeError(f"{task} is broken")
        classes = 100 if task == "giant" else 4
        empty = (torch.empty(0, DIM),) * 2
        lens = Lens(empty, empty, torch.empty(0, DIM), torch.ones(classes, DIM), torch.zeros(classes))
        return Loaded(lens, ("a", "b"), Geometry(8, "bicubic", 1.0, "center"), (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def residency(shelf: Shelf) -> Iterator[Residency]:
    with ThreadPoolExecutor(2) as pool:
        yield Residency(Rack(dim=DIM, slots=3, vectors=12), shelf.load, pool)
        shelf.gate.set()


async def test_a_version_is_loaded_once_for_all_who_wait(residency: Residency, shelf: Shelf) -> None:
    shelf.gate.clear()
    waiting = [asyncio.create_task(residency.acquire("a", "1")) for _ in range(20)]
    await asyncio.sleep(0.05)
    shelf.gate.set()
    seats = await asyncio.gather(*waiting)
    assert shelf.loads == {"a": 1}
    assert len({seat.place for seat in seats}) == 1
    residency.check_integrity()


async def test_a_seat_that_is_given_to_others_counts_as_if_they_had_asked(shelf: Shelf) -> None:
    hits: list[tuple[str, int]] = []
    with ThreadPoolExecutor(2) as pool:
        rack = Rack(dim=DIM, slots=3, vectors=12)
        residency = Residency(rack, shelf.load, pool, on_hit=lambda task, times: hits.append((task, times)))
        seats = [await residency.acquire(name, "1") for name in "abc"]
        residency.count_shared_hits(seats[0], 5)
        residency.count_shared_hits(seats[1], 0)
        for seat in seats:
            residency.release(seat)
        await residency.load("d", "1")
        assert (hits, residency.counts.hits) == ([("a", 5)], 5)
        assert [residency.resident(name, "1") for name in "abcd"] == [True, False, True, True], "b is used least"
        gone = await residency.acquire("c", "1")
        leaving = asyncio.create_task(residency.unload("c", "1"))
        await asyncio.sleep(0)
        residency.count_shared_hits(gone, 2)
        residency.release(gone)
        assert await leaving
        assert residency.counts.hits == 8


async def test_the_least_recently_used_unpinned_lens_leaves(residency: Residency, shelf: Shelf) -> None:
    for name in "abc":
        await residency.load(name, "1")
    await residency.load("a", "1")
    await residency.load("d", "1")
    assert [residency.resident(name, "1") for name in "abcd"] == [True, False, True, True]
    assert residency.counts.evictions == 1
    residency.check_integrity()


async def test_a_pinned_seat_is_never_evicted_and_the_newcomer_waits(residency: Residency) -> None:
    seats = [await residency.acquire(name, "1") for name in "abc"]
    newcomer = asyncio.create_task(residency.acquire("d", "1"))
    await asyncio.sleep(0.05)
    assert not newcomer.done()
    residency.release(seats[1])
    await asyncio.wait_for(newcomer, 5)
    assert not residency.resident("b", "1")
    residency.check_integrity()


async def test_a_held_lens_stays_until_it_is_let_go(residency: Residency) -> None:
    for name in "abc":
        await residency.load(name, "1")
        assert await residency.pin(name, "1", True)
    waiting = asyncio.create_task(residency.acquire("d", "1"))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    assert await residency.pin("c", "1", False)
    await asyncio.wait_for(waiting, 5)
    assert residency.resident("a", "1")
    assert not await residency.pin("nobody", "1", True)


async def test_unload_waits_for_the_rows_and_frees_the_memory(residency: Residency) -> None:
    seat = await residency.acquire("a", "1")
    size = residency.lens_bytes("a", "1")
    assert size > 0
    leaving = asyncio.create_task(residency.unload("a", "1"))
    await asyncio.sleep(0.05)
    assert not leaving.done(), "a row still needs it"
    again = await residency.acquire("a", "1")
    assert again.place != seat.place, "whoever comes later loads anew"
    residency.release(seat)
    assert await asyncio.wait_for(leaving, 5)
    residency.release(again)
    assert await residency.unload("a", "1")
    assert not await residency.unload("a", "1")
    residency.check_integrity()
    assert residency._rack.used_slots == 0


async def test_an_unload_that_its_client_left_frees_the_memory_as_well(residency: Residency, shelf: Shelf) -> None:
    """Also while the version is still on its way."""
    shelf.gate.clear()
    loading = asyncio.create_task(residency.acquire("a", "1"))
    await asyncio.sleep(0.02)
    leaving = asyncio.create_task(residency.unload("a", "1"))
    await asyncio.sleep(0.02)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    shelf.gate.set()
    residency.release(await loading)
    assert residency._rack.used_slots == 0
    for name in "bcd":
        await asyncio.wait_for(residency.load(name, "1"), 5)
    residency.check_integrity()


async def test_a_lens_that_cannot_be_written_takes_no_place(
    residency: Residency, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(residency._rack, "write", full)
        for _ in range(5):
            with pytest.raises(RuntimeError):
                await residency.load("a", "1")
    assert residency._rack.used_slots == 0
    assert (await residency.acquire("a", "1")).task == "a"
    residency.check_integrity()


async def test_a_failed_load_tells_everybody_and_is_tried_again(residency: Residency, shelf: Shelf) -> None:
    shelf.broken.add("a")
    results = await asyncio.gather(*(residency.acquire("a", "1") for _ in range(3)), return_exceptions=True)
    assert [str(result) for result in results] == ["a is broken"] * 3
    shelf.broken.clear()
    assert (await residency.acquire("a", "1")).task == "a"
    assert shelf.loads["a"] == 2
    residency.check_integrity()


async def test_a_lens_larger_than_the_rack_is_refused_at_once(residency: Residency) -> None:
    with pytest.raises(Unavailable) as caught:
        await residency.acquire("giant", "1")
    assert isinstance(caught.value, ServiceError)
    assert caught.value.code == "rack_full"
    residency.check_integrity()


async def test_whoever_leaves_while_waiting_leaves_no_pin(residency: Residency, shelf: Shelf) -> None:
    shelf.gate.clear()
    waiting = asyncio.create_task(residency.acquire("a", "1"))
    await asyncio.sleep(0.02)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    ready = residency._entries["a", "1"].ready
    shelf.gate.set()
    await asyncio.wait([ready])  # it comes all the same
    for name in "bcd":
        await asyncio.wait_for(residency.load(name, "1"), 5)
    assert not residency.resident("a", "1"), "nobody needed it, so it was the first to leave"
    residency.check_integrity()


async def test_a_small_rack_under_a_crowd_serves_everybody(residency: Residency) -> None:
    """Ten tasks, three slots, fifty clients: no deadlock, no leak, every seat its own task's."""

    async def client(number: int) -> None:
        name = chr(ord("a") + number % 10)
        seat = await residency.acquire(name, "1")
        assert seat.task == name
        await asyncio.sleep(0.001 * (number % 3))
        residency.release(seat)

    await asyncio.wait_for(asyncio.gather(*(client(n) for n in range(50))), 20)
    residency.check_integrity()
