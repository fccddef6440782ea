"""A search as a job: its head answers while prompts are tried, and its progress says where it is."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.jobs.job import Job, Publish
from server.training import progress
from server.training.progress import Progress, ShareClock
from server.worker.heartbeat import Heartbeat
from tests.worker.test_trainer import House

SEARCH = {"search": "auto", "budget": 300, "epochs": 2, "prompts": 2}


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def submit(house: House, publish: Publish = "always", **recipe: Any) -> Job:
    asked = {**SEARCH, **recipe}
    return house.jobs.submit("fruit", house.dataset, "auto", asked, publish=publish, max_attempts=3)


def told(house: House, job: Job, type_: str) -> list[dict[str, Any]]:
    return [event.data for event in house.jobs.events(job.id) if event.type == type_]


def live(house: House) -> str | None:
    alias = house.store.aliases("fruit").get("live")
    return alias.heaviest if alias else None


def at_the_first_prompts(monkeypatch: pytest.MonkeyPatch, happen: Any) -> None:
    """Let something happen when the first trial with prompts makes a step: the seventh, after six heads."""
    on_progress, seen = Heartbeat.on_progress, []

    def watching(heartbeat: Heartbeat, now: Progress) -> None:
        if now.trial == 7 and now.phase == "search" and now.step and not seen:
            seen.append(now)
            happen()
        on_progress(heartbeat, now)

    monkeypatch.setattr(Heartbeat, "on_progress", watching)


def test_the_head_answers_and_outlives_a_cancel_of_the_search(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was ready after seconds, and a cancel after 25 minutes threw it away."""
    caplog.set_level(logging.INFO)
    job = submit(house)
    at_the_first_prompts(monkeypatch, lambda: (house.jobs.cancel(job.id), time.sleep(1.2)))
    assert house.worked(job).state == "cancelled"
    [early] = told(house, job, "published")
    assert (early["preliminary"], early["version"]) == (True, live(house))
    manifest = house.store.get("fruit", early["version"]).manifest
    assert (manifest.method, manifest.metrics["preliminary"]) == ("linear", True)
    assert (early["val_accuracy"], early["val_interval"]) == (
        manifest.metrics["val_accuracy"],
        manifest.metrics["val"]["interval"],
    )
    share = f"{early['val_accuracy']:.1%} of {early['val_images']} pictures"
    assert f"version {early['version'][:12]} is live; a preliminary head: validation accuracy {share}" in caplog.text


def test_a_search_that_is_resumed_publishes_its_head_once_and_ends_with_the_same_bits(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut() -> None:
        raise RuntimeError("power cut")

    undisturbed, job = house.worked(submit(house)), submit(house)
    assert len(told(house, undisturbed, "published")) == 2
    with monkeypatch.context() as patch:
        at_the_first_prompts(patch, cut)
        assert house.worked(job).state == "queued"
    assert house.worked(job).state == "succeeded"
    early = told(house, job, "kept")  # the undisturbed job's version is better
    assert ({one["preliminary"] for one in early}, len({one["version"] for one in early})) == ({True}, 1)
    assert [one.get("preliminary") for one in told(house, job, "published")] == [None]
    [first, second] = (house.store.get("fruit", house.jobs.get(one.id).version) for one in (undisturbed, job))
    assert first.manifest.metrics == second.manifest.metrics
    assert all((first.tensors[name] == second.tensors[name]).all() for name in first.tensors)


def test_never_and_a_better_live_version_keep_the_head_from_going_live(house: House) -> None:
    kept = house.worked(submit(house, "never"))
    assert live(house) is None
    assert [one.get("preliminary") for one in told(house, kept, "kept")] == [True, None]
    sure = house.jobs.submit("fruit", house.dataset, "linear", {"epochs": 90, "lr": 1e-2}, max_attempts=3)
    best = house.worked(sure).version
    assert live(house) == best
    again = submit(house)
    house.worked(again)
    [early] = told(house, again, "kept")
    assert (early["preliminary"], early["reason"], early["live"]["version"]) == (True, "not_better", best)
    assert early["new"]["images"] == early["live"]["images"] > 0
    assert live(house) == house.jobs.get(again.id).version, "the full fit goes live: the policy is always"


def test_the_progress_moves_through_the_phases(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    on_progress, seen = Heartbeat.on_progress, []

    def watching(heartbeat: Heartbeat, now: Progress) -> None:
        on_progress(heartbeat, now)
        seen.append(now)

    monkeypatch.setattr(Heartbeat, "on_progress", watching)
    job = house.worked(submit(house))
    phases = list(dict.fromkeys(now.phase for now in seen))
    assert phases[:4] == ["features", "search", "head", "fit"]
    shares = [now.share for now in seen if now.phase in ("features", "search")]
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] < 1
    trials = job.metrics["search"]["trials"]
    assert all(low <= one["val_accuracy"] <= high for one in trials for low, high in [one["val_interval"]])
    assert 1 <= job.metrics["search"]["chosen"] <= len(trials)
    assert {one["val_nll"] is None for one in told(house, job, "epoch")} == {False}
    assert job.progress["phase"] in {*phases, "publish"}


def test_the_time_left_falls_while_a_long_step_runs(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    submit(house)
    job = house.jobs.claim("w", 30)
    assert job is not None
    moment = [100.0]
    monkeypatch.setattr("server.worker.heartbeat.time.monotonic", lambda: moment[0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: moment[0])
    heartbeat = Heartbeat(house.jobs, job, 30, house.trainer.stop)

    def beaten_at(now: float, **changes: Any) -> tuple[float | None, float | None]:
        moment[0] = now
        if changes:
            heartbeat.on_progress(replace(Progress(phase="features"), **changes))
        heartbeat.beat()
        stored = house.jobs.get(job.id).progress
        return stored["share"], stored["eta_s"]

    assert beaten_at(100, share=0.0) == (0.0, None)
    assert beaten_at(101, share=0.1) == (0.1, None), "too early to tell"
    assert beaten_at(110, share=0.2) == (0.2, 40.0)
    assert beaten_at(112) == (0.2, 38.0)
    assert beaten_at(160) == (0.2, 0.0)
    assert beaten_at(161, share=0.5, eta_s=7.0) == (0.5, 7.0), "the fit's own estimate is better"


def test_a_share_that_falls_starts_the_clock_again(monkeypatch: pytest.MonkeyPatch) -> None:
    moment, clock = [0.0], ShareClock()
    monkeypatch.setattr(progress.time, "perf_counter", lambda: moment[0])

    def at(now: float, share: float) -> float | None:
        moment[0] = now
        return clock.eta_s(share)

    assert [at(0, 0.5), at(10, 1.0), at(20, 0.0), at(24, 0.5)] == [None, 0.0, None, 4.0]
