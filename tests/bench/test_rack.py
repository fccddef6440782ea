"""The rack's benchmark tells where tasks were found, and its swaps are counted."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from server.bench import rack


def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: Sequence[str] = ()) -> dict:
    monkeypatch.setenv("LENSRACK_BACKBONE", "untrained")
    small = ["--tasks", "12", "--slots", "3", "--requests", "200", "--method", "linear", "--cache-mib", "0.05"]
    files = ["--json", str(tmp_path / "rack.json"), "--picture", str(tmp_path / "rack.svg")]
    threads = torch.get_num_threads()
    try:
        rack.main([*small, *files, *more])
    finally:
        torch.set_num_threads(threads)
    return json.loads((tmp_path / "rack.json").read_text())


def test_every_tier_is_told_and_every_swap_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    report = measured(tmp_path, monkeypatch, ["--swaps", "150"])
    assert list(report["tiers"]) == ["device", "host memory", "file"]
    assert sum(own["count"] for own in report["tiers"].values()) == 200
    assert report["resident"] == 3
    assert report["swaps"]["evictions"] == 150
    assert report["swaps"]["asked"] > 150
    assert len(report["swaps"]["rss_mib"]) == rack.READINGS + 1
    assert "150 swaps in" in capsys.readouterr().out
    assert "memory of the process" in (tmp_path / "rack.svg").read_text()


@pytest.mark.slow
@pytest.mark.long
def test_with_redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = measured(tmp_path, monkeypatch, ["--redis"])
    assert list(report["tiers"]) == ["device", "host memory", "Redis"]
    assert report["swaps"] is None


def test_growth_is_between_the_quarters() -> None:
    swaps = {
        "evictions": 1000, "seconds": 2.0, "first_quarter_mib": 10.0, "last_quarter_mib": 11.0, "bytes_each": 1048.6
    }  # fmt: skip
    tier = {"share": 1.0, "p50_ms": 0.5, "p99_ms": 1.0, "count": 3}
    report = {"options": vars(argparse.Namespace(tasks=5)), "store": "file", "resident": 3, "tiers": {"device": tier}}
    output = rack.table({**report, "swaps": swaps})
    assert "1,000 swaps in 2.0 s: RSS 10.0 → 11.0 MiB (1048.6 bytes each)" in output
    assert "| device | 100.0% | 0.500 | 1.000 | 3 |" in output
