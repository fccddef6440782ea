"""What only the SQLite job store can get wrong: the file, its schema, its failures, its connections."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server.errors import DiskFull, Unavailable
from server.jobs import lifecycle
from server.jobs.job import FINISHED, STATES, TRANSITIONS, Job, is_id, new_id
from server.jobs.sqlite_schema import MIGRATIONS
from server.jobs.sqlite_store import SqliteJobStore


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "not" / "there" / "jobs.sqlite"


def submit(store: SqliteJobStore) -> Job:
    return store.submit("t", "d", "linear", {"note": "x" * 2000}, max_attempts=3)


def test_the_file_is_made_with_its_folder_and_kept(path: Path) -> None:
    store = SqliteJobStore(path)
    job = submit(store)
    store.close()
    again = SqliteJobStore(path)
    assert again.get(job.id) == job
    again.close()
    with sqlite3.connect(path) as file:
        assert file.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert file.execute("PRAGMA user_version").fetchone() == (2,)
    file.close()


def test_a_job_of_the_oldest_file_is_published_always(path: Path) -> None:
    path.parent.mkdir(parents=True)
    with sqlite3.connect(path) as file:
        for statement in (*MIGRATIONS[0], "PRAGMA user_version = 1"):
            file.execute(statement)
        texts = {"id": new_id(1.0), "task": "t", "dataset": "d", "method": "linear", "state": "queued", "tenant": ""}
        numbers = {"attempt": 0, "failures": 0, "max_attempts": 3, "priority": 0, "created_at": 1}
        texts |= {"checkpoint": "a field that is no more"}
        old = {**texts, **numbers, "cancel_requested": 0, "recipe": "{}", "progress": "{}", "metrics": "{}"}
        file.execute(f"INSERT INTO jobs ({', '.join(old)}) VALUES ({', '.join('?' * len(old))})", [*old.values()])
    file.close()
    store = SqliteJobStore(path)
    assert store.get(old["id"]).publish == "always"
    assert store.claim("w", 30).id == old["id"]
    store.close()


def test_a_file_of_a_newer_lensrack_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir(parents=True)
    with sqlite3.connect(path) as file:
        file.execute("PRAGMA user_version = 7")
    file.close()
    before = path.read_bytes()
    with pytest.raises(Unavailable, match="schema 7, written by a newer lensrack; this one reads up to 3"):
        SqliteJobStore(path)
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_refused_without_its_path(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(b"something else entirely " * 100)
    with pytest.raises(Unavailable) as caught:
        SqliteJobStore(path)
    assert (caught.value.code, str(path) in caught.value.detail) == ("store_unavailable", False)
    assert path.read_bytes().startswith(b"something else")


def test_a_full_disk_refuses_the_job_and_loses_none(path: Path) -> None:
    store = SqliteJobStore(path)
    store._connection().db.execute("PRAGMA max_page_count = 40")  # SQLite's own word for a disk of 160 kB
    jobs: list[Job] = []

    def fill() -> None:
        while True:
            jobs.append(submit(store))

    with pytest.raises(DiskFull) as caught:
        fill()
    assert caught.value.code == "disk_full"
    assert len(jobs) > 10
    assert store.counts()["queued"] == len(jobs)
    assert store.get(jobs[-1].id) == jobs[-1]
    store.close()


def test_a_writer_waits_for_its_turn(path: Path) -> None:
    store, other = SqliteJobStore(path), sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.3, lambda: other.execute("COMMIT"))
    timer.start()
    started = time.monotonic()
    submit(store)
    assert time.monotonic() - started >= 0.25
    timer.join()
    other.close()
    store.close()


def test_an_idle_claim_takes_no_turn(path: Path) -> None:
    store, other = SqliteJobStore(path), sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert store.claim("w", 30) is None
    other.execute("ROLLBACK")
    other.close()
    store.close()


def test_connections_of_threads_that_ended_are_closed(path: Path) -> None:
    store = SqliteJobStore(path)
    for _ in range(10):
        thread = threading.Thread(target=submit, args=(store,))
        thread.start()
        thread.join()
    assert len(store._connections) == 2
    store.close()


def test_a_closed_store_says_so(path: Path) -> None:
    store = SqliteJobStore(path)
    store.close()
    store.close()
    with pytest.raises(Unavailable, match="closed"):
        store.counts()


def test_descriptors_are_those_of_the_threads_that_live(path: Path) -> None:
    """Two for each thread that has asked, the file and its log; what threads that have ended held is let go."""
    store = SqliteJobStore(path)
    submit(store)

    def held() -> int:
        found = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
        return sum(name.startswith(str(path)) for name in found)

    with ThreadPoolExecutor(6) as pool:
        barrier = threading.Barrier(6)
        list(pool.map(lambda _: (barrier.wait(60), store.counts()), range(6)))
        several = held()
        for _ in range(200):
            pool.submit(store.counts).result()
        assert held() == several <= 2 * 7 + 2
    for _ in range(50):
        one = threading.Thread(target=store.counts)
        one.start()
        one.join()
    assert held() <= several
    store.close()
    assert held() == 0


# --- the rules themselves ---------------------------------------------------------------------------------------------


def test_finished_is_final() -> None:
    assert {*TRANSITIONS} == {*STATES}
    assert {state for state, following in TRANSITIONS.items() if not following} == FINISHED


@pytest.mark.parametrize("state", sorted(FINISHED))
def test_no_finished_job_is_claimed(state: str) -> None:
    job = Job("job_x", "t", "d", "linear", {}, max_attempts=1, created_at=0.0, state=state)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot go from"):
        lifecycle.claimed(job, worker="w", lease_s=1.0, now=0.0)


def test_ids_sort_by_time() -> None:
    ids = [new_id(now) for now in (0.0, 0.001, 1.0, 1e9, 4e9, 2**47 / 1000)]
    assert ids == sorted(ids)
    assert all(map(is_id, ids))
    assert new_id(0.0, after=ids[3]) > ids[3]
    assert not any(map(is_id, ("", "job_", ids[0] + "0", ids[0].upper(), "job_" + "u" * 26, "job_8" + "0" * 25)))


def test_a_store_that_is_closed_under_a_call_lets_it_end(path: Path) -> None:
    """As at a shutdown, while a probe still counts: to close the connection of a running statement is a crash."""
    store, inside, closed = SqliteJobStore(path), threading.Event(), threading.Event()

    def change() -> int:
        with store._transaction() as db:
            inside.set()
            assert closed.wait(20)
            return int(db.execute("SELECT COUNT(*) FROM jobs").fetchone()[0])

    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(change)
        assert inside.wait(20)
        store.close()
        closed.set()
        assert call.result(20) == 0
    with pytest.raises(Unavailable):
        store.counts()
    assert not path.with_name("jobs.sqlite-wal").exists(), "the last connection is closed, too"
