"""What every benchmark tells beside its figures, where to, and in which form."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from server.bench import engine, noisy, overhead, reporting, swap
from server.bench.svg import Panel, bars

TABLE = "| server | ms |\n|---|---|\n| ours | 1.5 |"
SVG = "<svg xmlns='http://www.w3.org/2000/svg'><text>ours</text></svg>"


def report(options: argparse.Namespace) -> dict[str, Any]:
    return {**reporting.provenance("swap", options, dtype="float32", seeds="0"), "figures": {"p99": 1.5}}


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", type=Path)
    reporting.add_file_options(parser)
    return parser.parse_args(arguments)


def test_a_report_states_machine_versions_dtype_and_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    parsed = options("--weights", "a.safetensors")
    reporting.emit(report(parsed), TABLE, parsed, lambda _: SVG)
    output = capsys.readouterr().out
    assert output.startswith(TABLE), "Markdown, to be pasted"
    assert re.search(r"swap: \d+ cores of .+, .+, load [\d.]+ at the end; python 3\S+, torch \S+, timm \S+,", output)
    assert output.rstrip().endswith("dtype: float32; seeds: 0")


def test_figures_and_picture_go_into_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parsed = options(
        "--weights", "a.safetensors", "--json", str(tmp_path / "a.json"), "--picture", str(tmp_path / "a.svg")
    )
    reporting.emit(report(parsed), TABLE, parsed, lambda _: SVG)
    saved = json.loads((tmp_path / "a.json").read_text())
    assert saved["options"] == {"weights": "a.safetensors"}, "where it was saved says nothing"
    assert (saved["dtype"], saved["seeds"], saved["figures"]) == ("float32", "0", {"p99": 1.5})
    assert saved["machine"]["torch"] == torch.__version__
    assert {"cores", "processor", "load_average", "python", "timm", "lensrack", "cuda"} <= saved["machine"].keys()
    assert (tmp_path / "a.svg").read_text() == SVG


def test_on_a_terminal_tables_have_lines() -> None:
    """In a pseudo-terminal of its own."""
    code = f"import pty, sys; pty.spawn([sys.executable, '-c', {SHOWN!r}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, check=True)
    output = done.stdout.decode()
    assert "━" in output or "─" in output, output
    assert "|---" not in output
    assert "ours" in output


SHOWN = f"from server.bench.reporting import show; show({TABLE!r})"


def test_bars_are_one_for_each_figure_in_a_panel_for_each_group() -> None:
    pytest.importorskip("matplotlib")
    drawn = bars([Panel("p50", "ms", {"ours": 1.5, "theirs": 3.25}, ["ours"]), Panel("p99", "ms", {"ours": 2.0})])
    ElementTree.fromstring(drawn)
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawn)
    assert {"p50", "p99", "ours", "theirs", "1.5", "3.25", "2"} <= {text.strip() for text in texts}
    assert drawn == bars(
        [Panel("p50", "ms", {"ours": 1.5, "theirs": 3.25}, ["ours"]), Panel("p99", "ms", {"ours": 2.0})]
    )


def latencies(by: float) -> dict[str, float]:
    return {"p50": by, "p99": by + 1, "worst": by + 2}


DRAWN: dict[str, tuple[Any, Mapping[str, Any], set[str]]] = {
    "engine": (
        engine.draw,
        {"archs": [{"arch": "vit", "torch": "2", "forward": {"timm, 1 task": 2.0, "lensrack, 8 tasks": 1.25}}]},
        {"vit: forward", "lensrack, 8 tasks", "1.25"},
    ),
    "swap": (
        swap.draw_bars,
        {
            f"{name}_ms": latencies(10 * at)
            for at, name in enumerate(("first_answer", "any_answer", "neighbour_calm", "neighbour_swapping"), 1)
        },
        {"p50", "p99", "worst", "neighbour, calm", "41"},
    ),
    "noisy": (
        noisy.draw,
        {"quiet": {"as it comes": {"calm": {"p99_ms": 20.5}, "noisy": {"p99_ms": 22.0}}}},
        {"calm", "noisy", "20.5"},
    ),
    "overhead": (
        overhead.draw,
        {"cpu_ms": {"1": {"lensrack, pixels": 0.65, "LitServe, pixels": 2.33}}},
        {"clients: 1", "lensrack, pixels", "2.33"},
    ),
}


@pytest.mark.parametrize("name", DRAWN)
def test_each_benchmark_draws_what_it_has_found(name: str) -> None:
    pytest.importorskip("matplotlib")
    draw, report_of, expected = DRAWN[name]
    texts = {text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", draw(report_of))}
    assert expected <= texts, texts
