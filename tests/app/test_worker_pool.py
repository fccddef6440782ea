"""The pool of a server in one process: it restarts workers, counts that, and leaves none behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from server.app import worker_pool
from server.app.worker_pool import WorkerPool, worker_environment
from server.settings import Settings

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

LEAVES = "import sys; sys.stdin.read()"
HANGS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(sys.argv[1], "w").close()
time.sleep(60)
"""


async def until(condition: Callable[[], object]) -> None:
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not within a minute")


@asynccontextmanager
async def running(pool: WorkerPool) -> AsyncIterator[list[int]]:
    pool.start()
    await until(lambda: len(pool.pids) == pool.count)
    try:
        yield pool.pids
    finally:
        await pool.stop()
    assert pool.pids == []


def settings_of(home: Path) -> Settings:
    return Settings(home=home, drain_timeout_s=0.2, worker_metrics_port=9100)


def program(monkeypatch: pytest.MonkeyPatch, code: str, *arguments: str) -> None:
    monkeypatch.setattr(worker_pool, "COMMAND", (sys.executable, "-c", code, *arguments))


async def test_a_worker_that_ends_is_restarted_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(monkeypatch, LEAVES)
    restarts: list[None] = []
    pool = WorkerPool(settings_of(tmp_path), 2, on_restart=lambda: restarts.append(None))
    async with running(pool) as (first, second):
        os.kill(first, signal.SIGKILL)
        await until(lambda: len(restarts) == 1 and len(pool.pids) == 2)
        assert second in pool.pids
        assert first not in pool.pids
        left = pool.pids
    assert not any(psutil.pid_exists(pid) for pid in left)
    assert len(restarts) == 1, "what is asked to end is not counted"


async def test_a_worker_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(monkeypatch, HANGS, str(tmp_path / "hangs"))
    async with running(WorkerPool(settings_of(tmp_path), 1, on_restart=lambda: None)) as [pid]:
        await until((tmp_path / "hangs").exists)
    assert not psutil.pid_exists(pid)


async def test_each_worker_has_a_port_for_its_metrics(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    ports = [worker_environment(settings, number)["LENSRACK_WORKER_METRICS_PORT"] for number in range(3)]
    assert ports == ["9100", "9101", "9102"]
    without = settings.model_copy(update={"worker_metrics_port": 0})
    assert worker_environment(without, 1)["LENSRACK_WORKER_METRICS_PORT"] == "0"
