"""The one thread in which the engine runs: forwards, their answers, and what happens to a batch that fails.

rows ─▶ forward ─▶ an outcome for each row
          └ fails, out of memory or because of a row ─▶ halves, each for itself ─▶ … ─▶ the culprit alone

A device that computes while the host goes on gets the next batch before the answers of the one before are waited for:
`begin(n) · begin(n+1) · finish(n) · begin(n+2) · finish(n+1) …`. Where the host computes, `finish` does all the work.
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
Span = tuple[float, float]  # start and end of a forward
Logits = Callable[[], Sequence[np.ndarray[Any, Any]]]  # waits for the device


class Engine(Protocol):
    """Runs batches. Both calls block, and come from one thread only."""

    def run(self, work: Sequence[tuple[Any, Any]]) -> Sequence[np.ndarray[Any, Any]]:
        """Logits [C] for each (image uint8 [S, S, 3], seat)."""
        ...

    def embed(self, images: Sequence[Any]) -> np.ndarray[Any, Any]:
        """Features [n, D] of n images."""
        ...


class PipelinedEngine(Engine, Protocol):
    """An engine on a device that computes by itself. `ahead`: a batch can begin while the one before is computed."""

    ahead: bool

    def begin(self, work: Sequence[tuple[Any, Any]]) -> Logits:
        """Launch a batch. The returned call waits for the logits that `run` would return, and pixels are read
        by then."""
        ...


@dataclass(eq=False)
class BatchUnderWay:
    """A batch that may be computing. `logits` waits for the rows with a seat; None where the forward has not begun."""

    rows: Sequence[Row]
    since: float | None = None
    logits: Logits | None = None


class EngineThread:
    """Runs batches and exclusive works, one at a time. Its methods belong to the event loop, except `busy_s`."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._clock = engine, clock
        self.ahead = bool(getattr(engine, "ahead", False))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._one_exclusive = asyncio.Lock()
        self._entered_at: float | None = None
        self.failures = 0  # rows that failed since the last answered row

    async def begin(self, rows: Sequence[Row]) -> BatchUnderWay:
        """Launch a batch where the engine can compute ahead; elsewhere nothing happens until `finish`."""
        if not self.ahead:
            return BatchUnderWay(rows)
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._begin, rows)

    async def finish(self, begun: BatchUnderWay) -> tuple[list[Outcome], Span]:
        """Every row's outcome, and the start and end of the forward."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._finish, begun)

    async def run_exclusive(self, work: Callable[[], T]) -> T:
        """Run other work between two batches. Works run one at a time, so that batches get their turn.

        Does not return while the work runs, even when cancelled: the pixels and the seat that it uses must stay.
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
        """Seconds since the call under way began; 0 when the engine is idle."""
        entered_at = self._entered_at
        return 0.0 if entered_at is None else max(0.0, self._clock() - entered_at)

    def close(self) -> None:
        """Begin nothing more. The call under way goes on, since a thread cannot be ended."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    # --- in the thread ----------------------------------------------------------------------------------------------

    def _begin(self, rows: Sequence[Row]) -> BatchUnderWay:
        begun = BatchUnderWay(rows, self._clock())
        with_seat = [(row.image, row.seat) for row in rows if row.seat is not None]
        try:
            begun.logits = (
                self._entered(lambda: cast(PipelinedEngine, self._engine).begin(with_seat)) if with_seat else None
            )
        except Exception as error:  # `finish` tries the whole batch again, and reports the error
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
        """Outcomes, or None for several rows that failed together. The error and its traceback are dropped by then:
        the tensors that a traceback keeps alive would make the halves run out of memory as well."""
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
        with_seat = [i for i, row in enumerate(rows) if row.seat is not None]
        for_features = [i for i, row in enumerate(rows) if row.seat is None]
        if with_seat:
            values = logits() if logits else self._engine.run([(rows[i].image, rows[i].seat) for i in with_seat])
            answers = _scatter(answers, with_seat, values)
        if for_features:
            features = self._engine.embed([rows[i].image for i in for_features])
            answers = _scatter(answers, for_features, list(features))
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
