"""A picture's way to its answer, walked by a profiler: whoever reads along enters few rooms."""

from __future__ import annotations

import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.app.server import build_server
from server.settings import Settings
from tests.structure.shape import ROOT

pytestmark = pytest.mark.anyio

MOST_ROOMS = 8
PICTURE = (ROOT / "server" / "bundled" / "pictures" / "7.png").read_bytes()


class Walk:
    """The rooms whose functions are called, in any thread, while `watching`."""

    def __init__(self) -> None:
        self.rooms: set[str] = set()
        self.watching = False

    def __call__(self, frame: Any, event: str, _argument: object) -> None:
        module = frame.f_globals.get("__name__", "")
        if self.watching and event == "call" and module.startswith(("server.", "prompts_store")):
            self.rooms.add(module.removeprefix("server.").partition(".")[0])


@pytest.fixture
def walk() -> Any:
    walk, before = Walk(), sys.getprofile()
    threading.setprofile(walk)  # of threads that start from now on
    sys.setprofile(walk)
    yield walk
    sys.setprofile(before)
    threading.setprofile(None)  # type: ignore[arg-type]


@asynccontextmanager
async def served(home: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A whole server in this process, without workers."""
    server = build_server(Settings(home=home, backbone="bundled", workers=0, fronts=0, threads=1))
    transport = httpx.ASGITransport(server.app)
    async with server.running(), httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        yield client


async def test_a_picture_enters_at_most_eight_rooms(tmp_path: Path, walk: Walk) -> None:
    async with served(tmp_path) as client:
        for walk.watching in (False, True):  # the first request pays for what is done once
            answer = await client.post("/predict/digits", content=PICTURE, headers={"content-type": "image/png"})
            assert answer.json()["predictions"][0][0]["label"] == "7"
        walk.watching = False
    assert {"api", "serving", "batching", "engine"} <= walk.rooms, "the walk was watched, in all threads"
    assert len(walk.rooms) <= MOST_ROOMS, sorted(walk.rooms)
