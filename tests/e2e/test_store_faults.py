"""Stores that fail under a running server: a disk that is full or read-only; a Redis that is slow, cut off, flushed or
killed. What is resident answers on, what cannot be written is refused with a reason, and nothing stays broken."""

from __future__ import annotations

import io
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import redis
from PIL import Image

from prompts_store import Backbone, Bundle, Manifest, Preprocess
from tests.datasets.test_dataset_store import noise, write_zip
from tests.e2e.faulty_redis import RedisProcess, Road
from tests.e2e.forked_server import forked

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
LONG_S = 60
ZIP = {"content-type": "application/zip"}


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "teal").save(file, "PNG")
    return file.getvalue()


@dataclass
class Client:
    """Somebody who asks, publishes and looks on."""

    http: httpx.Client
    fingerprint: str

    def bundle(self, task: str, seed: int, classes: int = 3) -> Bundle:
        manifest = Manifest(
            task=task, method="linear", backbone=Backbone("untrained", self.fingerprint),
            labels=tuple(f"label {number}" for number in range(classes)), prompt_lengths=(0,) * 6,
            preprocess=Preprocess(96, (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center"), metrics={}, recipe={},
            dataset=None, parent=None, created_at=float(seed), lensrack_version="0.1.0",
        )  # fmt: skip
        weight = np.random.default_rng(seed).standard_normal((classes, 192), dtype=np.float32)
        return Bundle.build(manifest, {"head.weight": weight, "head.bias": np.zeros(classes, np.float32)})

    def put(self, bundle: Bundle) -> httpx.Response:
        headers = {"content-type": "application/octet-stream"}
        path = f"/tasks/{bundle.manifest.task}/versions?alias=live"
        return self.http.put(path, content=bundle.data, headers=headers)

    def move(self, task: str, bundle: Bundle) -> httpx.Response:
        return self.http.put(f"/tasks/{task}/aliases/live", json={"version": bundle.version})

    def ask(self, task: str) -> httpx.Response:
        return self.http.post(f"/predict/{task}", content=picture(), headers={"content-type": "image/png"})

    def answers(self, task: str, bundle: Bundle) -> bool:
        answer = self.ask(task)
        return answer.status_code == 200 and answer.json()["version"] == bundle.version


@contextmanager
def serving(home: Path, **settings: str) -> Iterator[Client]:
    with forked(home, watch_s="0.2", **settings) as server, httpx.Client(base_url=server.url, timeout=LONG_S) as http:
        yield Client(http, http.get("/readyz").json()["backbone"]["fingerprint"])


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} within {LONG_S} s"
        time.sleep(0.05)


def refused(answer: httpx.Response, *codes: str) -> bool:
    """With a status, a code and no word of paths or hosts."""
    assert answer.status_code in (503, 507), answer.text
    assert answer.json()["code"] in codes, answer.text
    assert "/tmp" not in answer.text
    assert "127.0.0.1" not in answer.text
    assert answer.status_code == 507 or int(answer.headers["Retry-After"]) >= 1
    return True


# --- the disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(filler: Path) -> None:
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(65536)):
            pass


def test_a_disk_that_is_full(small_disk: Path, tmp_path: Path) -> None:
    home = small_disk / "home"
    archive = write_zip(tmp_path / "pictures.zip", noise(40)).read_bytes()
    with serving(home) as client:
        kept = client.bundle("kept", 1)
        assert client.put(kept).status_code == 201
        assert client.answers("kept", kept)
        filler = small_disk / "filler"
        fill(filler)
        full = [
            client.put(client.bundle("large", 2, classes=2000)),
            client.http.post("/datasets", content=archive, headers=ZIP),
        ]
        assert all(refused(answer, "disk_full") for answer in full)
        assert client.answers("kept", kept)
        assert client.ask("large").status_code == 404, "nothing is there by halves"
        filler.unlink()
        large = client.bundle("large", 2, classes=2000)
        assert client.put(large).status_code == 201
        assert client.answers("large", large)
        assert client.http.post("/datasets", content=archive, headers=ZIP).status_code == 201
        assert "Traceback" not in (home / "server.log").read_text()


def remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)


def test_a_store_that_becomes_read_only(small_disk: Path, tmp_path: Path) -> None:
    """The store lies alone there: while a file is open for writing the kernel would refuse."""
    with serving(tmp_path / "home", store=f"file://{small_disk / 'store'}") as client:
        kept, late = client.bundle("kept", 1), client.bundle("late", 2)
        assert client.put(kept).status_code == 201
        remount(small_disk, "ro")
        assert refused(client.put(late), "store_unavailable")
        assert refused(client.move("kept", kept), "store_unavailable")
        assert client.answers("kept", kept), "what was not resident is read and answered"
        remount(small_disk, "rw")
        assert client.put(late).status_code == 201
        assert client.answers("late", late)


# --- Redis ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def roads() -> Iterator[list[Road]]:
    made: list[Road] = []
    yield made
    for road in made:
        road.close()


@pytest.fixture
def servers() -> Iterator[list[RedisProcess]]:
    made: list[RedisProcess] = []
    yield made
    for process in made:
        process.kill()


def store_up(client: Client) -> bool:
    return 'lensrack_store_up{store="bundles"} 1.0' in client.http.get("/metrics").text


@pytest.mark.long
def test_a_redis_that_is_slow_then_cut_off_then_killed(
    tmp_path: Path, roads: list[Road], servers: list[RedisProcess]
) -> None:
    """With an append-only file: what was acknowledged is there again."""
    servers.append(kept := RedisProcess(tmp_path, durable=True))
    kept.start()
    roads.append(road := Road(kept.port))
    url = f"redis://127.0.0.1:{road.port}/0"
    with serving(tmp_path / "home", store=url, jobs=url, rack_slots="2") as client:
        first, second = client.bundle("fish", 1), client.bundle("fish", 2)
        others = [client.bundle(f"task-{number}", number) for number in range(3)]
        assert [client.put(one).status_code for one in others] == [201] * 3
        assert client.put(first).status_code == 201
        assert client.answers("fish", first)
        road.delay_s = 0.2
        assert client.put(second).status_code == 201, "slow is not away"
        assert client.answers("fish", second)
        road.delay_s = 0.0
        with Asker(client, others) as asker:
            asker.goes_on()
            road.broken = True
            asker.goes_on()
        assert client.answers("fish", second)
        assert refused(client.move("fish", first), "store_unavailable")
        assert refused(client.http.get("/train"), "store_unavailable")
        until(lambda: not store_up(client), "the metrics tell of it")
        assert client.answers("fish", second)
        road.broken = False
        until(lambda: store_up(client), "the store is back")
        assert client.move("fish", first).status_code == 200
        assert client.answers("fish", first)
        kept.kill()
        assert client.answers("fish", first)
        kept.start()
        until(lambda: store_up(client), "the store is back")
        assert [one["version"] for one in client.http.get("/tasks/fish/versions").json()["versions"]] == [
            second.version, first.version
        ]  # fmt: skip
        third = client.bundle("fish", 3)
        until(lambda: client.put(third).status_code == 201, "it can be written again")
        until(lambda: client.answers("fish", third), "what is published is answered by")


def test_a_redis_that_forgets_everything(tmp_path: Path, servers: list[RedisProcess]) -> None:
    """Flushed, and killed without persistence: the tasks are gone, which is told; publishing makes them anew."""
    servers.append(forgetful := RedisProcess(tmp_path, durable=False))
    forgetful.start()
    url = f"redis://127.0.0.1:{forgetful.port}/0"
    with serving(tmp_path / "home", store=url, jobs=url) as client:
        fish = client.bundle("fish", 1)
        for forget in (flushed, killed):
            until(lambda: client.put(fish).status_code == 201, "it can be published")
            until(lambda: client.answers("fish", fish), "it answers")
            forget(forgetful)
            until(lambda: client.ask("fish").status_code == 404, "it is told to be gone")


class Asker(threading.Thread):
    """Somebody who asks tasks in turns until told otherwise; on a rack that holds fewer each question evicts one."""

    def __init__(self, client: Client, bundles: Sequence[Bundle]) -> None:
        super().__init__(daemon=True)
        self.client, self.bundles = client, bundles
        self.done, self.asked = threading.Event(), 0
        self.odd: list[str] = []

    def run(self) -> None:
        while not self.done.is_set():
            bundle = self.bundles[self.asked % len(self.bundles)]
            answer = self.client.ask(bundle.manifest.task)
            if answer.status_code != 200 or answer.json()["version"] != bundle.version:
                self.odd.append(answer.text)
            self.asked += 1

    def goes_on(self) -> None:
        before = self.asked
        until(lambda: self.asked >= before + 8, "questions are answered")
        assert self.odd == []

    def __enter__(self) -> Asker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.join(LONG_S)


def test_a_redis_whose_replica_takes_over(tmp_path: Path, roads: list[Road], servers: list[RedisProcess]) -> None:
    """The address moves, as a failover makes it: tasks are asked, evicted and loaded all the while, and afterwards
    everything that was acknowledged is there and can be changed."""
    servers.append(master := RedisProcess(tmp_path / "master", durable=False))
    master.start()
    servers.append(replica := RedisProcess(tmp_path / "replica", durable=False, replica_of=master.port))
    replica.start()
    roads.append(road := Road(master.port))
    url = f"redis://127.0.0.1:{road.port}/0"
    with serving(tmp_path / "home", store=url, jobs=url, rack_slots="2") as client:
        bundles = [client.bundle(f"task-{number}", number) for number in range(4)]
        assert [client.put(one).status_code for one in bundles] == [201] * 4
        with Asker(client, bundles) as asker:
            asker.goes_on()
            until(lambda: replica.in_step_with(master), "the replica has everything")
            master.kill()
            asker.goes_on()
            assert refused(client.put(client.bundle("task-0", 9)), "store_unavailable")
            asker.goes_on()
            replica.promote()
            road.to = replica.port
            until(lambda: store_up(client), "the store is back")
            asker.goes_on()
        assert [one["task"] for one in client.http.get("/tasks").json()["tasks"]] == [f"task-{n}" for n in range(4)]
        assert client.http.get("/rack").json()["evictions"] > 8, "somebody was evicted all the while"
        renewed = client.bundle("task-0", 9)
        until(lambda: client.put(renewed).status_code == 201, "it can be written")
        until(lambda: client.answers("task-0", renewed), "what is published is answered by")
        history = client.http.get("/tasks/task-0/aliases/live/history").json()["changes"]
        assert len(history) == 2, "what was before the failover is known"
        assert client.http.get("/train").status_code == 200


def flushed(server: RedisProcess) -> None:
    with redis.Redis(port=server.port) as client:
        client.flushall()


def killed(server: RedisProcess) -> None:
    server.kill()
    server.start()
