"""Requests beyond the queue are refused before anything is done for them; and the number of connections is bounded."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from server.api.middleware import connections
from server.api.middleware.admission import AdmissionMiddleware
from server.api.middleware.connections import RESERVED, limited
from server.batching.batcher import Batcher
from tests.api import api_server
from tests.api.api_server import Api, assert_problem, read_response, serving
from tests.serving.floor import PlainEngine, png, publish

HEADERS = {"content-type": "image/png"}
PATHS = ("/predict/fish", "/predict?task=fish", "/embed", "/tasks/fish/attention")


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Api]:
    """An engine that is at its first row, and all places before it taken."""
    with serving(tmp_path, max_batch=1, max_queue=2, max_images=2, request_timeout_s=60) as api, stuffed(api):
        yield api


class stuffed:  # noqa: N801  # reads as what it does
    def __init__(self, api: Api, **headers: str) -> None:
        self._api, self._headers, self._pool = api, {**HEADERS, **headers}, ThreadPoolExecutor(3)

    def __enter__(self) -> None:
        publish(self._api.floor.store)
        self._api.floor.engine.gate.clear()
        self._asked = [self._pool.submit(self._ask, 1)]
        assert self._api.floor.engine.entered.wait(60)
        self._asked += [self._pool.submit(self._ask, grey) for grey in (2, 3)]
        until(lambda: len(self._api.floor.batcher) == 2)

    def __exit__(self, *_: object) -> None:
        self._api.floor.engine.gate.set()
        assert [asked.result(60) for asked in self._asked] == [200, 200, 200]
        self._pool.shutdown()

    def _ask(self, grey: int) -> int:
        return self._api.http.post("/predict/fish", content=png(grey), headers=self._headers).status_code


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("path", PATHS)
def test_a_full_queue_is_told_before_the_body_comes(full: Api, path: str) -> None:
    """Not a byte of it is sent."""
    head = f"POST {path} HTTP/1.1\nHost: [::1]\nContent-Type: image/png\nContent-Length: 100000"
    status, got = full.raw(head=head)
    assert status == 429
    problem = json.loads(got.partition(b"\r\n\r\n")[2])
    assert problem["code"] == "queue_full"
    assert b"retry-after: 1" in got.lower()
    assert b"x-request-id: " + problem["request_id"].encode() in got.lower()


def test_it_is_told_in_a_dialects_words(full: Api) -> None:
    answer = full.http.post("/v2/models/fish/infer", content=b"{}")
    assert (answer.status_code, answer.headers["lensrack-code"]) == (429, "queue_full")
    assert int(answer.headers["retry-after"]) >= 1


def test_what_asks_nothing_of_the_engine_is_answered(full: Api) -> None:
    assert full.http.get("/tasks/fish").status_code == 200
    assert full.http.get("/readyz").status_code == 200


def test_refusals_are_counted_by_their_route(full: Api) -> None:
    def counted() -> float:
        lines = full.http.get("/metrics").text.splitlines()
        name = 'lensrack_requests_total{method="POST",route="/predict/{task}",status="429"} '
        return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))

    before = counted()
    assert_problem(full.http.post("/predict/fish", content=png(), headers=HEADERS), 429, "queue_full")
    assert counted() == before + 1


def test_strangers_are_not_told_how_full_it_is(tmp_path: Path) -> None:
    keys, token = tmp_path / "keys", "t" * 40
    keys.write_text(json.dumps({"id": "known", "scopes": ["predict"], "token": token}))
    with serving(tmp_path, keys_file=keys, max_batch=1, max_queue=2, max_images=2, request_timeout_s=60) as api:
        bearer = {"authorization": f"Bearer {token}"}
        with stuffed(api, **bearer):
            assert_problem(api.http.post("/predict/fish", content=png(), headers=HEADERS), 401, "unauthenticated")
            known = api.http.post("/predict/fish", content=png(), headers={**HEADERS, **bearer})
            assert_problem(known, 429, "queue_full")


def test_another_tenants_flood_sends_nobody_else_away(tmp_path: Path) -> None:
    keys, loud, quiet = tmp_path / "keys", "l" * 40, "q" * 40
    known = [
        {"id": "loud", "scopes": ["predict", "train"], "token": loud, "tasks": "f"},
        {"id": "quiet", "scopes": ["predict"], "token": quiet, "tasks": "q-"},
    ]
    keys.write_text("\n".join(map(json.dumps, known)))
    with (
        serving(tmp_path, keys_file=keys, max_batch=1, max_queue=2, max_images=2, request_timeout_s=60) as api,
        stuffed(api, authorization=f"Bearer {loud}"),
    ):
        for token, task, status, code in ((loud, "fish", 429, "queue_full"), (quiet, "q-fish", 404, "task_not_found")):
            headers = {**HEADERS, "authorization": f"Bearer {token}"}
            assert_problem(api.http.post(f"/predict/{task}", content=png(), headers=headers), status, code)


def test_another_tasks_flood_sends_no_quiet_task_away(full: Api) -> None:
    for path in ("/predict/{}", "/predict/{}@live", "/tasks/{}/attention", "/v2/models/{}/infer"):
        loud, quiet = (full.http.post(path.format(task), content=png(), headers=HEADERS) for task in ("fish", "bird"))
        assert loud.status_code == 429, path
        assert quiet.status_code != 429, path
    assert_problem(full.http.post("/predict/bird", content=png(), headers=HEADERS), 404, "task_not_found")


def test_requests_on_their_way_count_from_the_end_of_their_body(tmp_path: Path) -> None:
    """Their rows are not queued yet: their pictures are being decoded."""

    async def answers() -> list[int]:
        batcher, decoded = Batcher(PlainEngine(), max_batch=1, max_queue=2), asyncio.Event()

        async def route(scope: Scope, receive: Receive, send: Send) -> None:
            while (await receive()).get("more_body"):
                pass
            await decoded.wait()
            await Response(status_code=200)(scope, receive, send)

        admission = AdmissionMiddleware(route, batcher)
        slow = [asyncio.create_task(through(admission, whole=False)) for _ in range(9)]
        fast = [asyncio.create_task(through(admission, whole=True)) for _ in range(6)]
        done, _ = await asyncio.wait(fast, return_when=asyncio.FIRST_COMPLETED)
        assert [task.result() for task in done] == [429] * len(done)
        decoded.set()
        told = await asyncio.gather(*fast)
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        assert admission.in_flight == 0
        await batcher.drain(5)
        return told

    assert asyncio.run(answers()) == [200, 200, 200, 200, 429, 429]


async def through(admission: AdmissionMiddleware, *, whole: bool) -> int:
    """The status of one request; `whole`: its body is there with its head."""
    statuses: list[int] = []
    state = {"template": "/predict/{task}", "task": "fish", "request_id": "1"}
    scope = {"type": "http", "method": "POST", "path": "/predict/fish", "state": state}

    async def receive() -> Message:
        if not whole:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": b"x", "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await admission(scope, receive, send)
    return statuses[0]


# --- connections ------------------------------------------------------------------------------------------------------


@pytest.fixture
def crowded(tmp_path: Path) -> Iterator[tuple[Api, list[socket.socket]]]:
    """As many connections are open as may be, and each waits for an answer."""
    with serving(tmp_path, max_connections=5, max_batch=1) as api, ExitStack() as stack:
        publish(api.floor.store)
        api.floor.engine.gate.clear()
        held = [stack.enter_context(connected(api)) for _ in range(5)]
        for sock in held:
            head = f"POST /predict/fish HTTP/1.1\r\nHost: [::1]\r\nContent-Length: {len(png(1))}\r\n"
            sock.sendall(f"{head}Content-Type: image/png\r\n\r\n".encode() + png(1))
        until(lambda: len(api.floor.batcher) == 4)
        yield api, held
        api.floor.engine.gate.set()


def connected(api: Api) -> socket.socket:
    return socket.create_connection(("127.0.0.1", api.port), timeout=60)


def asked(sock: socket.socket, path: str) -> bytes:
    sock.sendall(f"GET {path} HTTP/1.1\r\nHost: [::1]\r\n\r\n".encode())
    return read_response(sock)


def code(got: bytes) -> str:
    return str(json.loads(got.partition(b"\r\n\r\n")[2])["code"])


def test_beyond_the_limit_only_probes_are_answered(crowded: tuple[Api, list[socket.socket]]) -> None:
    api, _ = crowded
    with connected(api) as probe, connected(api) as other:
        assert b" 200 " in asked(probe, "/readyz")
        got = asked(other, "/tasks")
        assert (b" 503 " in got, code(got)) == (True, "too_many_connections")
        assert b"retry-after: 1" in got.lower()
        assert b"connection: close" in got.lower()
        assert other.recv(1) == b""
        assert b" 200 " in asked(probe, "/healthz")


def test_far_beyond_it_nothing_is_read(crowded: tuple[Api, list[socket.socket]]) -> None:
    api, _ = crowded
    with ExitStack() as stack:
        for _ in range(RESERVED):
            stack.enter_context(connected(api))
        got = read_response(stack.enter_context(connected(api)))
        assert (b" 503 " in got, code(got)) == (True, "too_many_connections")


def test_who_has_been_idle_longest_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent connections, however many, take no place from a client that asks, nor from a balancer's probe."""
    monkeypatch.setattr(connections, "IDLE_S", 0.0)
    with serving(tmp_path, max_connections=5) as api, ExitStack() as stack:
        held = [stack.enter_context(connected(api)) for _ in range(5)]
        for sock in held[:4]:
            assert b" 200 " in asked(sock, "/healthz")
        held[4].sendall(b"GET /healthz HTTP/1.1\r\nHost:")  # begins a request and does not end it
        for _ in range(2 * RESERVED):
            stack.enter_context(connected(api))
        with connected(api) as sock:
            assert b" 200 " in asked(sock, "/tasks")
            assert b" 200 " in asked(sock, "/readyz")
        assert [sock.recv(1) for sock in held] == [b""] * 5


def test_one_address_holds_half_of_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A proxy's may hold all."""
    monkeypatch.setattr(api_server, "limited", lambda most, silence_s: limited(most, silence_s, proxies="10.0.0.1"))
    with serving(tmp_path, max_connections=8) as api, ExitStack() as stack:
        held = [stack.enter_context(connected(api)) for _ in range(4)]
        for sock in held:
            assert b" 200 " in asked(sock, "/healthz")
        got = read_response(stack.enter_context(connected(api)))
        assert (b" 503 " in got, code(got)) == (True, "too_many_connections")
        assert b" 200 " in asked(held[0], "/healthz")


def test_who_leaves_makes_room(crowded: tuple[Api, list[socket.socket]]) -> None:
    api, held = crowded
    api.floor.engine.gate.set()
    held[0].close()

    def there_is_room() -> bool:
        with connected(api) as sock:
            return b" 200 " in asked(sock, "/tasks")

    until(there_is_room)


def test_who_asks_nothing_is_hung_up_on(tmp_path: Path) -> None:
    with serving(tmp_path, body_timeout_s=0.3) as api:
        for beginning in (b"", b"GET /healthz HTTP/1.1\r\nHost:"):
            with socket.create_connection(("127.0.0.1", api.port), timeout=60) as sock:
                sock.sendall(beginning)
                assert sock.recv(1) == b""
