"""Two engines behind one front end, in real processes: they answer as one does, share the tasks out, and when one is
killed under load nobody is told anything wrong."""

from __future__ import annotations

import http.client
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest

from prompts_store import Bundle
from tests.e2e.forked_server import forked
from tests.e2e.server_process import ServerProcess
from tests.e2e.test_engine_faults import ask
from tests.e2e.test_store_faults import LONG_S, Client, picture, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
TASKS = [f"task-{number}" for number in range(8)]
IMAGE = {"content-type": "image/png"}
SILENT_S = 5.5  # longer than uvicorn would wait by itself


@dataclass
class House:
    server: ServerProcess
    client: Client
    kept: http.client.HTTPConnection  # opened at the start, and silent since
    silent_since: float

    def get(self, path: str) -> Any:
        return self.client.http.get(path).json()

    def metric(self, name: str) -> float:
        lines = self.client.http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} "))

    def pid(self, name: str) -> int:
        return int(re.findall(rf"{name}: pid (\d+)", self.server.log)[-1])

    def answer(self, task: str) -> Any:
        told = self.client.ask(task)
        assert told.status_code == 200, told.text
        return told.json()

    def homes(self) -> dict[str, set[int]]:
        """The engines that each task's lenses are at: racks are numbered through."""
        rack = self.get("/rack")
        found: dict[str, set[int]] = {}
        for seat in rack["seats"]:
            found.setdefault(seat["task"], set()).add(seat["slot"] * 2 // rack["slots"])
        return found


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """At its end it is asked to, while somebody waits for each of its engines. Batches are of one row: the last digit
    of an answer may depend on how many rows were multiplied at once, and who comes together is chance."""
    home = tmp_path_factory.mktemp("devices")
    with (
        forked(
            home, fronts="1", devices="cpu,cpu", fault="slow", max_batch="1", drain_timeout_s="60", max_wait_s="0"
        ) as server,
        httpx.Client(base_url=server.url, timeout=LONG_S) as http_client,
        ThreadPoolExecutor(4) as pool,
    ):
        client = Client(http_client, http_client.get("/readyz").json()["backbone"]["fingerprint"])
        for seed, task in enumerate(TASKS):
            assert client.put(client.bundle(task, seed)).status_code == 201
        kept = http.client.HTTPConnection(*server.url.removeprefix("http://").split(":"), timeout=LONG_S)
        assert healthy(kept)
        with closing(kept):
            yield House(server, client, kept, time.monotonic())
        asked = [pool.submit(ask, server, "white") for _ in range(4)]
        until(lambda: http_client.get("/rack").json()["queued"] or all(one.done() for one in asked), "some wait")
        assert server.stop() == 0
        assert [one.result(LONG_S).status_code for one in asked] == [200] * 4
        assert "Traceback" not in server.log


def healthy(connection: http.client.HTTPConnection) -> bool:
    connection.request("GET", "/healthz")
    response = connection.getresponse()
    return bool(response.read()) and response.status == 200


def test_counts_are_sums_over_both(house: House) -> None:
    """The first questions that anybody asks: each row is counted once, whichever engine had it."""
    for task in TASKS * 3:
        house.answer(task)
    rows = 'lensrack_rows_total{outcome="answered"}'
    until(lambda: house.metric(rows) == 3 * len(TASKS), "both engines' counts are told")
    assert house.get("/rack")["rows"]["answered"] == 3 * len(TASKS)
    assert house.get("/rack")["loads"] == len(TASKS)


def test_it_answers_as_one_process_does_to_the_last_digit(house: House, tmp_path: Path) -> None:
    questions = [*(f"/predict/{task}?top_k=3" for task in TASKS), "/embed", f"/tasks/{TASKS[0]}/attention"]

    def answers(url: str) -> list[bytes]:
        given = [httpx.post(f"{url}{one}", content=picture(), headers=IMAGE, timeout=LONG_S) for one in questions]
        assert [one.status_code for one in given] == [200] * len(questions), [one.text for one in given]
        return [one.content for one in given]

    with forked(tmp_path, fronts="0", max_batch="1", store=f"file://{house.server.home / 'store'}") as whole:
        alone, together = answers(whole.url), scores(whole.url)
    assert answers(house.server.url) == alone
    for task in TASKS:  # on both from now on
        assert house.client.http.post(f"/tasks/{task}/pin", json={"pinned": True}).status_code == 200
    with ThreadPoolExecutor(8) as pool:
        for given in pool.map(answers, [house.server.url] * 8):
            assert given == alone
        for one in pool.map(scores, [house.server.url] * 8):  # rows of one picture go together as they come
            assert one == pytest.approx(together, abs=1e-6)
    for task in TASKS:
        house.client.http.post(f"/tasks/{task}/pin", json={"pinned": False})


def scores(url: str) -> dict[str, float]:
    """What all tasks say of one picture, asked at once: by task and label."""
    question = f"{url}/predict?{'&'.join(f'task={task}' for task in TASKS)}"
    told = httpx.post(question, content=picture(), headers=IMAGE, timeout=LONG_S)
    assert told.status_code == 200, told.text
    results = told.json()["results"]
    return {f"{task} {one['label']}": one["score"] for task in TASKS for one in results[task]["predictions"][0]}


def test_racks_add_up_and_what_is_done_by_hand_is_done_to_all(house: House) -> None:
    post = house.client.http.post
    for task in TASKS:
        unloaded = post(f"/tasks/{task}/unload").json()
        assert (unloaded["resident"], unloaded["bytes"]) == (False, 0)
    assert house.homes() == {}
    for task in TASKS:
        house.answer(task)
    homes = house.homes()
    assert {task: len(at) for task, at in homes.items()} == dict.fromkeys(TASKS, 1)
    assert set.union(*homes.values()) == {0, 1}
    until(lambda: house.metric("lensrack_rack_lenses") == len(TASKS), "the gauge is of both")
    assert house.metric("lensrack_rack_slots") == house.get("/rack")["slots"] == 2048
    assert post(f"/tasks/{TASKS[0]}/pin", json={"pinned": True}).json()["pinned"] is True
    assert house.homes()[TASKS[0]] == {0, 1}
    assert sum(seat["pinned"] for seat in house.get("/rack")["seats"]) == 2
    assert post(f"/tasks/{TASKS[0]}/pin", json={"pinned": False}).json()["pinned"] is False


def test_an_alias_that_moves_is_never_answered_with_anothers_labels(house: House) -> None:
    """Under load that both engines answer, each answer is the one that its version gives when it is asked by name."""
    one, other = (renamed(house.client.bundle("moving", seed), f"of {seed} ") for seed in (100, 101))
    expected = {}
    for bundle in (one, other):
        assert house.client.put(bundle).status_code == 201
        expected[bundle.version] = house.answer(f"moving@{bundle.version}")["predictions"]
    with asking(lambda: house.client.ask("moving"), 6) as answers:
        for bundle in (one, other) * 3:
            assert house.client.move("moving", bundle).status_code == 200
            until(lambda bundle=bundle: house.client.answers("moving", bundle), "it has moved")
            seen = len(answers)
            until(lambda seen=seen: len(answers) > seen + 12, "it is asked")
    assert {answer.status_code for answer in answers} == {200}
    told = {(answer.json()["version"], str(answer.json()["predictions"])) for answer in answers}
    assert told == {(version, str(predictions)) for version, predictions in expected.items()}
    assert house.homes()["moving"] == {0, 1}, "both have answered"


@pytest.mark.parametrize("name", ["engine-0", "engine-1"])
def test_an_engine_that_is_killed_under_load_is_not_missed_for_long(house: House, name: str) -> None:
    expected = {task: house.answer(task) for task in TASKS}
    before = house.pid(name)
    with asking(lambda: house.client.http.get("/readyz"), 1) as readiness, everybody(house) as answers:
        until(lambda: len(answers) > 50, "they are asking")
        os.kill(before, signal.SIGKILL)
        for task in TASKS:
            until(lambda task=task: house.client.ask(task).status_code == 200, "the other one answers")
        until(lambda: house.pid(name) != before, "it is forked anew")
        until(lambda: house.get("/readyz")["checks"]["engine"] == "ok", "and found again")
        seen = len(answers)
        until(lambda: len(answers) > seen + 50, "they go on asking")
    assert {one.status_code for one in readiness} == {200}, "one of them lives"
    right = [one.json() for one in answers if one.status_code == 200]
    assert all(answer == expected[answer["task"]] for answer in right)
    refused = [one for one in answers if one.status_code != 200]
    told = {(one.status_code, one.json()["code"], one.headers["Retry-After"]) for one in refused}
    assert told <= {(503, "engine_unavailable", "5")}
    assert {task: house.answer(task) for task in TASKS} == expected, "nothing was quarantined on its account"
    assert house.metric("lensrack_engine_up") == 1


def test_a_silent_connection_is_still_there(house: House) -> None:
    """Clients and proxies keep theirs for 5 s or 60: who closes at the same moment breaks a request."""
    time.sleep(max(0.0, house.silent_since + SILENT_S - time.monotonic()))
    assert healthy(house.kept)


def test_several_devices_need_front_ends_and_one_kind(tmp_path: Path) -> None:
    for told, wrong in (("LENSRACK_FRONTS", {"fronts": "0", "devices": "cpu,cpu"}),
                        ("LENSRACK_DEVICES: expected", {"fronts": "1", "devices": "cpu,cuda:0"})):  # fmt: skip
        with pytest.raises(AssertionError, match="the server ended with 1") as caught, forked(tmp_path, **wrong):
            pass
        assert told in str(caught.value)
        assert "Traceback" not in str(caught.value)


# --- who asks ---------------------------------------------------------------------------------------------------------


def renamed(bundle: Bundle, beginning: str) -> Bundle:
    labels = tuple(beginning + label for label in bundle.manifest.labels)
    return Bundle.build(replace(bundle.manifest, labels=labels), bundle.tensors)


@contextmanager
def asking(question: Callable[[], httpx.Response], crowd: int) -> Iterator[list[httpx.Response]]:
    """So many ask one question after another as long as this lasts; all that they were told."""
    answers: list[httpx.Response] = []
    enough = threading.Event()

    def one() -> None:
        while not enough.is_set():
            answers.append(question())

    with ThreadPoolExecutor(crowd) as pool:
        running = [pool.submit(one) for _ in range(crowd)]
        try:
            yield answers
        finally:
            enough.set()
        for each in running:
            each.result(LONG_S)


@contextmanager
def everybody(house: House) -> Iterator[list[httpx.Response]]:
    """A crowd that asks all tasks in turn."""
    turns = count()

    def question() -> httpx.Response:
        return house.client.ask(TASKS[next(turns) % len(TASKS)])

    with asking(question, 6) as answers:
        yield answers
