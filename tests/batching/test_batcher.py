"""The queue between the loop and the engine's thread: who is answered, with what, and who is let go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from server.batching.batcher import Batcher
from server.batching.row import Row
from server.errors import BadRequest, DeadlineExceeded, Internal, QueueFull, ServiceError, Unavailable
from server.observability import metrics
from tests.serving.floor import GEOMETRY, PlainEngine, Seat, logits

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def batching(
    max_batch: int = 4, max_queue: int = 16, wait_s: float = 0.0
) -> AsyncIterator[tuple[Batcher, PlainEngine]]:
    engine = PlainEngine()
    batcher = Batcher(engine, max_batch=max_batch, max_queue=max_queue, wait_s=wait_s)
    try:
        yield batcher, engine
        batcher.check_integrity()
    finally:
        engine.gate.set()
        await batcher.drain(5)


def row(
    batcher: Batcher,
    grey: int,
    task: str = "fish",
    timeout_s: float = 20.0,
    *,
    left: list | None = None,
    tenant: str = "",
) -> Row:
    image = np.full((8, 8, 3), grey, np.uint8)
    now = batcher.clock()
    new = Row(
        task, tenant, Seat(0, 1, task, "v", ("a", "b", "c"), GEOMETRY), image, now + timeout_s, now,
        asyncio.get_running_loop().create_future(),
    )  # fmt: skip
    if left is not None:
        new.leave = lambda: left.append(new)
    return new


async def busy(engine: PlainEngine) -> None:
    """Wait until a forward is under way."""
    await asyncio.to_thread(engine.entered.wait, 10)
    engine.entered.clear()


def count(outcome: str) -> float:
    return metrics.REGISTRY.get_sample_value("lensrack_rows_total", {"outcome": outcome}) or 0.0


async def test_every_row_gets_its_own_answer():
    async with batching() as (batcher, engine):
        rows = [row(batcher, grey) for grey in range(10)]
        batcher.submit(rows)
        answers = await asyncio.gather(*(each.reply for each in rows))
        for each, answer in zip(rows, answers, strict=True):
            np.testing.assert_array_equal(answer, logits(each.image, each.seat))
        assert [len(batch) for batch in engine.batches] == [4, 4, 2]
        assert len(engine.threads) == 1


async def test_a_target_out_of_reach_makes_batches_small():
    engine = PlainEngine()
    batcher = Batcher(engine, max_batch=4, max_queue=64, target_s=1e-6)
    try:
        for _ in range(20):
            rows = [row(batcher, grey) for grey in range(8)]
            batcher.submit(rows)
            await asyncio.gather(*(each.reply for each in rows))
        assert len(engine.batches[0]) == 4
        assert {len(batch) for batch in engine.batches[-3:]} <= {1, 2}
        assert metrics.REGISTRY.get_sample_value("lensrack_batch_limit_rows") in (1, 2)
    finally:
        await batcher.drain(5)


async def test_rows_gather_while_the_engine_is_busy_and_it_never_waits_for_more():
    async with batching(max_batch=8) as (batcher, engine):
        engine.gate.clear()
        first = row(batcher, 0)
        batcher.submit([first])
        await busy(engine)
        rest = [row(batcher, grey) for grey in range(1, 6)]
        for each in rest:
            batcher.submit([each])
            await asyncio.sleep(0)
        engine.gate.set()
        await asyncio.gather(first.reply, *(each.reply for each in rest))
        assert [len(batch) for batch in engine.batches] == [1, 5]


async def test_stopwatches_tell_waiting_from_computing():
    async with batching() as (batcher, engine):
        engine.gate.clear()
        first, second = row(batcher, 0), row(batcher, 1)
        batcher.submit([first])
        await busy(engine)
        batcher.submit([second])
        await asyncio.sleep(0.05)
        engine.gate.set()
        await asyncio.gather(first.reply, second.reply)
        assert first.watch.compute_s >= 0.05 > first.watch.queue_s
        assert second.watch.queue_s >= 0.05


async def test_a_full_queue_refuses_all_of_a_request_and_says_when_to_come_back():
    async with batching(max_batch=2, max_queue=4) as (batcher, engine):
        batcher.submit([warm := row(batcher, 0)])
        await warm.reply
        engine.gate.clear()
        engine.entered.clear()
        batcher.submit([row(batcher, 0), row(batcher, 1)])
        await busy(engine)
        batcher.submit([row(batcher, 0) for _ in range(3)])
        with pytest.raises(QueueFull, match="no room for 2 more rows: 3 of 4") as caught:
            batcher.submit([row(batcher, 0), row(batcher, 1)])
        assert len(batcher) == 3
        assert caught.value.code == "queue_full"
        assert 1 <= caught.value.retry_after_s <= 60
        batcher.submit([row(batcher, 0)])


async def test_as_many_may_wait_as_are_worked_off_in_time_but_two_full_batches_always():
    async with batching(max_batch=1, max_queue=60, wait_s=0.001) as (batcher, engine):
        assert batcher.places == 60  # nothing is known yet
        engine.gate.clear()
        batcher.submit([first := row(batcher, 0)])
        await asyncio.sleep(0.2)  # far more than a millisecond a row
        engine.gate.set()
        await first.reply
        assert batcher.places == 2
        engine.gate.clear()
        engine.entered.clear()
        batcher.submit([row(batcher, 0)])
        await busy(engine)
        batcher.submit([row(batcher, 0), row(batcher, 1)])
        with pytest.raises(QueueFull, match="no room for 1 more rows: 2 of 2"):
            batcher.submit([row(batcher, 0)])
        with pytest.raises(QueueFull, match="all 2 places"):
            batcher.require_room(0)


async def test_a_request_longer_than_the_bound_in_time_is_let_in_where_a_single_row_is():
    async with batching(max_batch=1, max_queue=6, wait_s=0.001) as (batcher, engine):
        engine.gate.clear()
        batcher.submit([first := row(batcher, 0)])
        await asyncio.sleep(0.2)
        engine.gate.set()
        await first.reply
        engine.gate.clear()
        engine.entered.clear()
        batcher.submit([row(batcher, 0)])
        await busy(engine)
        batcher.submit([row(batcher, 0)])
        with pytest.raises(QueueFull):
            batcher.submit([row(batcher, 0)] * 6)  # beyond max_queue
        batcher.submit([row(batcher, 0) for _ in range(5)])
        assert len(batcher) == 6


async def test_a_full_queue_of_one_tenants_still_lets_another_in_up_to_its_share():
    async with batching(max_batch=1, max_queue=8) as (batcher, engine):
        engine.gate.clear()
        batcher.submit([row(batcher, 0, tenant="loud")])
        await busy(engine)
        batcher.submit([row(batcher, 0, tenant="loud") for _ in range(8)])
        with pytest.raises(QueueFull):
            batcher.submit([row(batcher, 0, tenant="loud")])
        batcher.require_room(1000, ("quiet", ""))
        with pytest.raises(QueueFull):
            batcher.require_room(1, ("loud", ""))
        batcher.submit([first := row(batcher, 0, tenant="quiet")])
        batcher.submit([row(batcher, 0, tenant="quiet")])
        with pytest.raises(QueueFull):
            batcher.submit([row(batcher, 0, tenant="quiet")])  # memory is for a quarter more, whose ever it is
        assert len(batcher) == 10
        batcher.check_integrity()
        engine.gate.set()
        await first.reply
        assert len(batcher) >= 6, "its turn came before those of who had been there before"


async def test_a_full_queue_of_one_tasks_still_lets_the_tenants_others_in():
    async with batching(max_batch=1, max_queue=8) as (batcher, engine):
        engine.gate.clear()
        batcher.submit([row(batcher, 0, "loud")])
        await busy(engine)
        batcher.submit([row(batcher, 0, "loud") for _ in range(8)])
        for task in ("loud", ""):
            with pytest.raises(QueueFull):
                batcher.submit([row(batcher, 0, task)])
            with pytest.raises(QueueFull):
                batcher.require_room(1, ("", task))
        batcher.require_room(1000, ("", "quiet"))
        batcher.submit([first := row(batcher, 0, "quiet")])
        with pytest.raises(QueueFull):
            batcher.submit([row(batcher, 0, "third")])  # an eighth more, whose ever it is
        batcher.submit([row(batcher, 0, "fish", tenant="quiet")])  # and the rest of the quarter is other tenants'
        assert len(batcher) == 10
        batcher.check_integrity()
        engine.gate.set()
        await first.reply
        assert len(batcher) >= 6, "its turn came before those of who had been there before"


async def test_a_metric_that_fails_costs_nobody_an_answer(monkeypatch: pytest.MonkeyPatch):
    def broken(task: str) -> str:
        raise ValueError(task)

    async with batching() as (batcher, _):
        monkeypatch.setattr(metrics.TASKS, "count", broken)
        left: list[Row] = []
        rows = [row(batcher, grey, left=left) for grey in range(5)]
        batcher.submit(rows)
        assert [int(answer.argmax()) for answer in await asyncio.gather(*(one.reply for one in rows))]
        assert len(left) == 5


async def test_retry_after_follows_the_measured_rate():
    async with batching(max_batch=1, max_queue=60) as (batcher, engine):
        engine.gate.clear()
        batcher.submit([first := row(batcher, 0)])
        await asyncio.sleep(0.2)
        engine.gate.set()
        await first.reply  # about five rows a second
        engine.gate.clear()
        batcher.submit([row(batcher, 0) for _ in range(60)])
        with pytest.raises(QueueFull) as caught:
            batcher.submit([row(batcher, 0)])
        assert 10 <= caught.value.retry_after_s <= 20


async def test_promised_room_counts_and_comes_back():
    async with batching(max_queue=4) as (batcher, _):
        with batcher.reserve(3, ("", "fish")) as room:
            with pytest.raises(QueueFull):
                batcher.submit([row(batcher, 0), row(batcher, 0)])
            room.submit([first := row(batcher, 5)])
            with pytest.raises(ValueError, match="2 places were reserved, 3 rows came"):
                room.submit([row(batcher, 0)] * 3)
        await first.reply
        with batcher.reserve(4):
            pass


async def test_the_culprit_alone_gets_the_error():
    async with batching(max_batch=8) as (batcher, engine):
        engine.culprit = lambda image: image[0, 0, 0] == 3
        rows = [row(batcher, grey) for grey in range(7)]
        batcher.submit(rows)
        answers = await asyncio.gather(*(each.reply for each in rows), return_exceptions=True)
        assert isinstance(answers[3], Internal)
        assert answers[3].code == "engine_failed"
        assert "passwd" not in answers[3].detail
        for grey in (0, 1, 2, 4, 5, 6):
            np.testing.assert_array_equal(answers[grey], logits(rows[grey].image, rows[grey].seat))


async def test_an_error_that_the_engine_words_itself_is_passed_on():
    async with batching() as (batcher, engine):
        engine.culprit, engine.broken = lambda image: True, BadRequest("the image has no pixels", code="bad_image")
        batcher.submit([only := row(batcher, 0)])
        with pytest.raises(BadRequest, match="no pixels"):
            await only.reply


async def test_an_engine_that_loses_rows_is_found_out():
    async with batching() as (batcher, engine):
        engine.run = lambda work: []
        batcher.submit([only := row(batcher, 0)])
        with pytest.raises(ServiceError) as caught:
            await only.reply
        assert caught.value.code == "engine_failed"


async def test_departed_rows_never_reach_the_engine():
    async with batching() as (batcher, engine):
        engine.gate.clear()
        left: list[Row] = []
        batcher.submit([first := row(batcher, 0)])
        await busy(engine)
        before = count("departed")
        waiting = [row(batcher, grey, left=left) for grey in (1, 2, 3)]
        batcher.submit(waiting)
        waiting[1].reply.cancel()
        engine.gate.set()
        await asyncio.gather(first.reply, waiting[0].reply, waiting[2].reply)
        assert ("fish", 2) not in engine.rows
        assert count("departed") == before + 1
        assert sorted(map(id, left)) == sorted(map(id, waiting))


async def test_a_row_that_departs_inside_the_forward_leaves_only_after_it():
    async with batching() as (batcher, engine):
        engine.gate.clear()
        left: list[Row] = []
        batcher.submit([only := row(batcher, 0, left=left)])
        await busy(engine)
        only.reply.cancel()
        await asyncio.sleep(0.02)
        assert left == []
        engine.gate.set()
        batcher.submit([after := row(batcher, 1)])
        await after.reply
        assert left == [only]


async def test_expired_rows_are_told_and_not_computed():
    async with batching() as (batcher, engine):
        engine.gate.clear()
        batcher.submit([first := row(batcher, 0)])
        await busy(engine)
        before = count("expired")
        batcher.submit([late := row(batcher, 1, timeout_s=0.01)])
        await asyncio.sleep(0.03)
        engine.gate.set()
        with pytest.raises(DeadlineExceeded):
            await late.reply
        await first.reply
        assert engine.rows == [("fish", 0)]
        assert count("expired") == before + 1


async def test_features_and_logits_share_a_batch():
    async with batching() as (batcher, _):
        asked, plain = row(batcher, 3), row(batcher, 9)
        plain.seat = None
        batcher.submit([asked, plain])
        answer, features = await asyncio.gather(asked.reply, plain.reply)
        np.testing.assert_array_equal(answer, logits(asked.image, asked.seat))
        np.testing.assert_array_equal(features, [9, 1, 2])


async def test_a_drain_answers_what_waits_and_takes_nothing_new():
    async with batching(max_batch=2) as (batcher, engine):
        engine.gate.clear()
        rows = [row(batcher, grey) for grey in range(6)]
        batcher.submit(rows)
        await busy(engine)
        draining = asyncio.create_task(batcher.drain(10))
        await asyncio.sleep(0.01)
        with pytest.raises(Unavailable) as caught:
            batcher.submit([row(batcher, 0)])
        assert caught.value.code == "shutting_down"
        engine.gate.set()
        await draining
        assert all(each.reply.done() and not each.reply.exception() for each in rows)


async def test_a_drain_serves_rows_that_had_been_promised_room():
    async with batching() as (batcher, _):
        with batcher.reserve(1) as room:
            draining = asyncio.create_task(batcher.drain(10))
            await asyncio.sleep(0.01)
            assert not draining.done()
            room.submit([late := row(batcher, 3)])
            await late.reply
        await draining


async def test_a_drain_out_of_time_refuses_the_rest():
    async with batching(max_batch=1) as (batcher, engine):
        engine.gate.clear()
        left: list[Row] = []
        rows = [row(batcher, grey, left=left) for grey in range(3)]
        batcher.submit(rows)
        await busy(engine)
        started = time.monotonic()
        await batcher.drain(0.05)
        assert time.monotonic() - started < 5
        codes = {each.reply.exception().code for each in rows}
        assert codes == {"shutting_down"}
        assert len(left) == 3


async def test_a_noisy_task_does_not_hold_up_a_quiet_one():
    async with batching(max_batch=4, max_queue=256) as (batcher, engine):
        engine.gate.clear()
        noisy = [row(batcher, 1, task="noisy") for _ in range(100)]
        batcher.submit(noisy)
        await busy(engine)
        batcher.submit([quiet := row(batcher, 2, task="quiet")])
        engine.gate.set()
        await quiet.reply
        assert ("quiet", 2) in engine.batches[1]
        await asyncio.gather(*(each.reply for each in noisy))
