"""The noisy neighbour's benchmark runs from the command line and tells the quiet tasks' latencies from its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from server.bench import noisy
from server.bench.load_generator import Answer, LoadResult
from tests.e2e.server_process import environment


@pytest.mark.slow
@pytest.mark.long
def test_from_the_command_line(tmp_path: Path) -> None:
    small = ["--tasks", "3", "--rounds", "1", "--seconds", "1", "--rate", "4", "--target", "0.05", "--flood", "20"]
    done = subprocess.run(
        [sys.executable, "-m", "server", "bench", "noisy", *small, "--json", str(tmp_path / "noisy.json")],
        env=environment(tmp_path / "unused", {}),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "noisy.json").read_text())
    assert set(report["quiet"]) == set(report["batch_limit"]) == {"as it comes", "with a target"}
    for kinds in report["quiet"].values():
        assert all(answers["asked"] > 0 for answers in kinds.values())
        assert kinds["noisy"]["noisy"]["answered"] > kinds["calm"]["noisy"]["answered"]
    assert "| as it comes, noisy |" in done.stdout


def test_quiet_tasks_ask_as_before_whatever_the_noisy_one_does() -> None:
    assert noisy.shares(noisy.CALM, 3, 10, 200) == [1, 1, 1]
    assert noisy.shares(noisy.NOISY, 3, 10, 200) == [10, 1, 1]
    assert noisy.shares(noisy.FLOODED, 3, 10, 200) == [200, 1, 1]


def seen(quiet_ms: float, noisy_ms: float) -> LoadResult:
    quiet = [Answer(0.0, 0.0, quiet_ms / 1e3, 200, None, task) for task in (1, 2)]
    answers = [Answer(0.0, 0.0, noisy_ms / 1e3, 200, None, 0), Answer(0.0, 0.0, 0.0, 429, "1", 0)]
    return LoadResult([*quiet, *answers, Answer(0.0, 0.0, 0.0, 503, None, 1)], 0.0, 1)


def test_ratios_are_medians_of_rounds() -> None:
    kinds = {kind: noisy.QuietTasks() for kind in (noisy.CALM, noisy.NOISY)}
    for calm, loud in ((10, 20), (10, 11), (20, 22)):
        kinds[noisy.CALM].add(seen(calm, 1))
        kinds[noisy.NOISY].add(seen(loud, 900))
    figures = noisy._figures(kinds)
    assert (figures["calm"]["p99_ratio"], figures["noisy"]["p99_ratio"]) == (1, 1.1)
    assert (figures["noisy"]["asked"], figures["noisy"]["failures"]) == (9, 3)
    assert figures["noisy"]["noisy"] == {"p50_ms": 900, "p95_ms": 900, "p99_ms": 900, "answered": 3, "refused": 3}
    page = noisy.table({"quiet": {"as it comes": figures}, "batch_limit": {"as it comes": 32.0}})
    assert "| as it comes, noisy | 20.0 | 22.0 | 22.0 | 1.1 | 3 of 9 | 900.0, 900.0 | 3 |" in page
