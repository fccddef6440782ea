"""A device that computes while the host goes on: the next batch is begun before the answers of the one before."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest

from server.batching.batcher import Batcher
from server.batching.row import Row
from server.errors import Internal, Unavailable
from tests.serving.floor import GEOMETRY, PlainEngine, Seat, logits, mean

pytestmark = pytest.mark.anyio


class Device(PlainEngine):
    """Beginning returns at once and has read the pixels; what waits for the answers stands at the `gate`."""

    ahead = True

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        self.begun = threading.Semaphore(0)
        self.unbegun: Callable[[np.ndarray], bool] = lambda image: False  # what it cannot even begin

    def begin(self, work: Sequence[tuple[np.ndarray, Seat]]) -> Callable[[], list[np.ndarray]]:
        own = [(image.copy(), seat) for image, seat in work]
        name = ",".join(str(mean(image)) for image, _ in own)
        if any(self.unbegun(image) for image, _ in own):
            raise MemoryError
        self.said.append(f"begin {name}")
        self.begun.release()

        def answers() -> list[np.ndarray]:
            found = self.run(own)
            self.said.append(f"finish {name}")
            return found

        return answers


@asynccontextmanager
async def batching(max_batch: int = 1, max_queue: int = 64) -> AsyncIterator[tuple[Batcher, Device]]:
    engine = Device()
    batcher = Batcher(engine, max_batch=max_batch, max_queue=max_queue)
    try:
        yield batcher, engine
    finally:
        engine.gate.set()
        await batcher.drain(20)
        batcher.check_integrity()


def row(batcher: Batcher, grey: int, left: list[Row] | None = None) -> Row:
    now, image = batcher.clock(), np.full((8, 8, 3), grey, np.uint8)
    seat = Seat(0, 1, "fish", "v", ("a", "b", "c"), GEOMETRY)
    new = Row("fish", "", seat, image, now + 60, now, asyncio.get_running_loop().create_future())
    if left is not None:
        new.leave = lambda: left.append(new)
    return new


async def under_way(engine: Device, batches: int) -> None:
    for _ in range(batches):
        assert await asyncio.to_thread(engine.begun.acquire, timeout=20)


async def test_the_next_batch_is_begun_before_the_one_before_is_waited_for():
    async with batching() as (batcher, engine):
        rows = [row(batcher, grey) for grey in range(4)]
        batcher.submit(rows)
        answers = await asyncio.gather(*(one.reply for one in rows))
    assert engine.said == [
        "begin 0", "begin 1", "finish 0", "begin 2", "finish 1", "begin 3", "finish 2", "finish 3",
    ]  # fmt: skip
    assert [int(found.argmax()) for found in answers] == [int(logits(one.image, one.seat).argmax()) for one in rows]
    assert len(engine.threads) == 1


async def test_never_more_than_one_is_ahead_and_a_lone_batch_waits_for_nobody():
    async with batching() as (batcher, engine):
        batcher.submit([alone := row(batcher, 7)])
        await alone.reply
        engine.gate.clear()
        batcher.submit([row(batcher, grey) for grey in range(5)])
        await under_way(engine, 3)  # the lone one, and two of these
        assert await asyncio.to_thread(engine.entered.wait, 20)
        assert len(batcher) == 3


async def test_what_comes_while_it_waits_is_not_lost():
    async with batching() as (batcher, engine):
        engine.gate.clear()
        batcher.submit([first := row(batcher, 1)])
        await under_way(engine, 1)
        batcher.submit([second := row(batcher, 2)])
        engine.gate.set()
        await asyncio.gather(first.reply, second.reply)


@pytest.mark.parametrize("where", ["begin", "finish"])
async def test_the_culprit_alone_gets_the_error_wherever_it_fails(where: str):
    async with batching(max_batch=4) as (batcher, engine):
        bad: Callable[[np.ndarray], bool] = lambda image: image[0, 0, 0] in (3, 9)  # noqa: E731
        engine.culprit = bad
        if where == "begin":
            engine.unbegun = bad
        left: list[Row] = []
        rows = [row(batcher, grey, left) for grey in range(12)]
        batcher.submit(rows)
        answers = await asyncio.gather(*(one.reply for one in rows), return_exceptions=True)
    assert [grey for grey, found in enumerate(answers) if isinstance(found, Internal)] == [3, 9]
    assert len(left) == len(set(map(id, left))) == 12


async def test_features_and_tasks_come_in_one_batch():
    async with batching(max_batch=4) as (batcher, _):
        rows = [row(batcher, grey) for grey in range(6)]
        for one in rows[::2]:
            one.seat, one.task = None, ""
        batcher.submit(rows)
        answers = await asyncio.gather(*(one.reply for one in rows))
    for grey, (one, found) in enumerate(zip(rows, answers, strict=True)):
        wanted = [grey, 1.0, 2.0] if one.seat is None else logits(one.image, one.seat)
        assert np.array_equal(found, wanted)


async def test_a_drain_that_runs_out_of_time_tells_both_batches():
    async with batching(max_batch=2) as (batcher, engine):
        left: list[Row] = []
        engine.gate.clear()
        rows = [row(batcher, grey, left) for grey in range(6)]
        batcher.submit(rows)
        await under_way(engine, 2)
        await batcher.drain(0.01)
        told = await asyncio.gather(*(one.reply for one in rows), return_exceptions=True)
        assert [type(one) for one in told] == [Unavailable] * 6
        assert len(left) == 6
        engine.gate.set()


async def test_suspended_rows_of_both_batches_keep_their_seats_until_the_engine_lets_go():
    async with batching(max_batch=2) as (batcher, engine):
        left: list[Row] = []
        engine.gate.clear()
        rows = [row(batcher, grey, left) for grey in range(6)]
        batcher.submit(rows)
        await under_way(engine, 2)
        batcher.suspend("it hangs")
        told = await asyncio.gather(*(one.reply for one in rows), return_exceptions=True)
        assert [type(one) for one in told] == [Unavailable] * 6
        assert left == rows[4:]
        engine.gate.set()
        batcher.resume()
        batcher.submit([after := row(batcher, 1)])
        await after.reply
        assert sorted(map(id, left)) == sorted(map(id, rows))


@pytest.mark.parametrize("seed", range(5))
async def test_whatever_comes_whenever_each_row_gets_its_own_answer_and_leaves_once(seed: int):
    chance, left, rows = random.Random(seed), [], []
    async with batching(max_batch=3, max_queue=400) as (batcher, engine):
        engine.culprit = lambda image: image[0, 0, 0] == 13
        engine.unbegun = lambda image: image[0, 0, 0] == 17
        for _ in range(60):
            some = [row(batcher, chance.randrange(20), left) for _ in range(chance.randint(1, 5))]
            batcher.submit(some)
            rows += some
            if chance.random() < 0.2:
                chance.choice(rows).reply.cancel()
            await asyncio.sleep(chance.choice((0, 0, 0.001)))
        answers = await asyncio.gather(*(one.reply for one in rows), return_exceptions=True)
    for one, found in zip(rows, answers, strict=True):
        grey = int(one.image[0, 0, 0])
        if isinstance(found, asyncio.CancelledError):
            continue
        assert isinstance(found, Internal) if grey == 13 else np.array_equal(found, logits(one.image, one.seat))
    assert sorted(map(id, left)) == sorted(map(id, rows))
