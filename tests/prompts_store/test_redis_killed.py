"""redis-server is killed while something is written to it: at the first piece that passes on the wire, the second, and
so on, until everything gets through before its turn comes. Nothing is there by halves, what was acknowledged stays
where Redis has an append-only file, and afterwards everything can be done again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from prompts_store import StoreError, TaskNotFound
from prompts_store.redis_store import RedisStore
from server.errors import ServiceError
from server.jobs.redis_store import RedisJobStore
from tests.e2e.faulty_redis import RedisProcess, Road
from tests.prompts_store.stores import bundle

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]
LARGE = 60_000  # floats: an upload of several pieces


@dataclass
class Doomed:
    """A Redis that dies at the n-th piece of a road to it."""

    redis: RedisProcess
    road: Road
    left: int = 0

    def piece(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.redis.kill()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.road.port}/0"


@pytest.fixture(params=["an append-only file", "nothing"])
def doomed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Doomed]:
    made = RedisProcess(tmp_path, durable=request.param == "an append-only file")
    made.start()
    road = Road(made.port)
    it = Doomed(made, road)
    road.on_piece = it.piece
    yield it
    made.kill()
    road.close()


def pieces(doomed: Doomed, deeds: Callable[[str], bool], step: int) -> int:
    """`deeds(prefix)` again and again, each time with a later death; it tells whether it got through. How often."""
    for number in range(step, 400, step):
        doomed.left = number
        through = deeds(f"n{number}")
        if through and doomed.left > 0:
            return number // step
        doomed.left = 0
        doomed.redis.kill()
        doomed.redis.start()
    raise AssertionError("it never got through")


# --- bundles ----------------------------------------------------------------------------------------------------------


@dataclass
class Told:
    """What the store has acknowledged: versions that are there, where `live` points, and what was under way."""

    versions: set[str] = field(default_factory=set)
    live: set[str] = field(default_factory=set)
    tried: str = ""


def publish_two(store: RedisStore, told: Told) -> None:
    """An upload, a publication, another upload, a move, a split, a move back, a deletion."""
    first, second = bundle(1, size=LARGE), bundle(2, size=LARGE)
    for one in (first, second):
        told.tried = one.version
        store.put(one)
        told.versions.add(one.version)
        store.set_alias("fish", "live", one.version)
        told.live = {one.version}
    store.set_alias("fish", "live", {first.version: 1, second.version: 1})
    told.live = {first.version, second.version}
    store.rollback("fish", "live")
    told.live = {second.version}
    told.tried = first.version
    told.versions.discard(first.version)
    store.delete_version("fish", first.version)


def whole(store: RedisStore) -> tuple[set[str], set[str]]:
    """All that is listed can be read, aliases point at what is there; its versions, and where `live` points."""
    try:
        infos = store.versions("fish")
    except TaskNotFound:
        assert store.tasks() == []
        return set(), set()
    assert store.tasks() == ["fish"]
    versions = {info.version for info in infos}
    assert {store.get("fish", version).version for version in versions} == versions
    for state in [*store.aliases("fish").values(), *store.history("fish", "live")] if store.aliases("fish") else []:
        assert state.revision >= 1
    targets = {target.version for alias in store.aliases("fish").values() for target in alias.targets}
    assert targets <= versions
    return versions, targets


def test_bundles_and_aliases(doomed: Doomed) -> None:
    durable = doomed.redis.durable

    def deeds(prefix: str) -> bool:
        told, said = Told(), ""
        store = RedisStore(doomed.url, prefix=prefix)
        try:
            publish_two(store, told)
        except StoreError as error:
            said = error.code
        if said:
            assert said in ("store_unavailable", "task_not_found", "version_not_found")
            doomed.left = 0
            doomed.redis.kill()
            doomed.redis.start()
            versions, targets = whole(store)
            if durable:
                assert told.versions - {told.tried} <= versions <= told.versions | {told.tried}
                assert not told.live or targets, "an alias was lost"
            publish_two(store, Told())
            assert whole(store) == ({bundle(2, size=LARGE).version},) * 2
        store.close()
        return not said

    assert pieces(doomed, deeds, step=4 if durable else 9) >= 3


# --- jobs -------------------------------------------------------------------------------------------------------------


def run_two(jobs: RedisJobStore) -> None:
    for name in ("a", "b"):
        jobs.submit(name, "data", "linear", {}, idempotency_key=f"once-{name}", max_attempts=3)
    claimed = jobs.claim("worker", 1000)
    assert claimed is not None
    jobs.heartbeat(claimed.id, claimed.attempt, 1000, {"epoch": 1})
    jobs.append_event(claimed.id, claimed.attempt, "epoch", {"epoch": 1})
    jobs.finish(claimed.id, claimed.attempt, "succeeded", version="v", metrics={})
    other = jobs.claim("worker", 1000)
    assert other is not None
    jobs.release(other.id, other.attempt)


STATES: dict[str, tuple[str, ...]] = {  # how a job's last event may stand to its state
    "queued": ("queued", "released", "retried"), "running": ("started", "epoch"), "succeeded": ("succeeded",),
}  # fmt: skip


def check_jobs(jobs: RedisJobStore) -> list[Any]:
    """Every list names the same jobs, each in one state, with events that end in it."""
    listed, following = jobs.list(limit=100)
    assert following is None
    counts = jobs.counts()
    assert sum(counts.values()) == len(listed)
    for job in listed:
        assert jobs.get(job.id) == job
        assert counts[job.state] >= 1
        assert jobs.events(job.id)[-1].type in STATES[job.state]
        assert job in jobs.list(task=job.task, state=job.state)[0]
    return listed


def test_jobs(doomed: Doomed) -> None:
    durable = doomed.redis.durable

    def deeds(prefix: str) -> bool:
        jobs, said = RedisJobStore(doomed.url, prefix=prefix), ""
        try:
            run_two(jobs)
        except ServiceError as error:
            said = error.code
        if said:
            assert said in ("store_unavailable", "job_not_found", "lease_lost")
            doomed.left = 0
            doomed.redis.kill()
            doomed.redis.start()
            known = check_jobs(jobs)
            again = [jobs.submit(n, "data", "linear", {}, idempotency_key=f"once-{n}", max_attempts=3) for n in "ab"]
            if durable:
                assert {job.id for job in known} <= {job.id for job in again}, "a job is there twice"
            for _ in range(4):  # whoever holds one finishes it; what waits is claimed
                claimed = jobs.claim("heir", 1000)
                if claimed is not None:
                    jobs.finish(claimed.id, claimed.attempt, "succeeded", version="v", metrics={})
            assert {job.state for job in check_jobs(jobs)} <= {"running", "succeeded"}
            assert len(check_jobs(jobs)) == 2
        jobs.close()
        return not said

    assert pieces(doomed, deeds, step=5 if durable else 9) >= 2
