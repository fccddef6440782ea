"""The workers of a server in a single process: a pool that keeps them running.

A worker is this program again, as `python -m server work`. Its standard input is a pipe from the process that started
it. When the pipe closes, however that process ended, the worker gives its job back to the queue and leaves; so no
worker outlives its server. Where front ends are processes of their own, `server.processes.manager` forks the workers.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from server.settings import Settings

from .backoff import Backoff

log = logging.getLogger(__name__)

COMMAND: Final = (sys.executable, "-m", "server", "work", "--until-stdin-closes")
FIRST_PAUSE_S: Final = 0.5


def worker_environment(settings: Settings, number: int) -> dict[str, str]:
    """Return the environment of a worker of a `number`, from 0: it finds the same packages and the same home, wherever
    it starts, and has a port of its own for its metrics."""
    root = Path(__file__).resolve().parents[2]
    path = (str(root), str(root / "client"), os.environ.get("PYTHONPATH"))
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "LENSRACK_HOME": str(settings.home.resolve()),
        "LENSRACK_WORKER_METRICS_PORT": str(settings.metrics_port_of(number)),
    }


class WorkerPool:
    """Keeps `count` workers running on the event loop. `on_restart` is called for each one that has ended by itself."""

    def __init__(self, settings: Settings, count: int, on_restart: Callable[[], None]) -> None:
        self.count = count
        self._settings, self._on_restart = settings, on_restart
        self._tasks: list[asyncio.Task[None]] = []
        self._processes: dict[int, asyncio.subprocess.Process] = {}

    @property
    def pids(self) -> list[int]:
        """The processes that run."""
        return [process.pid for process in self._processes.values() if process.returncode is None]

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._keep_running(n), name=f"worker-{n}") for n in range(self.count)]

    async def stop(self) -> None:
        """Ask every worker to leave, wait as long as a drain may take, then kill it. Its job goes back to the queue."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(self._end(process) for process in list(self._processes.values())))
        self._processes.clear()

    async def _keep_running(self, number: int) -> None:
        backoff, environment = Backoff(FIRST_PAUSE_S), worker_environment(self._settings, number)
        while True:
            started_at = time.monotonic()
            process = await asyncio.create_subprocess_exec(*COMMAND, stdin=asyncio.subprocess.PIPE, env=environment)
            self._processes[number] = process
            status = await process.wait()
            lived_s = time.monotonic() - started_at
            log.error("worker %d (pid %d) ended with %d after %.1f s", number, process.pid, status, lived_s)
            self._on_restart()
            await asyncio.sleep(backoff.pause_s(lived_s))

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        if process.returncode is not None:
            return
        process.terminate()
        grace_s = self._settings.drain_timeout_s
        try:
            await asyncio.wait_for(process.wait(), grace_s)
        except TimeoutError:
            log.warning("worker %d did not leave within %.0f s", process.pid, grace_s)
            process.kill()
            await process.wait()
