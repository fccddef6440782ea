"""Jobs and lenses in one Redis: a worker of its own process takes a job that it was never told of, and publishes."""

from __future__ import annotations

import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prompts_store import open_store
from server.app.stores import open_datasets, open_jobs
from server.cli.sample_pictures import draw
from server.jobs.job import Job
from server.jobs.redis_store import RedisJobStore
from server.jobs.store import JobStore
from server.settings import Settings
from tests.e2e.server_process import environment


@contextmanager
def working(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m server work`, stopped afterwards as an operator would."""
    own = {"jobs": settings.jobs, "store": settings.store, "threads": "1", "worker_threads": "1"}
    worker = subprocess.Popen(
        [sys.executable, "-m", "server", "work"], env=environment(settings.home, own), cwd=settings.home
    )
    try:
        yield worker
    finally:
        worker.send_signal(signal.SIGTERM)
        try:
            worker.wait(40)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait(10)


def ended(jobs: JobStore, job_id: str, worker: subprocess.Popen[bytes], seconds: float) -> Job:
    deadline = time.monotonic() + seconds
    while not (job := jobs.get(job_id)).finished:
        assert worker.poll() is None, f"the worker ended with {worker.returncode}"
        assert time.monotonic() < deadline, f"the job is {job.state} after {seconds} s"
        time.sleep(0.1)
    return job


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_worker_takes_a_job_from_redis_and_publishes_to_redis(redis_url: str, tmp_path: Path) -> None:
    draw(tmp_path / "pictures", per_class=6)
    with tarfile.open(tmp_path / "fruit.tar", "w") as archive:
        archive.add(tmp_path / "pictures" / "fruit" / "train", arcname=".")
    settings = Settings(home=tmp_path, jobs=redis_url, store=redis_url)
    dataset = open_datasets(settings).ingest(tmp_path / "fruit.tar")
    jobs, lenses = open_jobs(settings), open_store(redis_url)
    assert isinstance(jobs, RedisJobStore)
    queued = jobs.submit("fruit", dataset.id, "linear", {}, max_attempts=1)
    with working(settings) as worker:
        job = ended(jobs, queued.id, worker, 120)
    assert (job.state, job.attempt, job.error) == ("succeeded", 1, None)
    assert worker.returncode == 0
    assert lenses.get("fruit", job.version or "").manifest.task == "fruit"
    assert [target.version for target in lenses.aliases("fruit")["live"].targets] == [job.version]
    lenses.close()
    jobs.close()


@pytest.mark.parametrize("url", ["ftp://:hunter2@host", "hunter2"])
def test_another_job_store_is_refused_by_naming_both(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected sqlite://FILE or redis://…, got") as caught:
        open_jobs(Settings(home=tmp_path, jobs=url))
    assert "hunter2" not in str(caught.value)
