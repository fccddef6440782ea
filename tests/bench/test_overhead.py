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
def test_it_charges_a_server_whose_engine_answers_at_once(tmp_path: Path) -> None:
    options = ["--rounds", "1", "--requests", "40", "--clients", "2", "--json", str(tmp_path / "overhead.json")]
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
    assert list(report["cpu_ms"]) == ["lensrack, pixels", "lensrack, PNG"]
    assert all(ms > 0 for ms in report["cpu_ms"].values())
    assert "| lensrack, PNG |" in done.stdout


def test_ratios_are_to_the_peer() -> None:
    report = {"clients": 8, "cpu_ms": {"lensrack, pixels": 1.0, "LitServe, a number": 4.0}}
    assert "| lensrack, pixels | 1.00 | 0.25 |" in overhead.table(report)
