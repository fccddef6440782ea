"""What is forgotten of jobs that are over, and what must not be."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.clock import WallClock
from server.errors import NotFound
from server.jobs.job import Job, new_id
from server.jobs.sqlite_store import SqliteJobStore
from server.worker import retention
from server.worker.checkpoints import Checkpoints
from server.worker.retention import Retention
from tests.worker.test_trainer import House

DAY_S = 86_400.0


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def jobs(tmp_path: Path, clock: Clock) -> Iterator[SqliteJobStore]:
    store = SqliteJobStore(tmp_path / "jobs.sqlite", now=clock)
    yield store
    store.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def submit(jobs: SqliteJobStore) -> Job:
    return jobs.submit("t", "d", "linear", {}, max_attempts=3)


def finished(jobs: SqliteJobStore) -> Job:
    return jobs.cancel(submit(jobs).id)


def left_behind(folder: Path, job_id: str) -> list[Path]:
    files = [folder / f"{job_id}.safetensors", folder / f"{job_id}.77.tmp"]
    for file in files:
        file.write_bytes(b"state")
    return files


def test_what_finished_long_ago_is_forgotten_with_what_belongs_to_it(
    jobs: SqliteJobStore, folder: Path, clock: Clock
) -> None:
    old = finished(jobs)
    files = left_behind(folder, old.id)
    clock.now += 30 * DAY_S
    young = finished(jobs)
    clock.now += 1
    Retention(jobs, Checkpoints(folder), 30 * DAY_S).clean_up()
    assert [job.id for job in jobs.list()[0]] == [young.id]
    with pytest.raises(NotFound):
        jobs.events(old.id)
    assert not any(file.exists() for file in files)


def test_a_clock_that_is_set_forward_makes_nothing_old(jobs: SqliteJobStore, folder: Path, clock: Clock) -> None:
    steady = Clock()
    keeping = Retention(jobs, Checkpoints(folder), 30 * DAY_S, wall=WallClock(clock, steady))
    over, waiting = finished(jobs), submit(jobs)
    clock.now += 10_000 * DAY_S
    keeping.clean_up()
    assert {job.id for job in jobs.list()[0]} == {over.id, waiting.id}
    clock.now, steady.now = clock.now + 31 * DAY_S, steady.now + 31 * DAY_S
    keeping.clean_up()
    assert [job.id for job in jobs.list()[0]] == [waiting.id]


def test_zero_keeps_jobs_for_ever(jobs: SqliteJobStore, folder: Path, clock: Clock) -> None:
    job = finished(jobs)
    clock.now += 10_000 * DAY_S
    Retention(jobs, Checkpoints(folder), 0).clean_up()
    assert jobs.get(job.id) == job


def test_only_checkpoints_that_nobody_goes_on_from_are_swept(jobs: SqliteJobStore, folder: Path) -> None:
    running = submit(jobs)
    assert jobs.claim("w", 60) is not None
    waiting, over = submit(jobs), finished(jobs)
    needed = left_behind(folder, running.id) + left_behind(folder, waiting.id)
    orphans = left_behind(folder, over.id) + left_behind(folder, new_id(5.0))
    foreign = folder / "job_notes.txt"
    foreign.write_text("somebody's own")
    Retention(jobs, Checkpoints(folder), 30 * DAY_S).clean_up()
    assert {*folder.iterdir()} == {*needed, foreign}
    assert not any(file.exists() for file in orphans)


def test_without_a_folder_there_is_nothing_to_sweep(jobs: SqliteJobStore, tmp_path: Path) -> None:
    Retention(jobs, Checkpoints(tmp_path / "nowhere"), 1).clean_up()


def test_it_comes_at_the_start_and_then_now_and_again(jobs: SqliteJobStore, folder: Path, clock: Clock) -> None:
    """The job store's clock stands still: only the time between two cleanings is at stake."""
    keeper = Retention(jobs, Checkpoints(folder), 1, clock=clock)
    orphan = left_behind(folder, new_id(5.0))[0]
    keeper.when_due()
    assert not orphan.exists()
    left_behind(folder, new_id(5.0))
    clock.now += retention.EVERY_S - 1
    keeper.when_due()
    assert [*folder.iterdir()]
    clock.now += 1
    keeper.when_due()
    assert not [*folder.iterdir()]


def test_a_worker_cleans_up_by_itself(tmp_path: Path) -> None:
    house = House(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    orphan = left_behind(tmp_path / "checkpoints", new_id(5.0))[0]
    worker = threading.Thread(target=house.trainer.run)
    worker.start()
    deadline = time.monotonic() + 30
    while orphan.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    house.trainer.stop.set()
    worker.join(30)
    assert not orphan.exists()
