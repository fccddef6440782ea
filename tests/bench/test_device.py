"""The device check: it finds a device that computes wrongly, and runs where there is no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.bench import device as bench
from server.engine.rack import Rack
from server.methods.registry import METHODS

CPU = torch.device("cpu")
SMALL = "test_vit"


def run(tmp_path: Path) -> tuple[int, dict[str, list[dict[str, object]]]]:
    saved = tmp_path / "device.json"
    small = ["--check-arch", SMALL, "--arch", SMALL, "--prompts", "2", "--batches", "2", "--rounds", "1"]
    with pytest.raises(SystemExit) as ended:
        bench.main(["--device", "cpu", "--dtype", "float32", "--json", str(saved), *small])
    return int(ended.value.code or 0), json.loads(saved.read_text())


def test_every_method_is_compared_in_every_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = run(tmp_path)
    assert code == 0
    assert len(report["checks"]) == len(bench.BOUNDS) * (2 + len(METHODS))
    assert all(0 < float(str(check["drift"])) <= float(str(check["bound"])) for check in report["checks"])
    output = capsys.readouterr().out
    assert "no GPU was measured" in output
    assert "as a CUDA graph | 2 | – | – | not measured: there are no graphs on this device |" in output
    assert [row["what"] for row in report["speeds"] if row["ms"] is None] == [
        "timm, one task, as a CUDA graph",
        "the engine's plain trunk, as a CUDA graph",
        bench.BY_GRAPH,
    ]


def test_a_device_that_adds_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = Rack.logits

    def a_little_off(rack: Rack, *given: object) -> Tensor:
        return logits(rack, *given) + 1e-8  # type: ignore[arg-type]

    monkeypatch.setattr(Rack, "logits", a_little_off)
    answers = next(bench._checks(SMALL, CPU, torch.float64, 2))
    assert not answers.holds, answers
    assert "too far" in bench._table([answers])


def test_a_gradient_that_is_missing_is_found() -> None:
    assert bench._gradient_difference(None, torch.ones(2)) == float("inf")
    assert bench._gradient_difference(torch.ones(2), torch.ones(2).double()) == 0
