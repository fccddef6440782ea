"""The ladder: every row that claims exactness is exact, and those that are not say by how much."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch

from server.bench import ladder, ladder_bench, ladder_layouts, ladder_steps
from server.bench.ladder_bench import Bench
from server.engine.packed import can_pack

LAYOUTS = ladder_layouts.layouts(2)  # whatever this machine has
EXACT = 1e-4  # float32 against float64, in standard deviations of the logits


@pytest.fixture(scope="module", autouse=True)
def small_pictures() -> Iterator[None]:
    """16 patches instead of 196: what a step answers is wrong or right with few tokens as with many."""
    with pytest.MonkeyPatch.context() as patch:
        small = partial(timm.create_model, img_size=64)
        patch.setattr(ladder_bench, "timm", SimpleNamespace(create_model=small))
        yield


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    bench = Bench("vit_tiny_patch16_224", tasks=2, prompts=3)
    with pytest.MonkeyPatch.context() as patch, ladder_layouts.using(1):  # as from the command line
        patch.setattr(ladder, "layouts", lambda cores: LAYOUTS)
        return ladder.measure(bench, argparse.Namespace(rounds=1, compile=False, final=False))


def test_every_step_in_float32_gives_the_literal_answer(report: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in [*report["rows"], *report["layouts"]]}
    exact = [
        name
        for name in rows
        if not any(kind in name for kind in ("bfloat16", "int8", "float8", "CUDA")) and rows[name]["drift"] is not None
    ]
    assert len(exact) >= 3
    assert all(rows[name]["drift"] < EXACT and rows[name]["agree"] == 1 for name in exact), rows


def test_no_answer_goes_uncompared(report: dict[str, Any]) -> None:
    steps = (*ladder.STEPS, *ladder.RAGGED, *ladder.CUDA, *LAYOUTS)
    for step, row in zip(steps, [*report["rows"], *report["layouts"]], strict=True):
        answered = not row["why"].startswith("not measured")
        assert (row["drift"] is not None) == (row["agree"] is not None) == (answered and step.truth is not None), row
    assert [step.name for step in steps if step.truth is None] == [step.name for step in ladder.STEPS[:2]]


def test_a_step_that_answers_something_else_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ragged rows against prompts that all tasks have as many of."""
    steps = [replace(step, truth=ladder_bench.exact) for step in ladder.RAGGED]
    monkeypatch.setattr(ladder, "STEPS", (ladder.STEPS[0], *steps))
    for name in ("RAGGED", "CUDA"):
        monkeypatch.setattr(ladder, name, ())
    monkeypatch.setattr(ladder, "layouts", lambda cores: ())
    bench = Bench("vit_tiny_patch16_224", tasks=2, prompts=3)
    report = ladder.measure(bench, argparse.Namespace(rounds=1, compile=False, final=False))
    assert all(row["drift"] > 1e-3 for row in report["rows"][1:] if row["drift"] is not None)


@pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.bfloat16), reason="PyTorch packs no bfloat16 weights here")
def test_a_step_that_rounds_says_so(report: dict[str, Any]) -> None:
    drifts = [row["drift"] for row in report["rows"] if row["name"].strip("… ").startswith("bfloat16")]
    assert len(drifts) == 2
    assert all(drift > 1e-3 for drift in drifts)


def test_float8_is_rounded_and_not_timed(report: dict[str, Any]) -> None:
    [row] = [row for row in report["rows"] if "float8" in row["name"]]
    assert row["cpu_ms"] is row["speed"] is None
    assert row["drift"] is None or 1e-3 < row["drift"] < 2, row


def test_the_table_has_every_step_and_marks_those_that_are_taken(report: dict[str, Any]) -> None:
    lines, laid_out = (table.splitlines() for table in ladder.tables(report).split("\n\n"))
    assert len(lines) == 2 + len(ladder.STEPS) + len(ladder.RAGGED) + len(ladder.CUDA)
    assert len(laid_out) == 2 + len(LAYOUTS)
    assert len({line.count("|") for line in lines}) == len({line.count("|") for line in laid_out}) == 1
    assert laid_out[2].startswith("| **one thread** |")
    absent = [line for line in lines if "CUDA" in line and "not measured: no CUDA" in line]
    assert len(absent) == (0 if torch.cuda.is_available() else len(ladder.CUDA))
    assert "| **prefix: prompts as keys and values** |" in ladder.tables(report)
    assert f"| {ladder_steps.STEPS[0].name} |" in lines[2]
    assert "| 1.00 |" in lines[2]


def test_what_this_machine_cannot_do_is_said_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder_bench, "can_pack", lambda *_: False)
    bench = Bench("vit_tiny_patch16_224", tasks=1, prompts=1)
    with pytest.raises(ladder_bench.NotAvailable, match="packs no"):
        bench.backbone(packed=True)
    step = ladder_bench.Step("packed", lambda bench: bench.served(bench.backbone(packed=True)), True)
    monkeypatch.setattr(ladder, "STEPS", (ladder.STEPS[0], step))
    monkeypatch.setattr(ladder, "RAGGED", ())
    monkeypatch.setattr(ladder, "layouts", lambda cores: LAYOUTS)
    lines = ladder.tables(ladder.measure(bench, argparse.Namespace(rounds=1, compile=False, final=False)))
    assert "| **packed** | – | – | – | – | not measured: this machine" in lines
    assert "| **one thread** | – | – | – | – | – | not measured: this machine" in lines


def test_from_the_command_line_with_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(ladder, "STEPS", ladder.STEPS[:3])
    monkeypatch.setattr(ladder, "RAGGED", ())
    monkeypatch.setattr(ladder, "CUDA", ())
    monkeypatch.setattr(ladder, "layouts", lambda cores: LAYOUTS[:1])
    threads = torch.get_num_threads()
    options = ["--arch", "vit_tiny_patch16_224", "--rounds", "1", "--tasks", "1", "--prompts", "1"]
    try:
        ladder.main([*options, "--json", str(tmp_path / "l.json"), "--picture", str(tmp_path / "l.svg")])
    finally:
        torch.set_num_threads(threads)
    [report] = json.loads((tmp_path / "l.json").read_text())["archs"]
    assert [row["name"] for row in report["rows"]] == [step.name for step in ladder.STEPS]
    assert [row["name"] for row in report["layouts"]] == ["one thread"]
    assert "literal, task by task" in (tmp_path / "l.svg").read_text()


def test_of_the_final_rows_each_is_a_step() -> None:
    assert set(ladder_steps.FINAL) <= {step.name for step in ladder_steps.STEPS}


def test_a_packed_timm_model_answers_as_the_plain_one() -> None:
    bench = Bench("vit_tiny_patch16_224", tasks=1, prompts=1)
    if not can_pack(torch.device("cpu"), torch.float32):
        pytest.skip("PyTorch packs no weights here")
    packed, plain = (step(bench)() for step in (ladder_steps.packed_timm, ladder_steps.plain_timm))
    torch.testing.assert_close(packed, plain, atol=1e-4, rtol=1e-4)
