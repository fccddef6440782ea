"""The benchmark of a version's way from the store to its first answer runs from the command line, files and Redis."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.server_process import environment


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("store", [[], ["--redis"]], ids=["file", "redis"])
def test_every_version_that_is_published_answers(tmp_path: Path, store: list[str]) -> None:
    options = ["--rounds", "1", "--swaps", "3", "--pause", "0.05", "--method", "linear", *store]
    done = subprocess.run(
        [sys.executable, "-m", "server", "bench", "swap", *options, "--json", str(tmp_path / "swap.json")],
        env=environment(tmp_path / "unused", {}),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "swap.json").read_text())
    assert report["failures"] == 0
    assert report["first_answer_ms"]["count"] == 3
    assert report["neighbour_swapping_ms"]["count"] == report["neighbour_calm_ms"]["count"] > 0
    assert "published → first answer" in done.stdout
