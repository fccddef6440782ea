"""The one thread in which the engine runs: what a batch costs, what it answers, and what becomes of a batch that fails.

rows ─▶ forward ─▶ an outcome for each row
          └ fails, for want of memory or because of a row ─▶ halves, each for itself ─▶ … ─▶ the culprit alone

A device that computes while the host goes on is put to the next batch before the answers of the one before are waited
for: `begin(n) · begin(n+1) · finish(n) · begin(n+2) · finish(n+1) …`. Where the host computes, a batch is begun when it
is finished.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import numpy as np

from server.errors import Internal, ServiceError

from .row import Row

log = logging.getLogger(__name__)

T = TypeVar("T")
Outcome = np.ndarray[Any, Any] | ServiceError
Span = tuple[float, float]  # when a forward began and ended
Logits = Callable[[], Sequence[np.ndarray[Any, Any]]]  # waits for them


class Engine(Protocol):
    """What runs a batch. Both calls block and are made from one thread only."""

    def run(self, work: Sequence[tuple[Any, Any]]) -> Sequence[np.ndarray[Any, Any]]:
        """Logits [C] for each (image uint8 [S, S, 3], seat)."""
        ...

    def embed(self, images: Sequence[Any]) -> np.ndarray[Any, Any]:
        """Features [n, D] of n images."""
        ...


class PipelinedEngine(Engine, Protocol):
    """An engine on a device of its own: `ahead` is whether a batch can be begun while the one before is computed."""

    ahead: bool

    def begin(self, work: Sequence[tuple[Any, Any]]) -> Logits:
        """What is returned waits for the logits that `run` would give. The pixels have been read by then."""
        ...


@dataclass(eq=False)
class BatchUnderWay:
    """Rows that the engine may be at: `logits` waits for those of the rows with a seat, None where it has not begun."""

    rows: Sequence[Row]
    since: float | None = None
    logits: Logits | None = None


class EngineThread:
    """Batches and other works, one at a time. Its methods belong to the event loop, but for `busy_s`."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._clock = engine, clock
        self.ahead = bool(getattr(engine, "ahead", False))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._one_exclusive = asyncio.Lock()
        self._entered_at: float | None = None
        self.failures = 0  # rows that it could not answer since it last answered one

    async def begin(self, rows: Sequence[Row]) -> BatchUnderWay:
        """Put a batch under way, where the engine can be ahead of its answers; elsewhere nothing happens yet."""
        if not self.ahead:
            return BatchUnderWay(rows)
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._begin, rows)

    async def finish(self, begun: BatchUnderWay) -> tuple[list[Outcome], Span]:
        """Every row's outcome, and when the forward began and ended."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._finish, begun)

    async def run_exclusive(self, work: Callable[[], T]) -> T:
        """Run something else between two batches; of several such works one at a time, so that batches get their turn.

        It never returns while the work is under way, even when cancelled: what the work uses must stay where it is.
        """
        async with self._one_exclusive:
            running = asyncio.get_running_loop().run_in_executor(self._pool, self._entered, work)
            try:
                return await asyncio.shield(running)
            finally:
                while not running.done():
                    with suppress(asyncio.CancelledError):
                        await asyncio.wait([running])

    def busy_s(self) -> float:
        """How long it has been at what it is doing; 0 when it is idle."""
        entered_at = self._entered_at
        return 0.0 if entered_at is None else max(0.0, self._clock() - entered_at)

    def close(self) -> None:
        """Nothing more is begun. What is under way goes on: a thread cannot be ended."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    # --- in the thread ----------------------------------------------------------------------------------------------

    def _begin(self, rows: Sequence[Row]) -> BatchUnderWay:
        begun = BatchUnderWay(rows, self._clock())
        asked = [(row.image, row.seat) for row in rows if row.seat is not None]
        try:
            begun.logits = self._entered(lambda: cast(PipelinedEngine, self._engine).begin(asked)) if asked else None
        except Exception as error:  # it is tried again as a whole when its turn to be answered comes, and told then
            log.warning("a batch of %d rows could not be begun: %s", len(rows), type(error).__name__)
        return begun

    def _finish(self, begun: BatchUnderWay) -> tuple[list[Outcome], Span]:
        since = self._clock() if begun.since is None else begun.since
        return self._answer(begun.rows, begun.logits), (since, self._clock())

    def _answer(self, rows: Sequence[Row], logits: Logits | None = None) -> list[Outcome]:
        outcomes = self._attempt(rows, logits)
        if outcomes is None:
            middle = len(rows) // 2
            return self._answer(rows[:middle]) + self._answer(rows[middle:])
        return outcomes

    def _attempt(self, rows: Sequence[Row], logits: Logits | None) -> list[Outcome] | None:
        """None for several rows that failed together. The error is gone then, and with it what its traceback kept:
        halves that are tried beside the tensors of a forward that ran out of memory would run out of it, too."""
        try:
            answers: list[Outcome] = self._entered(lambda: self._run(rows, logits))
        except Exception as error:
            if len(rows) > 1:
                log.warning("a batch of %d rows failed and is halved: %s", len(rows), type(error).__name__)
                return None
            if isinstance(error, ServiceError):
                return [error]
            self.failures += 1
            rows[0].context.run(log.exception, "the engine failed on a row of task %s", rows[0].task)
            return [Internal("the engine could not answer this image", code="engine_failed")]
        self.failures = 0
        return answers

    def _run(self, rows: Sequence[Row], logits: Logits | None) -> list[Outcome]:
        answers: list[Any] = [None] * len(rows)
        asked = [i for i, row in enumerate(rows) if row.seat is not None]
        plain = [i for i, row in enumerate(rows) if row.seat is None]
        if asked:
            found = logits() if logits else self._engine.run([(rows[i].image, rows[i].seat) for i in asked])
            answers = _scatter(answers, asked, found)
        if plain:
            features = self._engine.embed([rows[i].image for i in plain])
            answers = _scatter(answers, plain, list(features))
        return answers

    def _entered(self, work: Callable[[], T]) -> T:
        self._entered_at = self._clock()
        try:
            return work()
        finally:
            self._entered_at = None


def _scatter(answers: list[Any], where: Sequence[int], values: Sequence[Any]) -> list[Any]:
    if len(values) != len(where):
        raise Internal(f"the engine gave {len(values)} answers for {len(where)} rows", code="engine_failed")
    for i, value in zip(where, values, strict=True):
        answers[i] = value
    return answers
