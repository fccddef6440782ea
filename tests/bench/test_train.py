"""The benchmark of a training step compares steps that are the same but for how they are computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from server.bench import train


def test_what_a_step_takes_is_told_with_its_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    threads = torch.get_num_threads()
    small = ["--arch", "vit_tiny_patch16_224", "--prompts", "2", "--batch", "2", "--rounds", "1"]
    small += ["--kinds", "lensrack plain float32"]
    try:
        train.main([*small, "--json", str(tmp_path / "fit.json"), "--picture", str(tmp_path / "fit.svg")])
    finally:
        torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "fit.json").read_text())["rows"]
    assert rows[0]["name"] == train.LITERAL
    assert rows[0]["gradient_off"] == 0
    assert len(rows) == 2
    for row in rows:
        assert row["peak_mib"] > 0
        assert row["cpu_ms"] > 0
    assert "| literal float32 | 2 |" in capsys.readouterr().out
    assert "2 prompts" in (tmp_path / "fit.svg").read_text()


def test_every_variant_has_the_literal_gradient() -> None:
    options = train._options(["--arch", "vit_tiny_patch16_224", "--batch", "2"])
    literal = train.step(train.LITERAL, 3, options)()
    for name in train._kinds(options):
        off = float((train.step(name, 3, options)() - literal).norm() / literal.norm())
        assert off < (1e-4 if "float32" in name else 0.2), name
