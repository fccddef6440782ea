"""`python -m server bench ladder`: from the literal forward to the one that serves, one step per row.

Every row answers the same pictures for the same `vpt_deep` tasks, one picture each. One CPU thread, CPU time, so that
other load on the machine matters as little as possible; rows take turns, round after round, and medians are reported
with their ratio to the plain timm forward of one task. Next to the time is each row's difference from the literal
forward's logits in float64: the largest difference, in standard deviations of the logits, and the share of pictures
with the same first label. Steps that the engine does not take stay in the table, marked so. A second table distributes
the final float32 forward over the CPU's threads, with wall times as well. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from . import reporting
from .engine import by_both_clocks
from .ladder_bench import Answer, Bench, Drift, NotAvailable, Step
from .ladder_cuda import CUDA
from .ladder_layouts import layouts
from .ladder_steps import COMPILED, FINAL, RAGGED, STEPS
from .svg import OTHER, OURS, as_svg, style

Truth = Callable[[Callable[[Bench], Answer]], NDArray[np.float64]]


@dataclass(frozen=True)
class Row:
    """Figures of one step. `speed`: relative to the table's first row; `drift` and `agree`: as in `Drift`."""

    name: str
    taken: bool
    why: str
    cpu_ms: float | None = None
    clock_ms: float | None = None
    speed: float | None = None
    drift: float | None = None
    agree: float | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    torch.set_num_threads(1)
    reports = []
    for arch in options.arch:
        weights = options.weights if len(options.arch) == 1 else None
        bench = Bench(arch, options.tasks, options.prompts, weights=weights)
        reports.append(measure(bench, options))
        reporting.show(f"{reports[-1]['title']}\n\n{tables(reports[-1])}\n")
    seeds = "0, and of each task its number"
    header = reporting.provenance("ladder", options, dtype="float32 where a row says nothing else", seeds=seeds)
    reporting.emit({**header, "archs": reports}, "", options, lambda _: draw(reports))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server bench ladder", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--arch", nargs="+", default=["deit_tiny_patch16_224"], help="plain timm ViTs")
    parser.add_argument("--weights", type=Path, help="safetensors for a single architecture (default: random)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every row (default: %(default)s)")
    parser.add_argument("--tasks", type=int, default=8, help="pictures, each of its own task (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=10, help="prompts of each layer (default: %(default)s)")
    parser.add_argument("--final", action="store_true", help="only timm, the literal forward and what the engine does")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well: takes minutes")
    reporting.add_file_options(parser)
    return parser.parse_args(arguments)


def measure(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Rows of all steps and of all layouts, with a description of their origin."""
    steps, cores = [*STEPS, *RAGGED, *CUDA, *([COMPILED] if options.compile else [])], os.cpu_count() or 1
    if options.final:
        steps = [step for step in steps if step.name in FINAL]
    truth: Truth = cache(lambda make: make(bench)().numpy())
    rows = _rows(bench, steps, options.rounds, truth, by="cpu_ms")
    laid_out = [] if options.final else _rows(bench, layouts(cores), options.rounds, truth, by="clock_ms")
    title = f"{bench.arch}: {bench.tasks} tasks, {bench.lengths[0]} prompts a layer, a picture each"
    facts = {"torch": torch.__version__, "machine": platform.machine(), "rounds": options.rounds, "threads": 1}
    figures = {"rows": [asdict(row) for row in rows], "layouts": [asdict(row) for row in laid_out], "cores": cores}
    return {"title": title, **facts, **figures}


def _rows(
    bench: Bench, steps: Sequence[Step], rounds: int, truth: Truth, *, by: Literal["cpu_ms", "clock_ms"]
) -> list[Row]:
    """Rows of steps that take turns. `by`: the time that is compared with the first step's."""
    answers, lacking = _started(bench, steps)
    timed = {step.name: answers[step.name] for step in steps if step.timed and step.name in answers}
    spent = by_both_clocks(timed, rounds)
    rows = []
    for step in steps:
        row = Row(step.name, step.taken, lacking.get(step.name, step.why))
        if step.name in spent:
            cpu_ms, clock_ms = spent[step.name]
            row = replace(row, cpu_ms=cpu_ms, clock_ms=clock_ms)
        if step.name in answers and step.truth is not None:
            row = replace(row, **asdict(Drift.of(answers[step.name](), truth(step.truth))))
        rows.append(row)
    return _compared(rows, by)


def _started(bench: Bench, steps: Sequence[Step]) -> tuple[dict[str, Answer], dict[str, str]]:
    """The answers of the steps that run here, by name; and why the others cannot."""
    answers: dict[str, Answer] = {}
    lacking: dict[str, str] = {}
    for step in steps:
        try:
            answers[step.name] = step.start(bench)
        except NotAvailable as error:
            lacking[step.name] = f"not measured: {error}"
    return answers, lacking


def _compared(rows: Sequence[Row], by: Literal["cpu_ms", "clock_ms"]) -> list[Row]:
    times: list[float | None] = [getattr(row, by) for row in rows]
    first = times[0] if times else None
    return [
        row if time is None or first is None else replace(row, speed=round(first / time, 2))
        for row, time in zip(rows, times, strict=True)
    ]


def tables(report: dict[str, Any]) -> str:
    """Markdown; the engine's own steps in bold."""
    parts = [_table(report["rows"], "step", "× timm", "cpu_ms")]
    if report["layouts"]:
        parts.append(_table(report["layouts"], "layout", "× one thread, by the clock", "cpu_ms", "clock_ms"))
    return "\n\n".join(parts)


def _table(rows: Sequence[dict[str, Any]], kind: str, speed: str, *times: str) -> str:
    named = {"cpu_ms": "CPU ms", "clock_ms": "clock ms"}
    forms = {**dict.fromkeys(times, ",.1f"), "speed": ".2f", "drift": ".0e", "agree": ".0%"}
    heads = [kind, *(named[time] for time in times), speed, "drift / σ", "same label", ""]
    lines = [f"| {' | '.join(heads[:-1])} | |", "|---" * len(heads) + "|"]
    for row in rows:
        name = f"**{row['name']}**" if row["taken"] else row["name"]
        figures = ("–" if row[key] is None else format(row[key], form) for key, form in forms.items())
        lines.append(f"| {name} | {' | '.join(figures)} | {row['why']} |")
    return "\n".join(lines)


def draw(reports: Sequence[dict[str, Any]]) -> str:
    """SVG: a panel for each architecture, a bar for each step, filled for the engine's own steps."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(7.5, 3.6 * len(reports)), layout="constrained")
        for number, report in enumerate(reports, start=1):
            rows = [row for row in report["rows"] if row["speed"] is not None][::-1]
            axes = figure.add_subplot(len(reports), 1, number)
            colours = [OURS if row["taken"] else OTHER for row in rows]
            bars = axes.barh([row["name"] for row in rows], [row["speed"] for row in rows], color=colours)
            axes.bar_label(bars, fmt="%.2f", padding=2)
            axes.axvline(1, color="#57606a", linewidth=0.8)
            axes.set_title(report["title"], loc="right")  # leaves room for long names of steps
            axes.set(xlabel="times the plain timm forward of one task, CPU time")
            axes.spines[["top", "right"]].set_visible(False)
        return as_svg(figure)


if __name__ == "__main__":
    main()
