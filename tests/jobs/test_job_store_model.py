"""Random histories of a job store against a model that fits on one screen and shares no code with it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule, run_state_machine_as_test

from server.errors import Conflict
from server.jobs.job import Job
from server.jobs.redis_store import RedisJobStore
from server.jobs.sqlite_store import SqliteJobStore
from server.jobs.store import JobStore, LeaseLost

LEASE_S = 10
WORKER_ERROR = {"code": "internal", "detail": "the fit broke"}


@dataclass
class Model:
    """What a job should be."""

    id: str
    order: int
    priority: int
    max_attempts: int
    key: str | None
    task: str
    state: str = "queued"
    attempt: int = 0
    failures: int = 0
    until: float = 0.0
    asked_to_stop: bool = False
    progress: dict[str, Any] = field(default_factory=dict)
    events: list[str] = field(default_factory=lambda: ["queued"])

    def end(self, state: str) -> None:
        self.state = state
        self.events.append(state)

    def fail(self) -> None:
        self.failures += 1
        if self.asked_to_stop:
            self.end("cancelled")
        elif self.failures >= self.max_attempts:
            self.end("failed")
        else:
            self.state = "queued"
            self.events.append("retried")


class History(RuleBasedStateMachine):
    """`open_store` is set by the test: a folder and a clock to a store."""

    open_store: Callable[[Path, Callable[[], float]], JobStore]

    claims = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.folder = tempfile.TemporaryDirectory()
        self.store = self.open_store(Path(self.folder.name), lambda: self.now)
        self.jobs: list[Model] = []

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()

    def model(self, job_id: str) -> Model:
        return next(job for job in self.jobs if job.id == job_id)

    def fenced(self, claim: tuple[str, int], call: Callable[[str, int], Job | object]) -> Model | None:
        """Make the call; the model when it was allowed. It must be exactly when the attempt is the current one."""
        model = self.model(claim[0])
        if model.state == "running" and model.attempt == claim[1]:
            call(*claim)
            return model
        with pytest.raises(LeaseLost):
            call(*claim)
        return None

    @rule(priority=st.integers(0, 2), max_attempts=st.integers(1, 3), key=st.sampled_from([None, "k1", "k2"]),
          task=st.sampled_from("ab"))  # fmt: skip
    def submit(self, priority: int, max_attempts: int, key: str | None, task: str) -> None:
        def call() -> Job:
            options = {"idempotency_key": key, "priority": priority, "max_attempts": max_attempts}
            return self.store.submit(task, "d", "linear", {"epochs": 1}, **options)  # type: ignore[arg-type]

        known = next((job for job in self.jobs if key and job.key == key), None)
        if known and known.task != task:
            with pytest.raises(Conflict):
                call()
        elif known:
            assert call().id == known.id
        else:
            self.jobs.append(Model(call().id, len(self.jobs), priority, max_attempts, key, task))

    @rule(seconds=st.sampled_from([1, 5, LEASE_S, 3 * LEASE_S]))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule(target=claims)
    def claim(self) -> Any:
        got = self.store.claim("w", LEASE_S)
        while waiting := [
            job for job in self.jobs if job.state == "queued" or (job.state == "running" and job.until <= self.now)
        ]:
            job = min(waiting, key=lambda job: (-job.priority, job.order))
            if job.state == "running":
                job.fail()
            if job.state == "queued":
                job.state, job.attempt, job.until = "running", job.attempt + 1, self.now + LEASE_S
                job.events.append("started")
                assert got is not None
                assert (got.id, got.attempt) == (job.id, job.attempt)
                return (job.id, job.attempt)
        assert got is None
        return multiple()

    @rule(claim=claims, step=st.integers(0, 9))
    def heartbeat(self, claim: tuple[str, int], step: int) -> None:
        if job := self.fenced(claim, lambda *held: self.store.heartbeat(*held, LEASE_S, {"step": step})):
            job.until, job.progress = self.now + LEASE_S, {"step": step}

    @rule(claim=claims)
    def append(self, claim: tuple[str, int]) -> None:
        if job := self.fenced(claim, lambda *held: self.store.append_event(*held, "epoch", {})):
            job.events.append("epoch")

    @rule(claim=claims, state=st.sampled_from(["succeeded", "failed", "cancelled"]))
    def finish(self, claim: tuple[str, int], state: Any) -> None:
        if job := self.fenced(claim, lambda *held: self.store.finish(*held, state)):
            job.end(state)

    @rule(claim=claims)
    def release(self, claim: tuple[str, int]) -> None:
        if job := self.fenced(claim, self.store.release):
            job.state = "queued"
            if job.asked_to_stop:
                job.end("cancelled")
            else:
                job.events.append("queued")

    @rule(claim=claims, retry=st.booleans())
    def fail_attempt(self, claim: tuple[str, int], retry: bool) -> None:
        if job := self.fenced(claim, lambda *held: self.store.fail_attempt(*held, WORKER_ERROR, retry=retry)):
            if retry:
                job.fail()
            else:
                job.end("failed")

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if not self.jobs:
            return
        job = data.draw(st.sampled_from(self.jobs))
        if job.state in ("succeeded", "failed", "cancelled"):
            with pytest.raises(Conflict):
                self.store.cancel(job.id)
            return
        self.store.cancel(job.id)
        if job.state == "queued" or job.until <= self.now:
            job.end("cancelled")
        elif not job.asked_to_stop:
            job.asked_to_stop = True
            job.events.append("cancel_requested")

    @invariant()
    def every_job_is_as_the_model_says(self) -> None:
        listed, more = self.store.list(limit=1000)
        assert more is None
        assert [job.id for job in listed] == [job.id for job in reversed(self.jobs)]
        for job, model in zip(reversed(listed), self.jobs, strict=True):
            assert (job.state, job.attempt, job.progress, job.cancel_requested) == (
                model.state, model.attempt, model.progress, model.asked_to_stop,
            )  # fmt: skip
            assert (job.worker is not None) == (job.lease_expires_at is not None) == (job.state == "running")
            assert (job.finished_at is not None) == job.finished
            events = self.store.events(job.id)
            assert [event.type for event in events] == model.events
            assert [event.seq for event in events] == list(range(1, len(events) + 1))
        counts = {state: count for state, count in self.store.counts().items() if count}
        states = [job.state for job in self.jobs]
        assert counts == {state: states.count(state) for state in set(states)}


def sqlite(_request: pytest.FixtureRequest) -> Callable[[Path, Callable[[], float]], JobStore]:
    return lambda folder, now: SqliteJobStore(folder / "jobs.sqlite", now=now)


def redis(request: pytest.FixtureRequest) -> Callable[[Path, Callable[[], float]], JobStore]:
    """The keys of every history begin with the name of its folder, so that none sees another's jobs."""
    url = request.getfixturevalue("redis_url")
    return lambda folder, now: RedisJobStore(url, prefix=folder.name, now=now)


OPENERS = {"sqlite": sqlite, "redis": redis}


@pytest.mark.slow
@pytest.mark.parametrize("backend", OPENERS)
def test_random_histories(backend: str, request: pytest.FixtureRequest) -> None:
    machine = type("Histories", (History,), {"open_store": staticmethod(OPENERS[backend](request))})
    few = settings(max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(machine, settings=few)
