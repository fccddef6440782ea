"""When a new version goes live: always, never, or if it is better than what is live on the job's own validation set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prompts_store import Bundle
from server.engine.images import decode
from server.engine.images.decode import Geometry
from server.jobs.job import Job
from server.training.recipe import resolve
from server.worker.dataset_reader import DatasetReader
from tests.worker.test_trainer import House

GOOD = {"epochs": 30, "lr": 1e-2}
POOR = {"epochs": 1, "lr": 1e-9}


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def done(house: House, recipe: dict[str, Any], publish: str) -> Job:
    job = house.jobs.submit("fruit", house.dataset, "linear", recipe, publish=publish, max_attempts=3)
    finished = house.worked(job)
    assert finished.state == "succeeded", finished.error
    return finished


def live(house: House) -> str | None:
    alias = house.store.aliases("fruit").get("live")
    return alias.targets[0].version if alias else None


def told(house: House, job: Job, type_: str) -> dict[str, Any]:
    (event,) = [event for event in house.jobs.events(job.id) if event.type == type_]
    return event.data


def changed(house: House, version: str, **changes: Any) -> Bundle:
    """A stored version again with another manifest."""
    bundle = house.store.get("fruit", version)
    return Bundle.build(replace(bundle.manifest, **changes), bundle.tensors)


def test_never_keeps_the_version_and_moves_nothing(house: House) -> None:
    job = done(house, GOOD, "never")
    assert [info.version for info in house.store.versions("fruit")] == [job.version]
    assert live(house) is None
    assert told(house, job, "kept") == {"version": job.version, "reason": "never"}
    assert job.metrics["published"] is False


def test_if_better_takes_the_first_version_and_then_only_better_ones(house: House) -> None:
    first = done(house, POOR, "if_better")
    assert (live(house), first.metrics["published"]) == (first.version, True)
    better = done(house, GOOD, "if_better")
    assert live(house) == better.version
    scores = told(house, better, "published")
    assert scores["new"]["accuracy"] > scores["live"]["accuracy"]
    assert scores["live"]["version"] == first.version
    worse = done(house, POOR, "if_better")
    assert live(house) == better.version
    kept = told(house, worse, "kept")
    assert (kept["version"], kept["reason"], kept["live"]["version"]) == (worse.version, "not_better", better.version)
    assert kept["new"]["accuracy"] < kept["live"]["accuracy"]
    assert worse.metrics["judged"] == {"new": kept["new"], "live": kept["live"]}
    assert worse.metrics["published"] is False
    assert len(house.store.versions("fruit")) == 3, "the version itself is kept"


def test_the_score_of_the_new_version_is_the_accuracy_that_the_fit_measured(house: House) -> None:
    job = done(house, GOOD, "if_better")
    assert job.metrics["judged"]["new"]["accuracy"] == job.metrics["val_accuracy"]


def test_as_often_right_but_surer_is_better_and_the_very_same_is_not(house: House) -> None:
    sure = done(house, {"epochs": 60, "lr": 1e-2}, "if_better")
    again = done(house, {"epochs": 60, "lr": 1e-2}, "if_better")
    assert live(house) == sure.version
    judged = again.metrics["judged"]
    assert (judged["new"]["accuracy"], judged["new"]["nll"]) == (judged["live"]["accuracy"], judged["live"]["nll"])
    surer = done(house, {"epochs": 90, "lr": 1e-2}, "if_better")
    judged = surer.metrics["judged"]
    assert judged["new"]["accuracy"] == judged["live"]["accuracy"], "this test is about equals"
    assert judged["new"]["nll"] < judged["live"]["nll"]
    assert live(house) == surer.version


def test_live_moved_while_it_was_judged_so_the_new_live_is_judged(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    best, poor = done(house, GOOD, "always"), done(house, POOR, "always")
    assert live(house) == poor.version
    get, seen = house.store.get, []

    def meanwhile(task: str, version: str) -> Bundle:
        bundle = get(task, version)
        seen.append(version)
        if len(seen) == 1:
            house.store.set_alias("fruit", "live", best.version)
        return bundle

    monkeypatch.setattr(house.store, "get", meanwhile)
    middling = done(house, {"epochs": 3, "lr": 1e-3}, "if_better")
    assert seen == [poor.version, best.version]
    assert live(house) == best.version
    assert told(house, middling, "kept")["live"]["version"] == best.version


def test_a_live_version_for_another_backbone_counts_as_worse_and_is_named(house: House) -> None:
    good = done(house, GOOD, "always")
    backbone = replace(house.store.get("fruit", good.version).manifest.backbone, fingerprint="f" * 64)
    foreign = house.store.put(changed(house, good.version, backbone=backbone))
    house.store.set_alias("fruit", "live", foreign)
    job = done(house, POOR, "if_better")
    assert live(house) == job.version
    event = told(house, job, "live_unusable")
    assert (event["version"], event["code"]) == (foreign, "wrong_backbone")
    assert "live" not in told(house, job, "published")


def test_a_later_attempt_leaves_the_alias_to_whoever_moved_it_since(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt published and died; somebody rolled back before the second one came."""
    other = done(house, POOR, "always")
    job = house.submit("linear")
    with monkeypatch.context() as patch:
        patch.setattr(house.jobs, "finish", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("power cut")))
        house.trainer.work_once()
    assert live(house) != other.version
    house.store.rollback("fruit", "live")
    again = house.worked(job)
    assert (again.state, again.attempt) == ("succeeded", 2)
    assert live(house) == other.version
    assert len(house.store.history("fruit", "live")) == 3


# --- judging ----------------------------------------------------------------------------------------------------------


def rearranged(house: House, version: str, order: list[int], labels: tuple[str, ...]) -> Bundle:
    """The same head with its classes in another order, or fewer of them."""
    bundle = house.store.get("fruit", version)
    tensors = {**bundle.tensors, **{name: bundle.tensors[name][order] for name in ("head.weight", "head.bias")}}
    return Bundle.build(replace(bundle.manifest, labels=labels), tensors)


@pytest.fixture
def judge(house: House) -> Callable[[Bundle], Any]:
    trainer = house.trainer
    heartbeat = type("Still", (), {"check": staticmethod(lambda: None)})()
    return trainer._fit_job(house.jobs.cancel(house.submit("linear").id), heartbeat).evaluate


def test_labels_meet_by_name(house: House, judge: Callable[[Bundle], Any]) -> None:
    version = done(house, GOOD, "always").version
    as_it_is = judge(house.store.get("fruit", version))
    turned = judge(rearranged(house, version, [2, 0, 1], ("plum", "lemon", "lime")))
    assert turned.accuracy == as_it_is.accuracy > 0.9
    assert turned.nll == pytest.approx(as_it_is.nll, abs=1e-6)
    swapped = judge(rearranged(house, version, [0, 1, 2], ("lime", "lemon", "plum")))
    assert swapped.accuracy == pytest.approx(1 / 3)


def test_a_picture_whose_label_is_unknown_counts_as_wrong(house: House, judge: Callable[[Bundle], Any]) -> None:
    version = done(house, GOOD, "always").version
    without_plum = judge(rearranged(house, version, [0, 1], ("lemon", "lime")))
    assert without_plum.accuracy == pytest.approx(2 / 3)
    assert without_plum.nll > 100 / 3 - 1e-3


def test_each_version_sees_the_pictures_as_it_asks(house: House) -> None:
    dataset = house.datasets.get(house.dataset)
    own = Geometry(32, "bicubic", 0.9, "center")
    reader, recipe = DatasetReader(house.decoder(own)), resolve({}, {})
    splits = reader.splits(dataset, recipe)
    batches = reader.validation(dataset, recipe, lambda: None)
    files = {example.sha256: house.datasets.read(example.sha256) for example in dataset.examples}
    for geometry in (own, Geometry(32, "bilinear", 0.5, "squash")):
        shown = [
            (cut.tobytes(), label)
            for cuts, labels in batches(geometry)
            for cut, label in zip(cuts, labels, strict=True)
        ]
        cut = {
            (np.ascontiguousarray(decode.pixels(files[e.sha256], geometry, max_pixels=10**7)).tobytes(), e.label)
            for e in dataset.examples
        }
        assert len(shown) == len(splits.val) == len(set(shown))
        assert set(shown) < cut
