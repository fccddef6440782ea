"""How a server comes up and goes down before whatever engine room it has: in which order, and how long it waits."""

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


class ScriptedRoom:
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
    """The room hears when it starts and stops."""

    def __init__(self, room: ScriptedRoom) -> None:
        self._room = room

    async def start(self) -> int:
        self._room.heard.append("grpc")
        return 1

    async def stop(self, grace_s: float) -> None:
        self._room.heard.append(("no grpc", grace_s))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server[ScriptedRoom]]:
    settings = Settings(home=tmp_path, drain_timeout_s=GRACE_S, workers=0)
    room = ScriptedRoom()
    store, jobs, ring = open_store("memory://"), open_jobs(settings), open_authenticator(settings)
    room.jobs = jobs
    watch, grpc, decoding = StoreProbe(store, jobs, 0.01), ScriptedGrpc(room), ThreadPoolExecutor(1)
    with closing(jobs), closing(ring):  # whatever the server does
        yield Server(settings, room, FastAPI(), store, jobs, ring, watch, grpc, decoding)  # type: ignore[arg-type]


async def test_the_room_is_warm_before_anything_asks_and_drained_before_it_stops(server: Server[ScriptedRoom]) -> None:
    async with server.running():
        server.room.heard.append("asked")
    up, down = ["warm_up", "grpc", "start"], [("no grpc", GRACE_S), ("drain", GRACE_S), "stop"]
    assert server.room.heard == [*up, "asked", *down]


async def test_nothing_is_left_open_or_at_work(server: Server[ScriptedRoom]) -> None:
    async with server.running():
        pass
    with pytest.raises(Exception, match="closed"):
        server.jobs.counts()
    with pytest.raises(RuntimeError, match="shutdown"):
        server.decoding.submit(print)
    assert server.watch is not None
    assert server.watch._task is not None
    assert server.watch._task.done()


async def test_nobody_waits_for_an_engine_that_is_lost(server: Server[ScriptedRoom]) -> None:
    async with server.running():
        server.room.lost = True
    assert server.room.heard[-3:] == [("no grpc", 0.0), ("drain", 0.0), "stop"]


async def test_what_fails_meanwhile_is_told_after_an_orderly_end(server: Server[ScriptedRoom]) -> None:
    with pytest.raises(ZeroDivisionError):
        async with server.running():
            raise ZeroDivisionError
    assert server.room.heard[-1] == "stop"


async def test_who_leaves_begins_nothing_new_and_drains_at_once(server: Server[ScriptedRoom]) -> None:
    async with server.running():
        server.leave()
        assert server.app.state.leaving
        assert server._drain is not None
        await server._drain
        assert server.room.heard[-1] == ("drain", GRACE_S)


async def test_what_a_front_end_has_counted_to_the_last_is_in_the_ledger(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    asked = Counter("asked", "Questions.", registry=registry)
    room = RemoteEngines(EnginePool([], max_batch=1), None, ProcessMetrics(tmp_path, "front-0-1", registry))  # type: ignore[arg-type]
    await room.warm_up()
    room.start()
    asked.inc(5)
    await room.stop()
    told = ProcessMetrics(tmp_path, "front-1-2", CollectorRegistry()).collect()
    assert [one.value for metric in told for one in metric.samples if one.name == "asked_total"] == [5.0]
