"""Job stores of each kind, and what tests do with them again and again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from server.jobs.job import Job
from server.jobs.redis_store import RedisJobStore
from server.jobs.sqlite_store import SqliteJobStore
from server.jobs.store import JobStore

ROOT = Path(__file__).resolve().parents[2]
ERROR = {"code": "internal", "detail": "the fit broke"}


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Backend:
    """One place where jobs can be kept: `open` it here, or elsewhere by running `source`, which binds `store`."""

    open: Callable[[Callable[[], float]], JobStore]
    source: str

    def process(self, script: str, *args: str) -> subprocess.Popen[str]:
        code = f"import json, os, sys, time\n{self.source}\n{script}"
        command = [sys.executable, "-c", code, *args]
        return subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def sqlite(folder: Path, request: pytest.FixtureRequest) -> Backend:
    file = folder / "home" / "jobs.sqlite"
    source = (
        "from pathlib import Path\n"
        "from server.jobs.sqlite_store import SqliteJobStore\n"
        f"store = SqliteJobStore(Path({str(file)!r}))"
    )
    return Backend(lambda now: SqliteJobStore(file, now=now), source)


def redis(folder: Path, request: pytest.FixtureRequest) -> Backend:
    url = request.getfixturevalue("redis_url")
    source = f"from server.jobs.redis_store import RedisJobStore\nstore = RedisJobStore({url!r})"
    return Backend(lambda now: RedisJobStore(url, now=now), source)


BACKENDS = {"sqlite": sqlite, "redis": redis}


def submit(store: JobStore, task: str = "trash", **options: Any) -> Job:
    recipe = options.pop("recipe", {"epochs": 3})
    return store.submit(task, "d" * 64, "vpt_deep", recipe, **{"max_attempts": 3, **options})


def claim(store: JobStore, worker: str = "w1", lease_s: float = 30.0) -> Job:
    job = store.claim(worker, lease_s)
    assert job is not None
    return job


def told(store: JobStore, job: Job) -> list[str]:
    events = store.events(job.id)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    return [event.type for event in events]
