"""How a server comes up and goes down before whatever engine it has: in which order, and how long it waits."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter

from prompts_store import open_store
from server.app.server import Server
from server.app.store_probe import StoreProbe
from server.app.stores import open_authenticator, open_jobs
from server.observability.multiprocess import ProcessMetrics
from server.processes.front_process import RemoteEngines
from server.rpc.engine_pool import EnginePool
from server.settings import Settings

pytestmark = pytest.mark.anyio

GRACE_S = 7.0


class ScriptedEngine:
    """Computes nothing, and writes down what it is asked; `jobs` must be open until it has stopped."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.lost = False
        self.jobs: Any = None

    async def warm_up(self) -> None:
        self.heard.append("warm_up")

    def start(self) -> None:
        self.heard.append("start")

    async def drain(self, timeout_s: float) -> None:
        self.heard.append(("drain", timeout_s))

    async def stop(self) -> None:
        self.jobs.counts()  # raises when the store has been closed
        self.heard.append("stop")


class ScriptedGrpc:
    """The engine records when it starts and stops."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self._engine = engine

    async def start(self) -> int:
        self._engine.heard.append("grpc")
        return 1

    async def stop(self, grace_s: float) -> None:
        self._engine.heard.append(("no grpc", grace_s))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server[ScriptedEngine]]:
    settings = Settings(home=tmp_path, drain_timeout_s=GRACE_S, workers=0)
    engine = ScriptedEngine()
    store, jobs, authenticator = open_store("memory://"), open_jobs(settings), open_authenticator(settings)
    engine.jobs = jobs
    probe, grpc, decoding = StoreProbe(store, jobs, 0.01), ScriptedGrpc(engine), ThreadPoolExecutor(1)
    with closing(jobs), closing(authenticator):  # whatever the server does
        yield Server(settings, engine, FastAPI(), store, jobs, authenticator, probe, grpc, decoding)  # type: ignore[arg-type]


async def test_the_room_is_warm_before_anything_asks_and_drained_before_it_stops(
    server: Server[ScriptedEngine],
) -> None:
    async with server.running():
        server.engine.heard.append("asked")
    up, down = ["warm_up", "grpc", "start"], [("no grpc", GRACE_S), ("drain", GRACE_S), "stop"]
    assert server.engine.heard == [*up, "asked", *down]


async def test_nothing_is_left_open_or_at_work(server: Server[ScriptedEngine]) -> None:
    async with server.running():
        pass
    with pytest.raises(Exception, match="closed"):
        server.jobs.counts()
    with pytest.raises(RuntimeError, match="shutdown"):
        server.decoding.submit(print)
    assert server.probe is not None
    assert server.probe._task is not None
    assert server.probe._task.done()


async def test_nobody_waits_for_an_engine_that_is_lost(server: Server[ScriptedEngine]) -> None:
    async with server.running():
        server.engine.lost = True
    assert server.engine.heard[-3:] == [("no grpc", 0.0), ("drain", 0.0), "stop"]


async def test_what_fails_meanwhile_is_told_after_an_orderly_end(server: Server[ScriptedEngine]) -> None:
    with pytest.raises(ZeroDivisionError):
        async with server.running():
            raise ZeroDivisionError
    assert server.engine.heard[-1] == "stop"


async def test_who_leaves_begins_nothing_new_and_drains_at_once(server: Server[ScriptedEngine]) -> None:
    async with server.running():
        server.leave()
        assert server.app.state.leaving
        assert server._drain is not None
        await server._drain
        assert server.engine.heard[-1] == ("drain", GRACE_S)


async def test_what_a_front_end_has_counted_to_the_last_is_in_the_ledger(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    asked = Counter("asked", "Questions.", registry=registry)
    engine = RemoteEngines(EnginePool([], max_batch=1), None, ProcessMetrics(tmp_path, "front-0-1", registry))  # type: ignore[arg-type]
    await engine.warm_up()
    engine.start()
    asked.inc(5)
    await engine.stop()
    told = ProcessMetrics(tmp_path, "front-1-2", CollectorRegistry()).collect()
    assert [one.value for metric in told for one in metric.samples if one.name == "asked_total"] == [5.0]
