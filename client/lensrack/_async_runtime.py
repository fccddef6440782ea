"""How the asynchronous client sleeps, runs blocking work and maps. `_sync_runtime` has the same names."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import httpx

from .errors import InvalidInput

T = TypeVar("T")
S = TypeVar("S")

sleep = anyio.sleep


class Connections:
    """An httpx client's connections, which work in one event loop only. `pooled`: they are its own, not a transport's.

    Other calls in another loop would wait or fail inside the pool, depending on which connections are idle.
    """

    def __init__(self, http: httpx.AsyncClient, *, pooled: bool) -> None:
        self._http, self._pooled = http, pooled
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    def check(self) -> None:
        """Raise InvalidInput if the client is closed, or was used in another event loop before."""
        if self._closed:
            raise InvalidInput("this AsyncClient is closed: make a new one")
        if self._elsewhere():
            raise InvalidInput("this AsyncClient was used in another event loop: make one in each asyncio.run")

    async def close(self) -> None:
        self._closed = True
        if not self._elsewhere():
            await self._http.aclose()

    def _elsewhere(self) -> bool:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return False  # trio, which says so itself
        self._loop = self._loop or loop
        return self._pooled and self._loop is not loop


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
