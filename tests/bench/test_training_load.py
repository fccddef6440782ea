"""The benchmark of predictions beside a training job runs from the command line and saves what it has measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.server_process import environment


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(300)
def test_it_measures_both_phases(tmp_path: Path) -> None:
    options = ["--seconds", "2", "--rounds", "1", "--clients", "2", "--rate", "5", "--batch-size", "8"]
    done = subprocess.run(
        [sys.executable, "-m", "server", "bench", "training-load", *options, "--out", str(tmp_path / "figures")],
        env=environment(tmp_path / "unused", {}),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "with a job" in done.stdout
    report = json.loads((tmp_path / "figures" / "training-load.json").read_text())
    calm, busy = report["figures"]["without a job"], report["figures"]["with a job"]
    assert (calm["requests"], busy["requests"]) == (20, 20)
    assert (calm["failures"], busy["failures"]) == (0, 0)
    assert calm["training_steps"] == 0
    assert busy["training_steps"] > 0, "the job was under way while it was measured"
    assert report["ratio"]["p99_ms"] == round(busy["p99_ms"] / calm["p99_ms"], 2)
    assert not (tmp_path / "unused").exists(), "a benchmark leaves the user's own home alone"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_it_tells_what_there_is() -> None:
    unknown = run("nonsense")
    assert (unknown.returncode, "training-load" in unknown.stderr) == (2, True)
    assert "Traceback" not in unknown.stderr
    assert "--rate" in run("training-load", "--help").stdout
