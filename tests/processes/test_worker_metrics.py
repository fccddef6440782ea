"""The process manager's figures about workers, as a front end reads and reports them."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from server.observability import metrics
from server.observability.multiprocess import ProcessMetrics, merged_registry
from server.processes.child import ForkedProcess
from server.processes.worker_metrics import MANAGER, WorkerMetrics, running_workers


@pytest.fixture
def workers(tmp_path: Path) -> list[ForkedProcess]:
    return [ForkedProcess(f"worker-{number}", lambda child, send_ready: 0) for number in range(3)]


def test_a_front_end_reports_what_the_manager_wrote(tmp_path: Path, workers: list[ForkedProcess]) -> None:
    front = ProcessMetrics(tmp_path, "front-0-1", CollectorRegistry())
    assert running_workers(front) == 0, "nothing has been written"
    written = WorkerMetrics(workers, tmp_path)
    workers[0].pid, workers[2].pid, workers[1].ends = 11, 12, 4
    written.write()
    assert running_workers(front) == 2
    seen = merged_registry(front).get_sample_value
    assert [seen("lensrack_workers", {"state": state}) for state in ("wanted", "running")] == [3, 2]
    assert seen("lensrack_worker_restarts_total") == 4


def test_the_metrics_are_those_of_a_server_in_one_process(tmp_path: Path, workers: list[ForkedProcess]) -> None:
    here = {family.name: (family.type, family.documentation) for family in WorkerMetrics(workers, tmp_path).collect()}
    there = {one.name: (one.type, one.documentation) for one in metrics.REGISTRY.collect()}
    assert here.items() <= there.items()
    assert len(here) == 2


def test_what_cannot_be_written_is_written_later(tmp_path: Path, workers: list[ForkedProcess]) -> None:
    folder = tmp_path / "not yet"
    written = WorkerMetrics(workers, folder)
    written.write()
    folder.mkdir()
    written.write()
    assert (folder / f"{MANAGER}.metrics").exists()


def test_only_changes_are_written(tmp_path: Path, workers: list[ForkedProcess]) -> None:
    written, file = WorkerMetrics(workers, tmp_path), tmp_path / f"{MANAGER}.metrics"
    written.write()
    file.unlink()
    written.write()
    assert not file.exists()
    workers[0].pid = 11
    written.write()
    assert file.exists()
