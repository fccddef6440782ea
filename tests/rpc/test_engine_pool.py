"""One front end before two engines, over their real sockets: who is asked, and what is left when one of them goes.

That the pair answers as one engine's does is `tests/serving/test_predictor.py`'s, which asks all pairs the same.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prompts_store import VersionNotFound, open_store
from server.batching.row import Row
from server.errors import QueueFull, Unavailable
from server.rpc.engine_server import EngineServer
from server.serving.resolver import Ref
from server.settings import Settings
from tests.rpc.far_floor import LOOK, SeveralFront, server, settled, several
from tests.serving.floor import SIZE, Floor, png, publish

pytestmark = pytest.mark.anyio
TASKS = [f"task-{number}" for number in range(16)]


@dataclass(eq=False)
class Two:
    """Two engines that have one store, and a front end before them."""

    floors: list[Floor]
    servers: list[EngineServer]
    paths: list[Path]
    front: SeveralFront

    async def ask(self, task: str = "fish", grey: int = 7, count: int = 1) -> Any:
        images = [png(grey)] * count
        return await self.front.predictor.predict(Ref.parse_all(task), images, 1, key="k", tenant="", timeout_s=60.0)

    def asked(self, number: int) -> set[str]:
        """Tasks that an engine has computed rows of."""
        return {task for task, _ in self.floors[number].engine.rows}

    def home(self, version: str, task: str = "fish") -> int:
        """Where it is loaded when nobody is busy."""
        return self.front.engines.for_seat(task, version, self.front.engines.all).number

    async def closed(self, version: str) -> tuple[int, asyncio.Task[Any]]:
        """Where the version belongs, with a question inside that engine that it does not come to an end with."""
        number = self.home(version)
        self.floors[number].engine.gate.clear()
        asked = asyncio.create_task(self.ask())
        await asyncio.to_thread(self.floors[number].engine.entered.wait, 60)
        return number, asked

    async def leave(self, number: int) -> None:
        await self.servers[number].stop()
        await settled(lambda: self.front.engines.all[number].connection.trouble)

    async def come_back(self, number: int) -> None:
        self.servers[number] = EngineServer(self.paths[number], self.servers[number].backend)
        await self.servers[number].start()
        await settled(lambda: not self.front.engines.all[number].connection.trouble)


@asynccontextmanager
async def two(**changes: Any) -> AsyncIterator[Two]:
    store = open_store("memory://")
    floors = [Floor(store, **changes), Floor(store, **changes)]
    try:
        async with server(floors[0]) as (one, at), server(floors[1]) as (other, there):
            async with several(floors, [at, there]) as front:
                built = Two(floors, [one, other], [at, there], front)
                yield built
                for floor in floors:
                    floor.engine.gate.set()
                    await settled(lambda floor=floor: floor.shelf.in_use == 0)
            for opened in built.servers:
                await opened.stop()
    finally:
        for floor in floors:
            await floor.close()


# --- which devices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "devices", "engines", "workers"),
    [
        ("auto", "", ("auto",), "auto"),
        ("cuda:1", "", ("cuda:1",), "cuda:1"),
        ("auto", "cuda:2", ("cuda:2",), "cuda:2"),
        ("auto", "cuda:1, cuda:0", ("cuda:1", "cuda:0"), "cuda:1"),
        ("cpu", "cuda:0,cuda:1", ("cuda:0", "cuda:1"), "cpu"),
        ("auto", "cpu,cpu", ("cpu", "cpu"), "cpu"),
    ],
)
async def test_each_engine_has_a_device(device: str, devices: str, engines: tuple[str, ...], workers: str):
    told = Settings(device=device, devices=devices)
    assert (told.engine_devices, told.worker_device) == (engines, workers)


@pytest.mark.parametrize("devices", ["cpu,", ",", "cpu,cuda:0", "auto,auto", "cpu,,cpu"])
async def test_devices_of_several_kinds_or_none_are_refused(devices: str):
    """Another kind of device gives another last digit."""
    with pytest.raises(ValueError, match=f"LENSRACK_DEVICES: expected .* got {devices}$"):
        _ = Settings(devices=devices).engine_devices


# --- who is asked -----------------------------------------------------------------------------------------------------


async def test_tasks_are_shared_out_and_stay_where_they_are():
    """No lens is on two devices while one is enough, and each device has some."""
    async with two() as built:
        versions = {task: publish(built.floors[0].store, task) for task in TASKS}
        for _ in range(3):
            answers = [await built.ask(task) for task in TASKS]
            assert {answer.task: answer.version for answer in answers} == versions
        one, other = built.asked(0), built.asked(1)
        assert one, "with 16 tasks a device has none once in 65,536 times, and names are the same in each run"
        assert other
        assert one | other == set(TASKS)
        assert not one & other
        assert [len(floor.shelf.loads) for floor in built.floors] == [len(one), len(other)]


async def test_front_ends_agree_where_a_task_belongs():
    async with two() as built, several(built.floors, built.paths) as second:
        for task in TASKS:
            version = publish(built.floors[0].store, task)
            assert second.engines.for_seat(task, version, second.engines.all).number == built.home(version, task)


async def test_a_task_that_is_asked_much_spreads():
    """More than a batch behind at one engine: the other loads it, and from then on both answer."""
    async with two(max_batch=2) as built:
        version = publish(built.floors[0].store)
        home, first = await built.closed(version)
        waiting = [first, *(asyncio.create_task(built.ask(grey=grey)) for grey in range(8))]
        await settled(lambda: built.asked(1 - home))
        assert not built.asked(home), "it has not come to an end with anything"
        built.floors[home].engine.gate.set()
        answers = await asyncio.gather(*waiting)
        assert {answer.version for answer in answers} == {version}
        assert built.asked(home) == built.asked(1 - home) == {"fish"}


async def test_a_short_queue_does_not_make_it_load_elsewhere():
    async with two(max_batch=8) as built:
        home, first = await built.closed(publish(built.floors[0].store))
        waiting = [first, *(asyncio.create_task(built.ask()) for _ in range(7))]
        await settled(lambda: built.front.engines.all[home].batcher.sent == 8)
        built.floors[home].engine.gate.set()
        await asyncio.gather(*waiting)
        assert built.floors[1 - home].shelf.loads == []


async def test_one_request_may_have_seats_at_both():
    """Several tasks on one picture, an ensemble of versions, features, and a work beside predictions."""
    async with two() as built:
        store = built.floors[0].store
        versions = {task: publish(store, task) for task in TASKS[:8]}
        assert len({built.home(version, task) for task, version in versions.items()}) == 2
        answers = await built.front.predictor.predict_many(
            Ref.parse_each(versions), [png(6), png(7)], 1, key="k", tenant="", timeout_s=60.0
        )
        assert {task: answer.version for task, answer in answers.items()} == versions
        both = [publish(store, "fish", seed) for seed in range(8)]
        assert len({built.home(version) for version in both}) == 2
        together = await built.ask(f"fish@{'+'.join(both)}", count=2)
        assert together.versions == tuple(both)
        features = await built.front.predictor.embed([png(9)] * 3, tenant="", timeout_s=60.0)
        assert [vector[0] for vector in features.vectors] == [9, 9, 9]
        for task, version in versions.items():
            seen = await built.front.predictor.run_exclusive(Ref(task), png(9), LOOK, key="", tenant="", timeout_s=60)
            assert (seen[0], seen[2][0]) == (version, 9)


# --- one of them goes -------------------------------------------------------------------------------------------------


async def test_an_engine_that_leaves_takes_its_own_rows_alone():
    async with two(max_batch=8) as built:
        version = publish(built.floors[0].store)
        home, inside = await built.closed(version)
        other = next(task for task in TASKS if built.home(publish(built.floors[0].store, task), task) != home)
        await built.leave(home)
        with pytest.raises(Unavailable) as caught:
            await inside
        assert (caught.value.code, caught.value.retry_after_s) == ("engine_unavailable", 5.0)
        assert (await built.ask(other)).task == other
        assert (await built.ask()).version == version, "the one that lives answers for what was at the other"
        assert built.front.engines.trouble == ""
        assert [told.split(" (")[0] for told in built.front.engines.troubles] == [f"engine {home}"]
        assert built.front.predictor.quarantine.count() == 0, "nothing is known of the version itself"
        built.floors[home].engine.gate.set()
        await built.come_back(home)
        assert built.front.engines.troubles == []
        assert (await built.ask()).version == version


async def test_who_waits_for_a_seat_at_an_engine_that_leaves_gets_one_at_the_other():
    async with two() as built:
        version = publish(built.floors[0].store)
        home = built.home(version)
        async with built.floors[home].shelf.loading:
            asked = asyncio.create_task(built.ask())
            await settled(lambda: built.front.engines.all[home].connection._calls)
            await built.leave(home)
            assert (await asked).version == version
        assert built.asked(1 - home) == {"fish"}


async def test_seats_at_an_engine_that_has_left_are_void():
    async with two() as built:
        version = publish(built.floors[0].store)
        seat = await built.front.residency.acquire("fish", version)
        await built.leave(seat.engine)
        await built.come_back(seat.engine)
        new = await built.front.residency.acquire("fish", version)
        built.front.residency.release(seat)
        built.front.residency.release(new)


async def test_nobody_to_ask_is_told():
    async with two() as built:
        publish(built.floors[0].store)
        for number in (0, 1):
            await built.leave(number)
        assert built.front.engines.trouble
        for asking in (built.ask(), built.front.residency.pin("fish", "0" * 64, True), built.front.engines.rack()):
            with pytest.raises(Unavailable) as caught:
                await asking
            assert caught.value.code == "engine_unavailable"
        assert len(built.front.batcher) == 0


async def test_an_engine_that_hangs_is_not_asked():
    async with two() as built:
        version = publish(built.floors[0].store)
        home = built.home(version)
        built.floors[home].batcher.suspend("it hangs")
        await settled(lambda: built.front.engines.troubles)
        assert (await built.ask()).version == version
        assert built.asked(1 - home) == {"fish"}


async def test_what_cannot_be_loaded_is_told_whoever_was_asked():
    async with two() as built:
        publish(built.floors[0].store)
        for digit in "0123456789abcdef":
            with pytest.raises(VersionNotFound):
                await built.ask(f"fish@{digit * 64}")


# --- residency by hand ------------------------------------------------------------------------------------------------


async def test_a_pin_is_on_every_device_and_an_unload_from_every_one():
    async with two() as built:
        version = publish(built.floors[0].store)
        residency = built.front.residency
        await residency.load("fish", version)
        assert residency.lens_bytes("fish", version) == 1024, "asked for once, it is on one"
        assert await residency.pin("fish", version, True)
        assert [floor.shelf.held for floor in built.floors] == [{version}] * 2
        assert (residency.pinned("fish", version), residency.lens_bytes("fish", version)) == (True, 2048)
        assert await residency.pin("fish", version, False)
        assert [floor.shelf.held for floor in built.floors] == [set()] * 2
        assert await residency.unload("fish", version)
        assert not residency.resident("fish", version)
        assert [floor.shelf.seats for floor in built.floors] == [{}] * 2
        assert not await residency.unload("fish", version)


async def test_a_pin_is_on_those_that_are_there():
    async with two() as built:
        version = publish(built.floors[0].store)
        async with built.floors[0].shelf.loading:
            pinning = asyncio.create_task(built.front.residency.pin("fish", version, True))
            await settled(lambda: built.front.engines.all[0].connection._calls)
            await built.leave(0)
            assert await pinning
        assert built.floors[1].shelf.held == {version}
        assert built.front.residency.pinned("fish", version)


# --- the queues -------------------------------------------------------------------------------------------------------


async def test_a_full_queue_is_told_when_all_are():
    async with two(max_batch=1, max_queue=4) as built:
        publish(built.floors[0].store)
        for floor in built.floors:
            floor.engine.gate.clear()
        asked = []
        for _ in range(10):  # each inside an engine or in its queue
            asked.append(asyncio.create_task(built.ask()))
            await settled(lambda: sum(one.batcher.sent for one in built.front.engines.all) == len(asked))
        assert [one.batcher.sent for one in built.front.engines.all] == [5, 5]
        with pytest.raises(QueueFull) as caught:
            await built.ask()
        assert caught.value.retry_after_s >= 1
        with pytest.raises(QueueFull):
            built.front.batcher.require_room(0)
        await settled(lambda: len(built.front.batcher) == 8)
        for floor in built.floors:
            floor.engine.gate.set()
        assert len({(await answer).version for answer in asked}) == 1
        built.front.batcher.require_room(0)
        with pytest.raises(QueueFull):
            built.front.batcher.require_room(12)


async def test_rows_that_the_engines_queue_refuses_are_answered_and_their_seats_given_back():
    """Other front ends may have filled it in the same moment: the engine has the last word."""
    async with two(max_batch=1, max_queue=4) as built:
        version = publish(built.floors[0].store)
        home = built.home(version)
        built.floors[home].batcher.max_queue = 0
        refused = await asyncio.gather(*(built.ask() for _ in range(2)), return_exceptions=True)
        assert Counter(type(one).__name__ for one in refused)["QueueFull"] >= 1
        built.floors[home].batcher.max_queue = 4
        await settled(lambda: all(floor.shelf.in_use == 0 for floor in built.floors))
        assert (await built.ask()).version == version


async def test_rows_whose_engine_has_left_are_answered_and_let_go_of():
    async with two() as built:
        version = publish(built.floors[0].store)
        left: list[Row] = []
        with built.front.batcher.reserve(1) as backend:
            seat = await built.front.residency.acquire("fish", version)
            await built.leave(seat.engine)
            reply = asyncio.get_running_loop().create_future()
            picture = np.zeros((SIZE, SIZE, 3), np.uint8)
            row = Row("fish", "", seat, picture, deadline=1e9, arrived=0.0, reply=reply)
            row.leave = partial(left.append, row)
            backend.submit([row])
        assert left == [row]
        with pytest.raises(Unavailable):
            await reply
        built.front.residency.release(seat)


async def test_a_drain_answers_who_waits_or_tells_them():
    async with two(max_batch=1) as built:
        version = publish(built.floors[0].store)
        home, inside = await built.closed(version)
        draining = asyncio.create_task(built.front.batcher.drain(60))
        await settled(lambda: built.front.batcher._closing)
        with pytest.raises(Unavailable) as caught:
            await built.ask()
        assert caught.value.code == "shutting_down"
        built.floors[home].engine.gate.set()
        assert (await inside).version == version
        await draining


async def test_a_drain_does_not_wait_for_ever():
    async with two(max_batch=1) as built:
        _, inside = await built.closed(publish(built.floors[0].store))
        await built.front.batcher.drain(0.01)
        with pytest.raises(Unavailable) as caught:
            await inside
        assert caught.value.code == "shutting_down"
