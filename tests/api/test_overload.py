"""More than the engine can do: everybody is answered, in time or with when to come back; the queue stays bounded, and
nothing is left of those who went away or never came whole."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.observability import metrics
from server.serving import decoding
from tests.api.api_server import Api, serving
from tests.serving.floor import png, publish

PLACES, CLIENTS = 16, 300
HEADERS = {"content-type": "image/png"}


@pytest.fixture
def narrow(tmp_path: Path) -> Iterator[Api]:
    """An engine that takes a few milliseconds a batch of four, and sixteen places before it."""
    own = {"request_timeout_s": 300.0}  # longer than any test waits: what ends here has not ended by itself
    with serving(tmp_path, max_batch=4, max_queue=PLACES, max_images=4, **own) as api:
        publish(api.floor.store)
        run = api.floor.engine.run

        def slower(work):
            time.sleep(0.01)
            return run(work)

        api.floor.engine.run = slower  # type: ignore[method-assign]
        yield api


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def nothing_is_left(api: Api) -> bool:
    batcher = api.floor.batcher
    return (len(batcher), len(batcher._reservations), api.floor.shelf.in_use) == (0, 0, 0)


def answered() -> float:
    return metrics.REGISTRY.get_sample_value("lensrack_rows_total", {"outcome": "answered"}) or 0.0


async def flood(url: str) -> list[httpx.Response]:
    """All at once, over as many connections."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits, headers=HEADERS) as client:
        asked = [asyncio.create_task(client.post("/predict/fish", content=png(grey % 200))) for grey in range(CLIENTS)]
        return await asyncio.gather(*asked)


def test_a_flood_is_answered_to_the_last(narrow: Api) -> None:
    scheduler, longest, before = narrow.floor.batcher._scheduler, 0, answered()
    offer = scheduler.offer

    def watched(row):
        nonlocal longest
        offer(row)
        longest = max(longest, len(scheduler))

    scheduler.offer = watched  # type: ignore[method-assign]
    got = asyncio.run(flood(narrow.url))
    told = Counter(answer.status_code for answer in got)
    assert set(told) == {200, 429}
    assert sum(told.values()) == CLIENTS
    assert told[200] >= PLACES
    assert answered() - before == told[200], "a row was lost, or computed for nobody"
    assert 0 < longest <= PLACES
    for answer in got:
        if answer.status_code == 429:
            assert answer.json()["code"] == "queue_full"
            assert 1 <= int(answer.headers["Retry-After"]) <= 60
        else:
            assert answer.json()["version"] == answer.headers["Lensrack-Version"]
    until(lambda: nothing_is_left(narrow), "something is left in the queue")
    narrow.floor.batcher.check_integrity()


def test_sockets_that_are_half_open_hold_no_rows(narrow: Api) -> None:
    head = b"POST /predict/fish HTTP/1.1\r\nHost: [::1]\r\nContent-Type: image/png\r\nContent-Length: 100000\r\n\r\n"
    held = [socket.create_connection(("127.0.0.1", narrow.port)) for _ in range(5 * PLACES)]
    try:
        for number, sock in enumerate(held):
            sock.sendall((head + b"\x89PNG")[: 20 + 3 * number])
        for _ in range(PLACES):
            assert narrow.http.post("/predict/fish", content=png(), headers=HEADERS).status_code == 200
        assert nothing_is_left(narrow)
    finally:
        for sock in held:
            sock.close()


class Held:
    """A step of the server that is held up: `entered` once somebody is in it, going on when `gate` is set."""

    def __init__(self, work: Callable[..., Any]) -> None:
        self._work, self.entered, self.gate = work, threading.Event(), threading.Event()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.entered.set()
        assert self.gate.wait(60)
        return self._work(*arguments, **options)


def held_up(api: Api, stage: str, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """What is set when somebody has come as far as the stage, and what lets everybody go on."""
    if stage in ("the queue", "the engine"):
        api.floor.engine.gate.clear()
        return api.floor.engine.entered, api.floor.engine.gate
    if stage == "the seat":
        step = Held(api.floor.store.get)
        monkeypatch.setattr(api.floor.store, "get", step)
    else:
        step = Held(decoding.model_input)
        monkeypatch.setattr(decoding, "model_input", step if stage == "decoding" else step._work)
    if stage == "the body":
        step.entered.set()
    return step.entered, step.gate


@pytest.mark.parametrize("stage", ["the body", "the seat", "decoding", "the queue", "the engine"])
def test_who_leaves_takes_the_row_along(narrow: Api, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of theirs is kept: no row, no room in the queue, no seat, no work for a thread, no file descriptor."""
    body, until_closed = png(), descriptors() + 2  # the client's own connection, from both ends
    head = (
        f"POST /predict/fish HTTP/1.1\r\nHost: [::1]\r\nContent-Type: image/png\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    sent = head.encode() + (body[:20] if stage == "the body" else body)
    entered, gate = held_up(narrow, stage, monkeypatch)
    clients = [socket.create_connection(("127.0.0.1", narrow.port)) for _ in range(8)]
    for sock in clients:
        sock.sendall(sent)
    assert entered.wait(60)
    if stage == "the queue":
        until(lambda: len(narrow.floor.batcher) > 0, "no row waits")
    for sock in clients:
        sock.close()
    if stage in ("the seat", "decoding"):
        until(lambda: len(narrow.floor.batcher._reservations) == 0, "room is kept for nobody while the step goes on")
    gate.set()
    until(lambda: nothing_is_left(narrow), f"a row is left by who left in {stage}")
    assert narrow.http.post("/predict/fish", content=body, headers=HEADERS).status_code == 200
    until(narrow.floor.pool._work_queue.empty, "pictures of nobody wait to be decoded")
    until(lambda: descriptors() <= until_closed, "a connection was not closed")
    narrow.floor.batcher.check_integrity()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
