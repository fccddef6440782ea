"""How the asynchronous client sleeps, runs blocking work and maps. `_sync_runtime` has the same names."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from typing import Any, TypeVar

import anyio
import anyio.to_thread

from .errors import InvalidInput

T = TypeVar("T")
S = TypeVar("S")

sleep = anyio.sleep


async def run(work: Callable[[], T]) -> T:
    """Call `work` in a thread: it reads files or resizes pictures."""
    return await anyio.to_thread.run_sync(work)


async def map_in_order(
    call: Callable[[S], Coroutine[Any, Any, T]], items: Iterable[S], in_flight: int
) -> AsyncGenerator[T, None]:
    """Yield the results of `call` in the order of `items`; at most `in_flight` calls run at any time, as tasks."""
    loop = _running_loop()
    pending: deque[asyncio.Task[T]] = deque()
    try:
        for item in items:
            pending.append(loop.create_task(call(item)))
            if len(pending) == in_flight:
                yield await pending.popleft()
        while pending:
            yield await pending.popleft()
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


def _running_loop() -> asyncio.AbstractEventLoop:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise InvalidInput("map needs asyncio: with trio, start predictions in a nursery of your own") from None
