"""Keeps the embedded worker processes alive: a worker that dies is started again, one that keeps dying more slowly.

A worker holds the reading end of a pipe to this process. When the pipe closes, however this process ended, the worker
gives its job back and leaves; so no worker outlives its server.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from .backoff import Backoff

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.5


class WorkerPool:
    """`count` processes of `command`. `on_restart` is called for each one that has to be started again; `own_env` is
    what the n-th one, from 0, has in its environment and the others have not."""

    def __init__(
        self,
        command: Sequence[str],
        count: int,
        *,
        env: Mapping[str, str],
        grace_s: float,
        on_restart: Callable[[], None],
        own_env: Callable[[int], Mapping[str, str]] = lambda number: {},
    ) -> None:
        self._command, self._count, self._env, self._grace_s = command, count, env, grace_s
        self._on_restart, self._own_env = on_restart, own_env
        self._keepers: list[asyncio.Task[None]] = []
        self._alive: dict[int, asyncio.subprocess.Process] = {}

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._alive.values() if process.returncode is None]

    def start(self) -> None:
        self._keepers = [asyncio.create_task(self._keep(n), name=f"worker-{n}") for n in range(self._count)]

    async def stop(self) -> None:
        """Ask every worker to leave, wait `grace_s`, then end it. A job under way goes back to the queue."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await asyncio.gather(*(self._end(process) for process in list(self._alive.values())))
        self._alive.clear()

    async def _keep(self, number: int) -> None:
        backoff = Backoff(FIRST_PAUSE_S)
        while True:
            started = time.monotonic()
            process = await asyncio.create_subprocess_exec(
                *self._command, stdin=asyncio.subprocess.PIPE, env={**self._env, **self._own_env(number)}
            )
            self._alive[number] = process
            code = await process.wait()
            lived_s = time.monotonic() - started
            log.error("worker %d (pid %d) ended with %d after %.1f s", number, process.pid, code, lived_s)
            self._on_restart()
            await asyncio.sleep(backoff.pause_s(lived_s))

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        if process.returncode is not None:
            return
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), self._grace_s)
        except TimeoutError:
            log.warning("worker %d did not leave within %.0f s", process.pid, self._grace_s)
            process.kill()
            await process.wait()
