"""The ways of asking a scripted rack: each client over an injected transport, and over a real socket."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lensrack import async_client as async_module

PIXELS = b"\xff\xd8\xff" + b"not much of a jpeg"
Make = Callable[..., Any]

# A test without one of these marks runs with each client over a transport.
IN_PROCESS, SOCKETS = ["sync-transport", "async-transport"], ["sync-socket", "async-socket"]
over_sockets = pytest.mark.parametrize("make", SOCKETS, indirect=True)
in_process_and_sockets = pytest.mark.parametrize("make", IN_PROCESS + SOCKETS, indirect=True)


class Blocking:
    """An async client, its groups and its handles, for callers that do not await."""

    def __init__(self, inner: Any, runner: asyncio.Runner) -> None:
        self.inner, self.runner = inner, runner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.inner, name)
        if inspect.iscoroutinefunction(value):
            return lambda *args, **kwargs: self._wrap(self.runner.run(value(*args, **kwargs)))
        if inspect.isasyncgenfunction(value):
            return lambda *args, **kwargs: self._iterate(value(*args, **kwargs))
        if inspect.ismethod(value):
            return lambda *args, **kwargs: self._wrap(value(*args, **kwargs))
        return self._wrap(value)

    def _iterate(self, generator: Any) -> Iterator[Any]:
        async def following() -> Any:
            return await anext(generator)

        while True:
            try:
                yield self.runner.run(following())
            except StopAsyncIteration:
                return

    def _wrap(self, value: Any) -> Any:
        ours = type(value).__module__ == async_module.__name__
        return Blocking(value, self.runner) if ours else value
