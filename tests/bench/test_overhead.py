"""The benchmark of what a request costs beside the model runs from the command line and says what it has measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from server.bench import overhead
from tests.e2e.server_process import environment


@pytest.mark.slow
@pytest.mark.long
def test_it_charges_a_server_whose_engine_answers_at_once(tmp_path: Path) -> None:
    options = ["--rounds", "1", "--requests", "40", "--clients", "1", "2", "--json", str(tmp_path / "overhead.json")]
    done = subprocess.run(
        [sys.executable, "-m", "server", "bench", "overhead", *options],
        env=environment(tmp_path / "unused", {}),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "overhead.json").read_text())
    rows = ["lensrack, pixels", "lensrack, small", "lensrack, PNG", "uvicorn alone, pixels", "uvicorn alone, small"]
    assert [list(times) for times in report["cpu_ms"].values()] == [rows, rows]
    # of the others a tick of the clock may see nothing
    assert all(times["lensrack, PNG"] > 0 for times in report["cpu_ms"].values())
    assert "| lensrack, PNG |" in done.stdout


def test_ratios_are_to_the_peer_that_was_asked_the_same() -> None:
    few = {"lensrack, pixels": 1.0, "lensrack, PNG": 3.0, "LitServe, pixels": 4.0, "LitServe, small": 2.0}
    output = overhead.table({"cpu_ms": {"1": few, "8": {**few, "lensrack, pixels": 2.0}}})
    assert "| CPU ms a request | 1 client | 8 clients |" in output
    assert "| lensrack, pixels | 1.00 (0.25) | 2.00 (0.50) |" in output
    assert "| lensrack, PNG | 3.00 | 3.00 |" in output
