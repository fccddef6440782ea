"""A server in several real processes: it answers as one does, and whichever of them is killed, hangs or is asked to
end, nobody is left without an answer, nothing is left behind, and no count is lost."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.forked_server import forked
from tests.e2e.server_process import ServerProcess
from tests.e2e.test_engine_faults import ask
from tests.e2e.test_store_faults import LONG_S, Client, picture, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@dataclass
class House:
    """A server of two front ends, and a client of it."""

    server: ServerProcess
    client: Client

    def pid(self, name: str) -> int:
        """The present process of a name, as the log tells."""
        return int(re.findall(rf"{name}: pid (\d+)", self.server.log)[-1])

    def kill(self, name: str) -> None:
        """And wait until there is another."""
        before = self.pid(name)
        os.kill(before, signal.SIGKILL)
        until(lambda: self.pid(name) != before, f"{name} is forked anew")

    def metric(self, name: str) -> float:
        """Each time from a connection of its own, and so from any of the front ends."""
        for line in httpx.get(f"{self.server.url}/metrics", timeout=LONG_S).text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.rpartition(" ")[2])
        return 0.0

    @property
    def ready(self) -> bool:
        return httpx.get(f"{self.server.url}/readyz", timeout=LONG_S).status_code == 200


def known(url: str, task: str) -> bool:
    """By whichever front end is asked: a client that keeps its connection would ask the same one again and again."""
    asked = partial(httpx.post, f"{url}/predict/{task}", content=picture(), headers={"content-type": "image/png"})
    return all(asked(timeout=LONG_S).status_code == 200 for _ in range(8))


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    home = tmp_path_factory.mktemp("house")
    with (
        forked(home, fronts="2", fault="slow", max_batch="1", request_timeout_s="60", max_wait_s="0") as server,
        httpx.Client(base_url=server.url, timeout=LONG_S) as http,
    ):
        client = Client(http, http.get("/readyz").json()["backbone"]["fingerprint"])
        for seed, task in enumerate(("fish", "birds")):
            assert client.put(client.bundle(task, seed)).status_code == 201
        until(lambda: all(known(server.url, task) for task in ("fish", "birds")), "both are known everywhere")
        yield House(server, client)


def test_it_answers_as_one_process_does_to_the_last_digit(house: House, tmp_path: Path) -> None:
    home = house.server.home
    headers = {"content-type": "image/png"}
    questions = ("/predict/fish?top_k=3", "/predict?task=fish&task=birds", "/embed", "/tasks/fish/attention")

    def answers(url: str) -> list[object]:
        given = [httpx.post(f"{url}{one}", content=picture(), headers=headers, timeout=LONG_S) for one in questions]
        assert [one.status_code for one in given] == [200] * len(questions), [one.text for one in given]
        return [one.json() for one in given]

    # rows that share a batch may round otherwise than alone: both take one at a time
    with forked(tmp_path, store=f"file://{home / 'store'}", fronts="0", max_batch="1") as whole:
        assert answers(whole.url) == answers(house.server.url)


def test_residency_is_told_and_moved_across_processes(house: House) -> None:
    http = house.client.http
    assert http.post("/tasks/fish/pin", json={"pinned": True}).json()["pinned"] is True
    assert http.post("/tasks/fish/pin", json={"pinned": False}).json()["pinned"] is False
    unloaded = http.post("/tasks/fish/unload").json()
    assert (unloaded["resident"], unloaded["bytes"]) == (False, 0)
    loaded = http.post("/tasks/fish/load").json()
    assert loaded["resident"] is True
    assert loaded["bytes"] > 0
    assert "fish" in {seat["task"] for seat in http.get("/rack").json()["seats"]}
    before = http.get("/rack").json()["forwards"]
    assert house.client.ask("fish").status_code == 200
    assert http.get("/rack").json()["forwards"] == before + 1, "of this moment, although another process counts them"


def test_counts_are_sums_over_all_processes(house: House) -> None:
    """Rows are counted by the engine, requests by whichever front end answered."""
    rows, requests = 'lensrack_rows_total{outcome="answered"}', (
        'lensrack_requests_total{method="POST",route="/embed",status="200"}'
    )  # fmt: skip
    before = [house.metric(rows), house.metric(requests)]
    with ThreadPoolExecutor(8) as pool:
        assert {one.status_code for one in pool.map(lambda _: ask(house.server, "black"), range(24))} == {200}
    for name, was in zip((rows, requests), before, strict=True):
        until(lambda name=name, was=was: house.metric(name) >= was + 24, f"{name} has grown by 24")
    assert house.metric("lensrack_engine_up") == 1


def test_a_front_end_that_is_killed_takes_only_its_own_along(house: House) -> None:
    """Its rows leave the queue, and what it had counted is not lost."""
    requests = 'lensrack_requests_total{method="POST",route="/embed",status="200"}'
    assert ask(house.server, "black").status_code == 200
    until(lambda: house.metric(requests) >= 1, "it is counted")
    counted = house.metric(requests)
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(ask, house.server, "white") for _ in range(6)]
        until(lambda: waiting(house.server) >= 2, "some wait")
        house.kill("front-0")
        failed = [one for one in asked if one.exception(LONG_S) is not None]
        assert {one.result().status_code for one in asked if one not in failed} <= {200}
    until(lambda: waiting(house.server) == 0, "nothing is left in the queue")
    assert ask(house.server, "black").status_code == 200
    assert house.client.ask("fish").status_code == 200
    assert house.metric(requests) >= counted


def test_an_engine_that_is_killed_is_told_of_and_comes_back(house: House) -> None:
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(ask, house.server, "white") for _ in range(3)]
        until(lambda: waiting(house.server) >= 1, "some wait")
        house.kill("engine")
        answers = [one.result(LONG_S) for one in asked]
    told = {(one.status_code, one.json()["code"]) for one in answers if one.status_code != 200}
    assert told == {(503, "engine_unavailable")}
    assert {one.headers["Retry-After"] for one in answers if one.status_code == 503} == {"5"}
    until(lambda: house.ready, "it is ready again")
    until(lambda: house.client.ask("fish").status_code == 200, "and answers")
    assert house.client.ask("birds").json()["task"] == "birds", "nothing was quarantined on its account"


def test_an_engine_that_hangs_is_replaced_and_the_server_stays(tmp_path: Path) -> None:
    own = {"fronts": "1", "engine_timeout_s": "1", "drain_timeout_s": "2", "request_timeout_s": str(LONG_S)}
    with forked(tmp_path, fault="hang", **own) as server:
        with ThreadPoolExecutor(1) as pool:
            inside = pool.submit(ask, server, "white").result(LONG_S)
        assert (inside.status_code, inside.json()["code"]) == (503, "engine_unavailable")
        until(lambda: "engine (pid" in server.log, "the engine's process has ended itself")
        assert re.search(r"engine \(pid \d+\) ended with 70", server.log)
        until(lambda: ask(server, "black").status_code == 200, "another one answers")
        assert server.process.poll() is None
        assert server.stop() == 0


def test_sigterm_answers_who_waits_and_nothing_remains(tmp_path: Path) -> None:
    with (
        forked(tmp_path, fronts="2", workers="1", fault="slow", max_batch="1", drain_timeout_s="60") as server,
        ThreadPoolExecutor(3) as pool,
    ):
        family = family_of(server)
        asked = [pool.submit(ask, server, "white") for _ in range(3)]
        until(lambda: waiting(server) == 2, "one is inside, two wait")
        assert server.stop() == 0
        assert [one.result(LONG_S).status_code for one in asked] == [200, 200, 200]
        assert gone(family)
        assert "Traceback" not in server.log


def test_a_parent_that_is_killed_leaves_no_orphan(tmp_path: Path) -> None:
    """With a worker, and an engine that holds the interpreter's lock, so that nothing of Python could notice."""
    with forked(tmp_path, fronts="2", workers="1", fault="hold", engine_timeout_s="0") as server:
        until(lambda: len(family_of(server)) == 4, "a worker, an engine and two front ends")
        family = family_of(server)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask, server, "white")
            time.sleep(0.5)  # it is inside by then; were it not, nobody could be left behind either
            server.kill()
            until(lambda: gone(family), "all have ended")
            assert asked.exception(LONG_S) is not None


def test_what_cannot_start_says_why_and_ends(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="the server ended with 1") as caught,
        forked(tmp_path, fronts="2", jobs="what://ever"),
    ):
        pass
    assert "the server cannot start: LENSRACK_JOBS" in str(caught.value)


def waiting(server: ServerProcess) -> int:
    """Rows in the queue, the one inside the engine not among them."""
    return int(httpx.get(f"{server.url}/rack", timeout=LONG_S).json()["queued"])


def family_of(server: ServerProcess) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def gone(family: list[psutil.Process]) -> bool:
    return not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in family)
