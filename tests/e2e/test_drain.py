"""SIGTERM to a real server at work: who is inside is answered, who waits is answered or told within the deadline, and
nothing keeps the process beyond it."""

from __future__ import annotations

import signal
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.datasets.test_dataset_store import noise, write_zip
from tests.e2e.faulty_redis import RedisProcess, Road
from tests.e2e.forked_server import forked
from tests.e2e.server_process import ServerProcess
from tests.e2e.test_engine_faults import ask
from tests.e2e.test_store_faults import LONG_S, ZIP, Client, until
from tests.serving.floor import png

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]


def rows(server: ServerProcess) -> dict[str, int]:
    """How many wait, and how many have been answered."""
    known = {"lensrack_queue_rows": "waiting", 'lensrack_rows_total{outcome="answered"}': "answered"}
    found = dict.fromkeys(known.values(), 0)
    for line in httpx.get(f"{server.url}/metrics", timeout=LONG_S).text.splitlines():
        name, _, value = line.rpartition(" ")
        if name in known:
            found[known[name]] = int(float(value))
    return found


def crowd(server: ServerProcess, pool: ThreadPoolExecutor, count: int) -> list[Future[httpx.Response]]:
    """So many pictures that take the engine 0.8 s each, all of which have come; those before it wait in the queue."""
    asked = [pool.submit(ask, server, "white") for _ in range(count)]
    until(lambda: sum(rows(server).values()) >= count - 1, "all have come, and one of them is inside")
    return asked


def job(server: ServerProcess, folder: Path) -> str:
    """One that nobody works on."""
    archive = write_zip(folder / "pictures.zip", noise(4)).read_bytes()
    dataset = httpx.post(f"{server.url}/datasets", content=archive, headers=ZIP, timeout=LONG_S).json()["id"]
    asked = {"task": "fish", "dataset": dataset, "method": "linear"}
    return str(httpx.post(f"{server.url}/train", json=asked, timeout=LONG_S).json()["id"])


def listen(server: ServerProcess, job_id: str, way: str) -> int:
    headers = {"accept": "text/event-stream"} if way == "stream" else {}
    path = f"/train/{job_id}/events?after=1&wait_s=30"
    with httpx.stream("GET", f"{server.url}{path}", headers=headers, timeout=LONG_S) as answer:
        answer.read()
    return answer.status_code


def outcomes(asked: list[Future[httpx.Response]]) -> list[tuple[int, str]]:
    answers = [one.result(LONG_S) for one in asked]
    return sorted((answer.status_code, answer.json().get("code", "")) for answer in answers)


def test_all_who_wait_are_answered_where_the_deadline_allows_it(tmp_path: Path) -> None:
    with (
        forked(tmp_path, fault="slow", max_batch="1", max_wait_s="0", drain_timeout_s="60") as server,
        ThreadPoolExecutor(5) as pool,
    ):
        listening = [pool.submit(listen, server, job(server, tmp_path), way) for way in ("stream", "page")]
        asked = crowd(server, pool, 3)
        assert server.stop() == 0, "who listens to a job that goes on elsewhere does not keep the server"
        assert outcomes(asked) == [(200, "")] * 3
        assert [one.result(LONG_S) for one in listening] == [200, 200]


def test_who_comes_while_others_are_still_being_answered_is_told_to_go_elsewhere(tmp_path: Path) -> None:
    """His request was under way before the signal, its body came after it: there is time, and no place any more."""
    with (
        forked(tmp_path, fault="slow", max_batch="1", max_wait_s="0", drain_timeout_s="60") as server,
        ThreadPoolExecutor(6) as pool,
    ):
        asked = crowd(server, pool, 6)
        place = httpx.URL(server.url)
        address, picture = (place.host, place.port or 0), png(7)
        with socket.create_connection(address, timeout=LONG_S) as late:
            head = (
                f"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: {len(picture)}"
            )
            late.sendall(f"{head}\r\n\r\n".encode() + picture[:9])
            server.process.send_signal(signal.SIGTERM)
            until(lambda: refused(address), "nobody new is let in")
            late.sendall(picture[9:])
            told = late.makefile("rb").read()
        assert told.startswith(b"HTTP/1.1 503 ")
        assert b'"shutting_down"' in told
        assert outcomes(asked) == [(200, "")] * 6
        assert server.process.wait(LONG_S) == 0


def refused(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=LONG_S).close()
    except ConnectionRefusedError:
        return True
    return False


def test_what_the_deadline_does_not_allow_is_told_and_nobody_is_left_without_an_answer(tmp_path: Path) -> None:
    """Half-open bodies and listeners do not keep the process either."""
    with (
        forked(tmp_path, fault="slow", max_batch="1", max_wait_s="0", drain_timeout_s="2") as server,
        ThreadPoolExecutor(9) as pool,
    ):
        asked = crowd(server, pool, 9)
        place = httpx.URL(server.url)
        with socket.create_connection((place.host, place.port or 0)) as half:
            half.sendall(
                b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 99\r\n\r\n\x89"
            )
            assert server.stop() == 0
        told = outcomes(asked)
        assert told[0] == (200, ""), "who was inside is answered"
        assert set(told[1:]) <= {(200, ""), (503, "shutting_down")}
        assert told.count((503, "shutting_down")) >= 4, "2 s are enough for four of nine"
        assert "Traceback" not in server.log


def test_a_version_that_is_being_loaded_keeps_no_server_from_leaving(tmp_path: Path) -> None:
    """Its store hangs: what is there is served to the last, who waits for the version is told, the process ends."""
    kept = RedisProcess(tmp_path, durable=False)
    kept.start()
    road = Road(kept.port)
    try:
        url = f"redis://127.0.0.1:{road.port}/0"
        with (
            forked(tmp_path / "home", store=url, drain_timeout_s="3", cache_bytes="1") as server,
            httpx.Client(base_url=server.url, timeout=LONG_S) as http,
            ThreadPoolExecutor(1) as pool,
        ):
            client = Client(http, http.get("/readyz").json()["backbone"]["fingerprint"])
            there, late = client.bundle("there", 1), client.bundle("late", 2)
            assert client.put(there).status_code == client.put(late).status_code == 201
            assert client.answers("there", there)
            road.broken = True
            loading = pool.submit(httpx.post, f"{server.url}/tasks/late/load", timeout=LONG_S)
            time.sleep(0.3)  # however far it has come: nothing of it comes back
            assert client.answers("there", there)
            assert not loading.done()
            ended = threading.Thread(target=server.process.wait, args=(LONG_S,))
            server.process.send_signal(signal.SIGTERM)
            ended.start()
            answer = loading.result(LONG_S)
            ended.join(LONG_S)
            assert server.process.poll() == 0
            assert (answer.status_code, answer.json()["code"]) in {(503, "store_unavailable"), (503, "shutting_down")}
    finally:
        road.close()
        kept.kill()
