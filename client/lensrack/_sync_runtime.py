"""How the synchronous client sleeps, runs blocking work and maps. `_async_runtime` has the same names."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import httpx

from .errors import InvalidInput

T = TypeVar("T")
S = TypeVar("S")

sleep = time.sleep


class Connections:
    """An httpx client's connections."""

    def __init__(self, http: httpx.Client, *, pooled: bool) -> None:
        self._http = http

    def check(self) -> None:
        """Raise InvalidInput if the client is closed."""
        if self._http.is_closed:
            raise InvalidInput("this Client is closed: make a new one")

    def close(self) -> None:
        self._http.close()


def run(work: Callable[[], T]) -> T:
    """Call `work` in the caller's thread, which a synchronous client may block."""
    return work()


def map_in_order(call: Callable[[S], T], items: Iterable[S], in_flight: int) -> Generator[T, None, None]:
    """Yield the results of `call` in the order of `items`; at most `in_flight` calls run at any time, in threads."""
    pending: deque[Future[T]] = deque()
    with ThreadPoolExecutor(in_flight) as pool:
        try:
            for item in items:
                pending.append(pool.submit(call, item))
                if len(pending) == in_flight:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
