"""What an alias moves to is loaded where what it pointed at is on the rack; a real residency, a real store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from prompts_store import CachedStore, Store
from prompts_store.memory_store import MemoryStore
from server.engine.images.decode import Geometry
from server.engine.lens import Lens
from server.engine.rack import Rack
from server.engine.residency import Loaded, Residency
from server.serving.preloader import Preloader
from tests.serving.floor import bundle as drawn

pytestmark = pytest.mark.anyio
DIM = 4
SOON_S = 5.0


class Shelf:
    def __init__(self) -> None:
        self.loaded: list[tuple[str, str]] = []
        self.broken: set[str] = set()

    def load(self, task: str, version: str) -> Loaded:
        self.loaded.append((task, version))
        if version in self.broken:
            raise RuntimeError("broken")
        empty = (torch.empty(0, DIM),) * 2
        lens = Lens(empty, empty, torch.empty(0, DIM), torch.ones(2, DIM), torch.zeros(2))
        return Loaded(lens, ("a", "b"), Geometry(8, "bicubic", 1.0, "center"), (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def store() -> Iterator[Store]:
    own = CachedStore(MemoryStore())
    yield own
    own.close()


@pytest.fixture
async def residency(shelf: Shelf, store: Store) -> AsyncIterator[Residency]:
    with ThreadPoolExecutor(2) as pool:
        own = Residency(Rack(dim=DIM, slots=4, vectors=100), shelf.load, pool)
        succession = Preloader(store, own)
        succession.start()
        yield own
        await succession.stop()


def published(store: Store, seed: int, task: str = "fish", alias: str = "live") -> str:
    version = store.put(drawn(task, seed))
    store.set_alias(task, alias, version)
    return version


async def arrived(residency: Residency, version: str, task: str = "fish") -> None:
    async with asyncio.timeout(SOON_S):
        while not residency.resident(task, version):  # noqa: ASYNC110  # nobody would set an event
            await asyncio.sleep(0.01)


async def quiet(residency: Residency, store: Store) -> None:
    """Everything before this has been followed: another task's version has come."""
    first = published(store, 1, "last")
    await residency.load("last", first)
    await arrived(residency, published(store, 2, "last"), "last")


async def test_it_is_there_before_anybody_asks(residency: Residency, store: Store, shelf: Shelf) -> None:
    first = published(store, 1)
    await residency.load("fish", first)
    second = published(store, 2)
    await arrived(residency, second)
    assert shelf.loaded == [("fish", first), ("fish", second)]
    assert residency.resident("fish", first), "its rows may still be asked for"


async def test_nothing_is_loaded_for_a_task_that_nobody_asks(residency: Residency, store: Store, shelf: Shelf) -> None:
    for seed in (1, 2):
        published(store, seed)
    await quiet(residency, store)
    assert {task for task, _ in shelf.loaded} == {"last"}


async def test_another_alias_that_nobody_asks_for_brings_nothing(
    residency: Residency, store: Store, shelf: Shelf
) -> None:
    first = published(store, 1)
    await residency.load("fish", first)
    for seed in (3, 4):
        published(store, seed, alias="candidate")
    await quiet(residency, store)
    assert [one for one in shelf.loaded if one[0] == "fish"] == [("fish", first)]


async def test_a_canary_is_loaded_beside_what_it_is_compared_with(residency: Residency, store: Store) -> None:
    first, second = published(store, 1), store.put(drawn("fish", 2))
    await residency.load("fish", first)
    store.set_alias("fish", "live", {first: 0.9, second: 0.1})
    await arrived(residency, second)


async def test_what_somebody_unloads_stays_away_whatever_else_changes(residency: Residency, store: Store) -> None:
    await residency.load("fish", published(store, 1))
    second = published(store, 2)
    await arrived(residency, second)
    assert await residency.unload("fish", second)
    store.put(drawn("fish", 3))
    await quiet(residency, store)
    assert not residency.resident("fish", second)


async def test_one_that_cannot_be_loaded_stops_nothing(
    residency: Residency, store: Store, shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    await residency.load("fish", published(store, 1))
    shelf.broken.add(drawn("fish", 2).version)
    with caplog.at_level(logging.INFO, "server.serving.preloader"):
        published(store, 2)
        await quiet(residency, store)
    assert ["broken" in record.getMessage() for record in caplog.records] == [True]
    assert residency.resident("fish", drawn("fish", 1).version)
    await arrived(residency, published(store, 3))
