"""The watchdog: an engine that hangs or fails at everything turns the server off, one that comes back turns it on."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest

from server.batching.batcher import Batcher
from server.batching.watchdog import Watchdog
from server.errors import Internal, Unavailable
from server.observability import metrics
from tests.batching.test_batcher import busy, row
from tests.serving.floor import PlainEngine, logits

pytestmark = pytest.mark.anyio
TIMEOUT_S, GRACE_S = 100.0, 10.0


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Armed:
    """A hard kill that only remembers."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def arm(self, seconds: float) -> None:
        self.seconds.append(seconds)

    def disarm(self) -> None:
        self.seconds.clear()


class Guarded:
    """A batcher with its engine, and the watchdog over them; the clock stands until it is set forward."""

    def __init__(self) -> None:
        self.clock, self.engine, self.hard_kill = Clock(), PlainEngine(), Armed()
        self.batcher = Batcher(self.engine, max_batch=4, max_queue=8, clock=self.clock)
        self.dog = Watchdog(
            self.batcher, self.probe, timeout_s=TIMEOUT_S, grace_s=GRACE_S, hard_kill=self.hard_kill  # type: ignore[arg-type]
        )  # fmt: skip
        self.ended = 0
        self.dog.on_lost = self._end

    def probe(self) -> None:
        self.engine.embed([np.zeros((8, 8, 3), np.uint8)])

    def _end(self) -> None:
        self.ended += 1

    async def until(self, trouble: Callable[[str], bool]) -> None:
        """Look until the watchdog says so; probes take turns with the engine's thread."""
        for _ in range(1000):
            self.dog.look()
            if trouble(self.dog.trouble):
                return
            await asyncio.sleep(0.005)
        raise AssertionError(self.dog.trouble)


@asynccontextmanager
async def guarded() -> AsyncIterator[Guarded]:
    built = Guarded()
    try:
        yield built
        built.batcher.check_integrity()
    finally:
        built.engine.gate.set()
        await built.dog.stop()
        await built.batcher.drain(5)


async def soon(condition: Callable[[], object]) -> None:
    for _ in range(4000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come to pass within 20 s")


def up() -> float | None:
    return metrics.REGISTRY.get_sample_value("lensrack_engine_up")


async def test_an_engine_that_hangs_is_told_and_everybody_is_answered(caplog: pytest.LogCaptureFixture) -> None:
    async with guarded() as built:
        built.engine.gate.clear()
        left: list[object] = []
        inside = row(built.batcher, 1, timeout_s=1e6, left=left)
        built.batcher.submit([inside])
        await busy(built.engine)
        waiting = [row(built.batcher, grey, timeout_s=1e6, left=left) for grey in (2, 3)]
        built.batcher.submit(waiting)
        built.clock.now += TIMEOUT_S
        built.dog.look()
        assert (built.dog.trouble, up()) == ("", 1)
        built.clock.now += 1
        with caplog.at_level(logging.CRITICAL):
            built.dog.look()
        assert "more than 100 s" in built.dog.trouble
        assert up() == 0
        assert "self.gate.wait" in caplog.text, "the log shows where the engine's thread is"
        for each in (inside, *waiting):
            with pytest.raises(Unavailable, match="at one batch") as caught:
                await each.reply
            assert (caught.value.code, caught.value.retry_after_s) == ("engine_unavailable", 5)
        assert left == waiting, "the one inside keeps its seat: the forward may still read it"
        with pytest.raises(Unavailable):
            built.batcher.submit([row(built.batcher, 4)])


async def test_an_engine_that_comes_back_serves_on() -> None:
    async with guarded() as built:
        built.engine.gate.clear()
        left: list[object] = []
        inside = row(built.batcher, 1, timeout_s=1e6, left=left)
        built.batcher.submit([inside])
        await busy(built.engine)
        built.clock.now += TIMEOUT_S + 1
        built.dog.look()
        built.clock.now += GRACE_S - 1
        built.dog.look()
        assert (built.dog.lost, built.ended) == (False, 0)
        built.engine.gate.set()
        await built.until(lambda trouble: not trouble)
        assert up() == 1
        again = row(built.batcher, 5)
        built.batcher.submit([again])
        np.testing.assert_array_equal(await again.reply, logits(again.image, again.seat))
        assert left == [inside]
        assert isinstance(inside.reply.exception(), Unavailable)


async def test_an_engine_that_does_not_come_back_ends_the_server_once() -> None:
    async with guarded() as built:
        built.engine.gate.clear()
        built.batcher.submit([inside := row(built.batcher, 1, timeout_s=1e6)])
        await busy(built.engine)
        built.clock.now += TIMEOUT_S + 1
        built.dog.start()
        await soon(lambda: built.dog.trouble)
        assert built.hard_kill.seconds[-1] == 2 * TIMEOUT_S + GRACE_S
        built.clock.now += GRACE_S
        await soon(lambda: built.ended)
        assert (built.dog.lost, built.ended) == (True, 1)
        await built.dog.stop()
        assert built.hard_kill.seconds[-1] == 3 * GRACE_S + 10, "leaving must not hang either"
        assert isinstance(inside.reply.exception(), Unavailable)


async def test_a_culprit_does_not_turn_the_server_off() -> None:
    async with guarded() as built:
        built.engine.culprit = lambda image: image[0, 0, 0] == 3
        built.batcher.submit([bad := row(built.batcher, 3)])
        with pytest.raises(Internal):
            await bad.reply
        assert built.batcher.thread.failures == 1
        await built.until(lambda trouble: built.batcher.thread.failures == 0)
        assert built.dog.trouble == ""
        built.batcher.submit([good := row(built.batcher, 4)])
        await good.reply


async def test_an_engine_that_fails_at_everything_turns_it_off_until_it_does_not() -> None:
    async with guarded() as built:
        embed = built.engine.embed
        built.engine.culprit = lambda image: True
        built.engine.embed = broken  # type: ignore[method-assign]
        built.batcher.submit([bad := row(built.batcher, 3)])
        with pytest.raises(Internal):
            await bad.reply
        await built.until(bool)
        assert "fails at everything" in built.dog.trouble
        built.clock.now += GRACE_S - 1
        built.engine.embed, built.engine.culprit = embed, lambda image: False  # type: ignore[method-assign]
        await built.until(lambda trouble: not trouble)
        assert not built.dog.lost
        built.batcher.submit([good := row(built.batcher, 4)])
        await good.reply


def broken(images: object) -> np.ndarray:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


async def test_nothing_of_a_failed_forward_is_held_while_its_halves_are_tried() -> None:
    """Else a forward that ran out of memory would take its halves with it."""

    class Tensor:
        pass

    held: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    async with guarded() as built:
        run = built.engine.run

        def hungry(work):
            alive.append(sum(ref() is not None for ref in held))
            if len(work) > 1:
                activations = Tensor()
                held.append(weakref.ref(activations))
                raise MemoryError(f"no room for {len(work)} rows")
            return run(work)

        built.engine.run = hungry  # type: ignore[method-assign]
        rows = [row(built.batcher, grey) for grey in range(4)]
        built.batcher.submit(rows)
        for each in rows:
            np.testing.assert_array_equal(await each.reply, logits(each.image, each.seat))
        assert len(held) == 3
        assert alive == [0] * 7


async def test_a_row_whose_seat_cannot_be_let_go_costs_no_other_its_answer() -> None:
    async with guarded() as built:
        rows = [row(built.batcher, grey) for grey in range(6)]

        def fails() -> None:
            raise KeyError("no such seat")

        rows[0].leave = fails
        built.batcher.submit(rows)
        for each in rows:
            np.testing.assert_array_equal(await each.reply, logits(each.image, each.seat))


async def test_a_batch_that_fails_around_the_engine_stops_no_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    async with guarded() as built:
        left: list[object] = []
        rows = [row(built.batcher, grey, left=left) for grey in range(3)]
        measure = built.batcher._measure

        def once(*_: object) -> None:
            monkeypatch.setattr(built.batcher, "_measure", measure)
            raise ZeroDivisionError

        monkeypatch.setattr(built.batcher, "_measure", once)
        built.batcher.submit(rows)
        for each in rows:
            with pytest.raises(Internal) as caught:
                await each.reply
            assert caught.value.code == "engine_failed"
        assert left == rows
        built.batcher.submit([after := row(built.batcher, 9)])
        await after.reply
