"""Metrics of several processes as one: sums that never fall, gauges that make sense, and no more tasks than may be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from server.observability import metrics
from server.observability.multiprocess import SUMMED, ProcessMetrics, merged_registry
from server.observability.task_labels import OTHER, TaskLabels


class Process:
    """A process with a few metrics."""

    def __init__(self, folder: Path, name: str) -> None:
        self.registry = CollectorRegistry()
        self.rows = Counter("rows_total", "Rows.", ["task"], registry=self.registry)
        self.seconds = Histogram("seconds", "Time.", buckets=(1.0, 2.0), registry=self.registry)
        self.waiting = Gauge("waiting", "Rows that wait.", registry=self.registry)
        self.up = Gauge("lensrack_engine_up", "Is it.", registry=self.registry)
        self.memory = Gauge("process_resident_memory_bytes", "Memory.", registry=self.registry)
        self.ledger = ProcessMetrics(folder, name, self.registry)
        self.up.set(1)
        self.memory.set(100)

    def sees(self, sample: str, **labels: str) -> float | None:
        return merged_registry(self.ledger).get_sample_value(sample, labels)


@pytest.fixture
def two(tmp_path: Path) -> tuple[Process, Process]:
    one, other = Process(tmp_path, "one-1"), Process(tmp_path, "other-2")
    one.rows.labels("fish").inc(3)
    other.rows.labels("fish").inc(4)
    other.rows.labels("birds").inc()
    other.seconds.observe(1.5)
    other.waiting.set(7)
    other.ledger.write_snapshot()
    return one, other


def test_counts_are_sums_of_what_others_wrote_and_of_ones_own_moment(two: tuple[Process, Process]) -> None:
    one, _ = two
    assert one.sees("rows_total", task="fish") == 7
    assert one.sees("rows_total", task="birds") == 1
    one.rows.labels("fish").inc()
    one.seconds.observe(0.5)
    assert one.sees("rows_total", task="fish") == 8
    assert [one.sees("seconds_bucket", le=le) for le in ("1.0", "2.0", "+Inf")] == [1, 2, 2]
    assert one.sees("seconds_sum") == 2.0


def test_a_sample_of_another_process_can_be_read_by_name(two: tuple[Process, Process]) -> None:
    one, _ = two
    assert one.ledger.sample("other-2", "rows_total", task="fish") == 4
    assert one.ledger.sample("other-2", "waiting") == 7
    assert one.ledger.sample("other-2", "rows_total", task="cats") == 0
    assert one.ledger.sample("other-3", "rows_total", task="fish") == 0


def test_gauges_are_told_as_their_meaning_asks(two: tuple[Process, Process]) -> None:
    one, other = two
    assert one.sees("waiting") == 7, "the largest: only one of them has a queue"
    assert one.sees("process_resident_memory_bytes") == 200
    other.up.set(0)
    other.ledger.write_snapshot()
    assert one.sees("lensrack_engine_up") == 0, "the least"


def test_what_each_of_several_engines_has_is_added_up(tmp_path: Path) -> None:
    """Waiting rows, places, racks, which a front end lacks, are summed; gauges that are no counts are not."""
    engines = [Process(tmp_path, name) for name in ("engine-0-1", "engine-1-2")]
    front = Process(tmp_path, "front-0-3")
    for engine, rows in zip(engines, (3, 4), strict=True):
        Gauge("lensrack_queue_rows", "Rows.", registry=engine.registry).set(rows)
        Gauge("lensrack_queue_oldest_seconds", "Wait.", registry=engine.registry).set(rows)
        Gauge("lensrack_rack_bytes", "Bytes.", ["state"], registry=engine.registry).labels("used").set(10 * rows)
        engine.ledger.write_snapshot()
    Gauge("lensrack_queue_rows", "Rows.", registry=front.registry)
    assert front.sees("lensrack_queue_rows") == 7
    assert front.sees("lensrack_rack_bytes", state="used") == 70
    assert front.sees("lensrack_queue_oldest_seconds") == 4
    manager = ProcessMetrics(tmp_path, "house", CollectorRegistry())
    manager.retire("engine-1-2")
    assert front.sees("lensrack_queue_rows") == 3, "what waited at an engine that has ended waits no more"


def test_the_gauges_that_are_added_up_are_there() -> None:
    known = {family.name for family in metrics.REGISTRY.collect()}
    assert {name for name in SUMMED if name.startswith("lensrack_")} <= known


def test_what_a_process_had_counted_outlives_it_once(two: tuple[Process, Process], tmp_path: Path) -> None:
    one, _ = two
    manager = ProcessMetrics(tmp_path, "house", CollectorRegistry())
    for _ in range(2):
        manager.retire("other-2")
        assert one.sees("rows_total", task="fish") == 7
        assert one.sees("waiting") == 0, "its gauges have gone with it"
        assert one.sees("process_resident_memory_bytes") == 100
    third = Process(tmp_path, "other-3")
    third.rows.labels("fish").inc(10)
    third.ledger.write_snapshot()
    assert one.sees("rows_total", task="fish") == 17
    manager.retire("other-3")
    manager.retire("nobody-4")
    assert one.sees("rows_total", task="fish") == 17


def test_a_file_that_is_being_buried_counts_once(two: tuple[Process, Process], tmp_path: Path) -> None:
    """Between the two steps of `retire` both files contain the counts."""
    one, _ = two
    left = (tmp_path / "other-2.metrics").read_bytes()
    ProcessMetrics(tmp_path, "house", CollectorRegistry()).retire("other-2")
    (tmp_path / "other-2.metrics").write_bytes(left)
    assert one.sees("rows_total", task="fish") == 7


def test_tasks_of_the_past_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics.TASKS, "capacity", 2)
    manager, last = ProcessMetrics(tmp_path, "house", CollectorRegistry()), Process(tmp_path, "now-1")
    for number in range(10):
        process = Process(tmp_path, f"past-{number}")
        process.rows.labels(f"task-{number}").inc()
        process.rows.labels(OTHER).inc()
        process.ledger.write_snapshot()
        manager.retire(f"past-{number}")
    past = json.loads((tmp_path / "past.json").read_text())["families"]["rows"]["samples"]
    assert len({labels["task"] for _, labels, _ in past} - {OTHER}) <= 3
    assert last.sees("rows_total", task=OTHER) == 10


def test_a_torn_file_is_nothing(two: tuple[Process, Process], tmp_path: Path) -> None:
    one, _ = two
    (tmp_path / "torn-9.metrics").write_text('{"rows": {"type"')
    assert one.sees("rows_total", task="fish") == 7
    assert b"rows_total" in generate_latest(merged_registry(one.ledger))


def test_labels_are_taken_over_from_where_rows_are_counted() -> None:
    forgotten: list[str] = []
    labels = TaskLabels(2, forgotten.append)
    labels.adopt(["fish", "birds"])
    assert [labels.label(task) for task in ("fish", "birds", "cats")] == ["fish", "birds", OTHER]
    labels.adopt(["cats"])
    assert sorted(forgotten) == ["birds", "fish"]
    assert [labels.label(task) for task in ("fish", "cats")] == [OTHER, "cats"]
    assert labels.tasks() == ["cats"]
