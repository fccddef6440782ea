"""The soak runs on a real server, and its judgement knows growth from none."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.soak import PORTIONS, Reading, growth, portions

ROOT = Path(__file__).resolve().parents[2]
BAND = argparse.Namespace(rss_mib=32.0, fds=4.0)


@pytest.mark.slow
@pytest.mark.long
def test_it_tells_of_every_process_and_each_kind_of_work(tmp_path: Path) -> None:
    budget = ["--predictions", "3", "--cycles", "2", "--jobs", "1"]
    band = [
        "--warm-up",
        "2",
        "--rss-mib",
        "1e9",
        "--fds",
        "1e9",
        "--json",
        str(tmp_path / "soak.json"),
    ]  # nothing so small tells growth
    command = [sys.executable, "-m", "tests.soak", *budget, *band]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "soak.json").read_text())
    output = {(answer["work"], answer["done"], answer["process"]) for answer in result}
    kinds = {("predictions", 3), ("cycles", 2), ("jobs", 1)}
    assert output == {(*kind, process) for kind in kinds for process in ("front end", "engine", "worker")}
    assert all(min(*answer["rss_mib"], *answer["fds"]) > 0 for answer in result)
    assert "| 3 predictions | engine |" in done.stdout


@pytest.mark.parametrize(
    ("rss_step", "fds_step", "inside"), [(0.0, 0, True), (1.0, 0, True), (3.0, 0, False), (0.0, 1, False)]
)
def test_growth_is_what_leaves_the_band(rss_step: float, fds_step: int, inside: bool) -> None:
    readings = [Reading(500 + rss_step * turn, 40 + fds_step * turn) for turn in range(20)]
    assert growth("jobs", 20, "worker", readings, BAND).inside is inside


def test_one_high_reading_is_not_growth() -> None:
    readings = [Reading(500, 40)] * 19 + [Reading(900, 400)]
    assert growth("jobs", 20, "worker", readings, BAND).inside


@pytest.mark.parametrize("count", [0, 1, 19, 20, 21, 100_000])
def test_portions_are_all_of_it(count: int) -> None:
    parts = list(portions(count))
    assert sum(parts) == count
    assert len(parts) <= PORTIONS
    assert 0 not in parts
