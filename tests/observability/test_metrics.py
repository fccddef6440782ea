"""The metrics' labels stay few whatever tasks are requested, and stable while the traffic is."""

from __future__ import annotations

import random
import re
from collections import Counter as Count

import pytest
from prometheus_client import generate_latest

from server.observability import metrics
from server.observability.task_labels import CANDIDATES, OTHER, REVIEW_S, TaskLabels


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def forgotten() -> list[str]:
    return []


@pytest.fixture
def labels(clock: Clock, forgotten: list[str]) -> TaskLabels:
    return TaskLabels(5, forgotten.append, clock=clock)


def test_ten_thousand_tasks_have_five_labels_and_other(labels: TaskLabels):
    seen = {labels.count(f"task-{n}") for n in range(10_000)}
    assert seen == {*(f"task-{n}" for n in range(5)), OTHER}
    assert len(labels) == 5
    assert len(labels._candidates) <= CANDIDATES * 5


def test_ten_thousand_tasks_stay_five_over_many_reviews(labels: TaskLabels, clock: Clock, forgotten: list[str]):
    rng = random.Random(0)
    live: set[str] = set()
    for _ in range(100_000):
        clock.now += REVIEW_S / 2_000
        label = labels.count(f"task-{min(9_999, int(rng.paretovariate(0.4)))}")
        live.add(label)
        live -= set(forgotten)
        assert len(live - {OTHER}) <= 5
    assert len(forgotten) <= 20, "places change hands rarely"
    assert {f"task-{n}" for n in (1, 2, 3)} <= {labels.label(f"task-{n}") for n in range(10)}, "the busiest have places"


def test_tasks_as_busy_as_those_with_a_place_do_not_take_it(labels: TaskLabels, clock: Clock, forgotten: list[str]):
    for _ in range(50):
        clock.now += REVIEW_S
        for n in range(10):
            labels.count(f"task-{n}", 100)
    assert not forgotten


def test_a_task_that_becomes_busy_gets_the_place_of_the_least_busy_one(
    labels: TaskLabels, clock: Clock, forgotten: list[str]
):
    for n in range(5):
        labels.count(f"task-{n}", 10 * (n + 1))
    assert labels.count("new", 1000) == OTHER
    clock.now += REVIEW_S
    assert labels.count("new") == "new"
    assert forgotten == ["task-0"]
    assert labels.count("task-0") == OTHER


def test_a_crowd_of_strangers_takes_no_place(labels: TaskLabels, clock: Clock, forgotten: list[str]):
    """Space-Saving gives a new task the traffic of the one it replaced; only the certain part may count."""
    for n in range(5):
        labels.count(f"task-{n}", 30)
    for n in range(20_000):
        labels.count(f"stranger-{n}")
    clock.now += REVIEW_S
    labels.count("task-0")
    assert not forgotten


def test_traffic_of_the_past_counts_less_and_less(labels: TaskLabels, clock: Clock):
    for n in range(5):
        labels.count(f"old-{n}", 1000)
    for _ in range(10):
        clock.now += REVIEW_S
        labels.count("new", 10)
    assert labels.label("new") == "new"


def test_a_task_called_other_shares_the_label_of_the_others(labels: TaskLabels, clock: Clock, forgotten: list[str]):
    for _ in range(3):
        labels.count(OTHER, 1_000_000)
        clock.now += REVIEW_S
    assert len(labels) == 0
    assert not forgotten
    assert labels.count("cats") == "cats"


def test_fewer_places_keep_the_busiest(labels: TaskLabels, forgotten: list[str]):
    for n in range(5):
        labels.count(f"task-{n}", n + 1)
    labels.resize(2)
    assert forgotten == ["task-0", "task-1", "task-2"]
    assert [labels.label(f"task-{n}") for n in range(5)] == [OTHER] * 3 + ["task-3", "task-4"]


def test_no_places_at_all_is_a_choice(clock: Clock):
    none = TaskLabels(0, lambda task: None, clock=clock)
    clock.now = 2 * REVIEW_S
    assert {none.count(f"task-{n}") for n in range(100)} == {OTHER}


def test_places_that_open_up_are_taken_by_who_was_watched(clock: Clock):
    labels = TaskLabels(0, lambda task: None, clock=clock)
    for task in ("fish", "birds", "fish"):
        labels.count(task)
    labels.resize(1)
    clock.now = 2 * REVIEW_S
    assert labels.count("trees") == OTHER
    assert labels.tasks() == ["fish"]


def test_ten_thousand_tasks_in_the_registry_are_a_page_of_bounded_size():
    """As the server sets them: rows, seconds, hits, loads and evictions of 10,000 tasks, then other busiest tasks."""
    places = metrics.TASKS.capacity
    metrics.TASKS.resize(10)
    try:
        for n in range(10_000):
            task = f"many-{n}"
            metrics.TASK_ROWS.labels(metrics.TASKS.count(task), "answered").inc()
            metrics.TASK_S.labels(metrics.TASKS.label(task)).observe(0.01)
            for counter in (metrics.RACK_HITS, metrics.RACK_LOADS, metrics.RACK_EVICTIONS):
                counter.labels(metrics.TASKS.label(task)).inc()
        page = generate_latest(metrics.REGISTRY).decode()
        names = Count(re.findall(r'lensrack_task_rows_total\{outcome="answered",task="([^"]+)"\}', page))
        assert OTHER in names
        assert len(names) <= 11
        assert all(times == 1 for times in names.values())
        assert len(set(re.findall(r'task="(many-[^"]+)"', page))) <= 10
    finally:
        for task in list(metrics.TASKS._traffic):
            metrics._remove_task(task)
        metrics.TASKS.resize(0)
        metrics.TASKS.resize(places)


def test_a_task_that_lost_its_place_leaves_no_series_behind():
    for metric in metrics._BY_TASK:
        assert "task" in metric._labelnames
    metrics.RACK_HITS.labels("was-here").inc()
    metrics.TASK_ROWS.labels("was-here", "answered").inc()
    metrics.TASK_ROWS.labels("was-here", "failed").inc()
    metrics._remove_task("was-here")
    assert b"was-here" not in generate_latest(metrics.REGISTRY)


def test_every_metric_with_a_task_label_is_forgotten_with_its_task():
    labelled = {metric for metric in vars(metrics).values() if "task" in getattr(metric, "_labelnames", ())}
    assert labelled == set(metrics._BY_TASK)


def test_every_metric_is_named_and_explained():
    for family in metrics.REGISTRY.collect():
        assert family.documentation.endswith((".", "429."))
        if not family.name.startswith("process_"):
            assert re.fullmatch(r"lensrack_[a-z_]+", family.name)
