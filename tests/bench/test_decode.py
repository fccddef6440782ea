"""The benchmark of decoding tells of drift where there is some, and of none where pictures come whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from server.bench import decode


def test_every_margin_is_told_with_its_drift(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LENSRACK_BACKBONE", "untrained")
    threads = torch.get_num_threads()
    small = ["--sheets", "1", "--grids", "2", "--margins", "1", "8", "--tasks", "1", "--rounds", "1"]
    try:
        decode.main([*small, "--json", str(tmp_path / "decode.json")])
    finally:
        torch.set_num_threads(threads)
    whole, scaled, wide = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert whole["margin"] is None
    assert (whole["drift"], whole["pixel"], whole["agree"]) == (0, 0, 1)
    assert scaled["drift"] > 0
    assert scaled["pixel"] > 0
    assert (wide["drift"], wide["pixel"]) == (0, 0), "not large enough for so wide a margin"
    assert "| whole |" in capsys.readouterr().out
