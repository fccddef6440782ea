"""What only the Redis job store can get wrong: its keys, the way to the server, and what the server refuses."""

from __future__ import annotations

import json
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest
import redis

from server.errors import DiskFull, ServiceError, Unavailable
from server.jobs.job import Job
from server.jobs.redis_store import BATCH, RedisJobStore
from server.jobs.store import LeaseLost
from tests.conftest import free_port


@pytest.fixture
def store(redis_url: str) -> Iterator[RedisJobStore]:
    store = RedisJobStore(redis_url)
    yield store
    store.close()


@pytest.fixture
def server(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


def submit(store: RedisJobStore, task: str = "t", **options: object) -> Job:
    return store.submit(task, "d", "linear", {}, **{"max_attempts": 3, **options})


def everything(server: redis.Redis) -> dict[bytes, bytes | None]:
    return {key: server.dump(key) for key in server.scan_iter()}


def test_a_list_longer_than_one_reading_of_the_server(store: RedisJobStore) -> None:
    ids = [submit(store, "ab"[number % 2]).id for number in range(2 * BATCH + 1)][::-1]
    assert [job.id for job in store.list(limit=len(ids))[0]] == ids
    assert [job.id for job in store.list(task="a", state="queued", limit=1000)[0]] == ids[::2]
    first, cursor = store.list(limit=BATCH)
    assert [job.id for job in [*first, *store.list(cursor=cursor, limit=1000)[0]]] == ids


def test_a_forgotten_job_leaves_no_key_and_its_id_is_not_passed_by_a_slow_clock(
    redis_url: str, server: redis.Redis
) -> None:
    now = [1000.0]
    store = RedisJobStore(redis_url, now=lambda: now[0])
    job = submit(store, idempotency_key="k", tenant="acme")
    store.cancel(job.id)
    now[0] = 2000.0
    assert [gone.id for gone in store.prune(500)] == [job.id]
    assert server.keys() == [b"lensrack:jobs:newest"]
    now[0] = 500.0
    assert submit(store).id > job.id
    store.close()


def test_a_job_written_by_an_older_version_is_published_always(store: RedisJobStore, server: redis.Redis) -> None:
    key = store.JOB.format("lensrack", submit(store).id)
    record = json.loads(server.hget(key, "job"))
    assert record.pop("publish") == "always"
    server.hset(key, "job", json.dumps({**record, "checkpoint": "a field that is no more"}))
    assert store.claim("w", 30).publish == "always"


def test_two_prefixes_do_not_meet(redis_url: str, store: RedisJobStore) -> None:
    other = RedisJobStore(redis_url, prefix="other {1}")
    job = submit(store, idempotency_key="k")
    assert other.claim("w", 30) is None
    assert submit(other, idempotency_key="k").id != job.id
    assert store.counts()["queued"] == other.counts()["queued"] == 1
    other.close()


def test_a_server_without_memory_refuses_the_job_and_changes_nothing(store: RedisJobStore, server: redis.Redis) -> None:
    job = submit(store)
    before = everything(server)
    server.config_set("maxmemory", 1)
    try:
        for call in (lambda: submit(store), lambda: store.claim("w", 30), lambda: store.cancel(job.id)):
            with pytest.raises(DiskFull):
                call()
        assert store.get(job.id) == job
    finally:
        server.config_set("maxmemory", 0)
    assert everything(server) == before


# --- writers in each other's way --------------------------------------------------------------------------------------


class Meanwhile:
    """A clock that, once, lets something happen while its reader is between reading and writing."""

    def __init__(self) -> None:
        self.happens: Callable[[], object] | None = None

    def __call__(self) -> float:
        happens, self.happens = self.happens, None
        if happens is not None:
            happens()
        return 1000.0


@pytest.fixture
def meanwhile() -> Meanwhile:
    return Meanwhile()


@pytest.fixture
def slow(redis_url: str, meanwhile: Meanwhile) -> Iterator[RedisJobStore]:
    store = RedisJobStore(redis_url, now=meanwhile)
    yield store
    store.close()


def test_a_change_made_meanwhile_is_not_written_over(
    store: RedisJobStore, slow: RedisJobStore, meanwhile: Meanwhile
) -> None:
    job = submit(store)
    running = store.claim("w", 30)
    assert running is not None
    meanwhile.happens = lambda: store.cancel(job.id)
    assert slow.heartbeat(job.id, running.attempt, 30, {"epoch": 1}).cancel_requested
    meanwhile.happens = lambda: store.release(job.id, running.attempt)
    with pytest.raises(LeaseLost):
        slow.finish(job.id, running.attempt, "succeeded", version="v")
    assert store.get(job.id).state == "cancelled"
    assert store.counts() == {"queued": 0, "running": 0, "succeeded": 0, "failed": 0, "cancelled": 1}


def test_a_job_submitted_meanwhile_comes_first(store: RedisJobStore, slow: RedisJobStore, meanwhile: Meanwhile) -> None:
    other: list[Job] = []
    meanwhile.happens = lambda: other.append(submit(store))
    assert submit(slow).id > other[0].id


def test_an_idempotency_key_used_meanwhile_is_seen(
    store: RedisJobStore, slow: RedisJobStore, meanwhile: Meanwhile
) -> None:
    other: list[Job] = []
    meanwhile.happens = lambda: other.append(submit(store, idempotency_key="k"))
    assert submit(slow, idempotency_key="k").id == other[0].id
    assert store.counts()["queued"] == 1


def test_workers_that_ask_in_the_same_moment_get_different_jobs(store: RedisJobStore) -> None:
    ids = [submit(store).id for _ in range(120)]
    ready = threading.Barrier(6)

    def claim_all(worker: str) -> list[str]:
        ready.wait(10)
        return [job.id for job in iter(lambda: store.claim(worker, 60), None)]

    with ThreadPoolExecutor(6) as pool:
        claimed = [*pool.map(claim_all, "abcdef")]
    assert sorted(job_id for taken in claimed for job_id in taken) == ids
    assert sum(map(bool, claimed)) > 1


# --- the way to the server --------------------------------------------------------------------------------------------


def said(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def test_a_server_that_is_not_there_is_unavailable_and_no_password_is_told() -> None:
    store = RedisJobStore(f"redis://me:hunter2@127.0.0.1:{free_port()}/0")
    for call in (lambda: store.claim("w", 30), lambda: submit(store), store.counts, store.list):
        with pytest.raises(Unavailable) as caught:
            call()
        assert caught.value.code == "store_unavailable"
        assert "hunter2" not in said(caught.value) + repr(store)


def test_a_refused_password_is_unavailable_and_is_not_told(redis_url: str) -> None:
    store = RedisJobStore(redis_url.replace("redis://", "redis://me:hunter2@"))
    with pytest.raises(ServiceError) as caught:
        store.counts()
    assert caught.value.code == "store_unavailable"
    assert "hunter2" not in said(caught.value)


@pytest.mark.parametrize(
    "url", ["ftp://:hunter2@host", "redis://:hunter2@host:hunter2", "redis://host?socket_timeout=hunter2", "hunter2"]
)
def test_a_url_of_another_form_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match="expected redis://") as caught:
        RedisJobStore(url)
    assert "hunter2" not in said(caught.value)


class Road:
    """The way to the server. When told to, it delivers the next change and then breaks before the answer is back."""

    def __init__(self, server_port: int) -> None:
        self._server_port, self.breaks, self.broken = server_port, False, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]

    def travel(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        """One question, one answer: that is how the store speaks."""
        with client, socket.create_connection(("127.0.0.1", self._server_port)) as server, suppress(OSError):
            while question := client.recv(65536):
                server.sendall(question)
                answer = server.recv(65536)
                if self.breaks and b"EVALSHA" in question and b"NOSCRIPT" not in answer:
                    self.breaks, self.broken = False, self.broken + 1
                    return
                client.sendall(answer)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@contextmanager
def road(server_port: int) -> Iterator[Road]:
    road = Road(server_port)
    thread = threading.Thread(target=road.travel)
    thread.start()
    try:
        yield road
    finally:
        road.close()
        thread.join()


def test_a_change_whose_answer_was_lost_counts_once(redis_url: str) -> None:
    """The client asks again by itself; without the writer's stamp the worker would be told that it lost its lease."""
    with road(int(redis_url.rpartition(":")[2].partition("/")[0])) as way:
        store = RedisJobStore(f"redis://127.0.0.1:{way.port}/0")
        way.breaks = True
        job = submit(store)
        running = store.claim("w", 30)
        assert running is not None
        way.breaks = True
        assert store.append_event(job.id, running.attempt, "epoch", {}).seq == 3
        way.breaks = True
        assert store.finish(job.id, running.attempt, "succeeded", version="v").state == "succeeded"
        assert way.broken == 3
        assert [event.type for event in store.events(job.id)] == ["queued", "started", "epoch", "succeeded"]
        assert [kept.id for kept in store.list()[0]] == [job.id]
        store.close()
