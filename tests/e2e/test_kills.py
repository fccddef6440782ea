"""A worker is killed at any moment of a job: another one finishes it, with the very bytes of an undisturbed run."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from prompts_store import Store, open_store
from server.app.stores import open_datasets, open_jobs
from server.jobs.job import Job
from server.jobs.redis_store import RedisJobStore
from server.jobs.sqlite_store import SqliteJobStore
from server.jobs.store import JobStore
from server.settings import Settings
from server.worker.checkpoints import Checkpoints
from tests.e2e.doomed_worker import POINTS, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SUBMITTED_AT = 1_700_000_000.0  # part of the manifest: two jobs of the same moment make the same bytes
RECIPE = {"epochs": 6, "prompts": 2, "batch_size": 4, "seed": 5}
WAIT_S = 120
MakeSite = Callable[[str], AbstractContextManager["Site"]]


@dataclass
class Site:
    """A home with one job in its queue, and whoever works there."""

    settings: Settings
    context: ForkServerContext
    jobs: JobStore
    store: Store
    job: Job

    def start(self, point: str | None = None, lease_s: str = "1") -> BaseProcess:
        own = {"jobs": self.settings.jobs, "store": self.settings.store, "lease_s": lease_s, "worker_nice": "0"}
        threads = {"threads": "1", "worker_threads": "1"}
        return start(self.context, self.settings.home, {**own, **threads}, point)

    @contextmanager
    def working(self) -> Iterator[BaseProcess]:
        """A worker that lives, and is stopped as an operator would."""
        worker = self.start()
        try:
            yield worker
        finally:
            self.wait_until_ready(worker)  # before that nobody listens to SIGTERM, and the job may be finished already
            worker.terminate()
            worker.join(40)
        assert worker.exitcode == 0, self.log

    def wait_until_ready(self, worker: BaseProcess) -> None:
        deadline = time.monotonic() + WAIT_S
        log = self.settings.home / "workers.log"
        while f"worker ready, pid {worker.pid}\n" not in log.read_text(errors="replace") and worker.is_alive():
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)

    def finished(self, worker: BaseProcess) -> Job:
        deadline = time.monotonic() + WAIT_S
        while not (job := self.jobs.get(self.job.id)).finished:
            assert worker.is_alive(), self.log
            assert time.monotonic() < deadline, f"the job is {job.state} after {WAIT_S} s:\n{self.log}"
            time.sleep(0.05)
        return job

    def epochs(self) -> int:
        return len([event for event in self.jobs.events(self.job.id) if event.type == "epoch"])

    @property
    def log(self) -> str:
        return (self.settings.home / "workers.log").read_text(errors="replace")[-5000:]

    @property
    def leftovers(self) -> list[str]:
        """Whatever is half written or of no more use."""
        home = self.settings.home
        found = [path for path in home.rglob("*") if path.name.startswith(".new-") or path.suffix == ".tmp"]
        return [path.name for path in [*found, *(home / "checkpoints").glob("*")]]


@contextmanager
def site(home: Path, archive: Path, context: ForkServerContext, url: str = "", jobs: str = "") -> Iterator[Site]:
    """Jobs and bundles lie in files, or in the Redis at `url`; `jobs`: another place for these."""
    settings = Settings(home=home, jobs=jobs or url, store=url)
    home.mkdir(exist_ok=True)
    (home / "workers.log").touch()
    dataset = open_datasets(settings).ingest(archive)
    submitted = submit(settings, dataset.id)
    queue, store = open_jobs(settings), open_store(settings.store_url)
    yield Site(settings, context, queue, store, submitted)
    queue.close()
    store.close()


def submit(settings: Settings, dataset: str) -> Job:
    """With a clock that stands at SUBMITTED_AT."""
    jobs: JobStore
    if settings.jobs.startswith("redis"):
        jobs = RedisJobStore(settings.jobs, now=lambda: SUBMITTED_AT)
    else:
        jobs = SqliteJobStore(Path(settings.jobs_url.partition("://")[2]), now=lambda: SUBMITTED_AT)
    job = jobs.submit("fruit", dataset, "vpt_deep", RECIPE, max_attempts=30)
    jobs.close()
    return job


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, archive: Path, context: ForkServerContext) -> str:
    """The version that a job makes which nothing happens to."""
    with site(tmp_path_factory.mktemp("undisturbed"), archive, context) as calm, calm.working() as worker:
        job = calm.finished(worker)
        assert (job.state, job.attempt, calm.leftovers) == ("succeeded", 1, []), calm.log
    assert job.version is not None
    return job.version


@pytest.fixture
def make_site(tmp_path: Path, archive: Path, context: ForkServerContext) -> MakeSite:
    return partial(site, tmp_path, archive, context)


def assert_as_if_nothing_had_happened(place: Site, job: Job, undisturbed: str) -> None:
    assert job.state == "succeeded", place.log
    assert job.version == undisturbed
    assert [info.version for info in place.store.versions("fruit")] == [undisturbed]
    history = place.store.history("fruit", "live")
    assert [target.version for state in history for target in state.targets] == [undisturbed], "it moved once"
    assert place.leftovers == []


KILLS = [point for point in POINTS if point != "slow"]


@pytest.mark.parametrize(
    ("backend", "point"),
    [
        *(("sqlite", point) for point in KILLS if point != "mid_comparison"),
        pytest.param("redis", "after_put", marks=pytest.mark.long),
        ("redis", "after_the_alias_moved"),
    ],
)
def test_a_worker_killed_at(
    backend: str, point: str, request: pytest.FixtureRequest, make_site: MakeSite, undisturbed: str
) -> None:
    url = request.getfixturevalue("redis_url") if backend == "redis" else ""
    with make_site(url) as place:
        doomed = place.start(point)
        doomed.join(WAIT_S)
        assert doomed.exitcode == -signal.SIGKILL, place.log
        assert place.jobs.get(place.job.id).state == "running"
        assert_the_point_was_reached(place, point)
        with place.working() as heir:
            job = place.finished(heir)
        assert (job.attempt, job.failures) == (2, 1)
        epochs = [event.data["epoch"] for event in place.jobs.events(job.id) if event.type == "epoch"]
        assert epochs == [1, 2, 3, 4, 5, 6], "no epoch that a checkpoint holds is done again"
        assert_as_if_nothing_had_happened(place, job, undisturbed)


@pytest.mark.parametrize("backend", ["sqlite", pytest.param("redis", marks=pytest.mark.long)])
def test_a_worker_that_is_asked_to_stop_gives_its_job_back_at_once(
    backend: str, request: pytest.FixtureRequest, make_site: MakeSite, undisturbed: str
) -> None:
    """Nobody waits for the lease, here an hour, to end."""
    url = request.getfixturevalue("redis_url") if backend == "redis" else ""
    with make_site(url) as place:
        leaving = place.start("slow", lease_s="3600")
        deadline = time.monotonic() + WAIT_S
        while place.epochs() < 2:
            assert time.monotonic() < deadline, place.log
            time.sleep(0.01)
        leaving.terminate()
        leaving.join(WAIT_S)
        assert leaving.exitcode == 0, place.log
        given = place.jobs.get(place.job.id)
        assert (given.state, given.failures, given.error) == ("queued", 0, None)
        kept = Checkpoints(place.settings.home / "checkpoints").read(given.id)
        assert kept is not None
        assert kept.epoch - place.epochs() in (0, 1), "an epoch is kept, then told"
        with place.working() as heir:
            job = place.finished(heir)
        assert (job.attempt, job.failures) == (2, 0)
        told = [event.data["epoch"] for event in place.jobs.events(job.id) if event.type == "epoch"]
        assert sorted({*told, kept.epoch}) == [1, 2, 3, 4, 5, 6]
        assert len(told) == len(set(told)), "no epoch that a checkpoint holds is done again"
        assert_as_if_nothing_had_happened(place, job, undisturbed)


def test_a_comparison_killed_in_its_third_fit_goes_on_there(make_site: MakeSite) -> None:
    wish = {"methods": ["vpt_deep", "partial-1"], "seeds": [0, 1], "recipe": {"epochs": 3, "prompts": 2}}
    with make_site("") as place:
        place.jobs.cancel(place.job.id)
        dataset = place.job.dataset
        place.job = place.jobs.submit("fruit", dataset, "compare", {"compare": wish}, publish="never", max_attempts=3)
        doomed = place.start("mid_comparison")
        doomed.join(WAIT_S)
        assert doomed.exitcode == -signal.SIGKILL, place.log
        left = Checkpoints(place.settings.home / "checkpoints").read(place.job.id)
        assert left is not None
        assert (len(left.trials), left.epoch) == (2, 1)
        with place.working() as heir:
            job = place.finished(heir)
        assert (job.state, job.attempt, place.leftovers) == ("succeeded", 2, []), place.log
        told = [event.data for event in place.jobs.events(job.id) if event.type == "trial"]
        assert [(one["method"], one["seed"]) for one in told] == [
            (method, seed) for seed in (0, 1) for method in wish["methods"]
        ], "no fit was made twice"
        assert job.metrics["compare"]["fits"][:2] == left.trials
        assert place.store.tasks() == []


def assert_the_point_was_reached(place: Site, point: str) -> None:
    """Each point leaves its own picture behind; a test that killed elsewhere would prove nothing."""
    files = [path.suffix for path in (place.settings.home / "checkpoints").glob("*")]
    stored = place.store.tasks() == ["fruit"]
    live = stored and "live" in place.store.aliases("fruit")
    epochs = len([event for event in place.jobs.events(place.job.id) if event.type == "epoch"])
    expected = {
        "claimed": ([], False, False, 0),
        "mid_epoch": ([".safetensors"], False, False, 3),
        "while_writing_a_checkpoint": ([".safetensors", ".tmp"], False, False, 2),
        "after_put": ([".safetensors"], True, False, 6),
        "after_the_alias_moved": ([".safetensors"], True, True, 6),
    }
    assert (sorted(files), stored, live, epochs) == expected[point]


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.long)])
def test_workers_killed_at_random_moments(seed: int, make_site: MakeSite, undisturbed: str) -> None:
    """Each is killed some time after it took the job up; how far it came by then, only the machine knows."""
    chance = random.Random(seed)
    with make_site("") as place:
        for _ in range(4):
            before = place.jobs.get(place.job.id)
            doomed = place.start()
            deadline = time.monotonic() + WAIT_S
            while (now := place.jobs.get(place.job.id)).attempt == before.attempt and not now.finished:
                assert time.monotonic() < deadline, place.log
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.6))
            doomed.kill()
            doomed.join()
        with place.working() as heir:
            job = place.finished(heir)
        assert job.attempt >= 2
        assert_as_if_nothing_had_happened(place, job, undisturbed)
