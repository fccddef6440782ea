"""`python -m server bench ladder`: from the literal forward to the one that serves, one step a row.

Every row answers the same pictures for the same `vpt_deep` tasks, a picture each. One CPU thread, CPU time, so that
neighbours on a busy machine count as little as possible; rows take turns, round after round, and medians are reported
with their ratio to the plain timm forward of one task. Beside the time stands how far each row's logits are from the
literal forward in float64: the largest difference, in standard deviations of the logits, and the share of pictures
whose first label is the same. Steps that are not taken stay in the table, marked so. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .engine import in_turns
from .ladder_steps import (
    COMPILED,
    CUDA,
    FINAL,
    RAGGED,
    STEPS,
    Answer,
    Bench,
    NotHere,
    Step,
    compiled,
    packed_timm,
    plain_timm,
)
from .svg import as_svg, style


@dataclass(frozen=True)
class Row:
    """What was measured of a step. `drift`: largest difference from the literal logits, in their standard deviations;
    `agree`: share of pictures with the same first label."""

    name: str
    taken: bool
    why: str
    cpu_ms: float | None = None
    speed: float | None = None  # times the plain timm forward
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
        print(f"{reports[-1]['title']}\n\n{table(reports[-1])}\n", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(reports, indent=2) + "\n")
    if options.picture is not None:
        options.picture.write_text(draw(reports))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server bench ladder", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--arch", nargs="+", default=["deit_tiny_patch16_224"], help="plain timm ViTs")
    parser.add_argument("--weights", type=Path, help="safetensors of the one architecture; random where not given")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every row (default: %(default)s)")
    parser.add_argument("--tasks", type=int, default=8, help="pictures, each of its own task (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=10, help="prompts of each layer (default: %(default)s)")
    parser.add_argument("--final", action="store_true", help="only timm, the literal forward and what the engine does")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well: takes minutes")
    parser.add_argument("--json", type=Path, help="where to save the figures as well")
    parser.add_argument("--picture", type=Path, help="where to save an SVG of them (needs matplotlib)")
    return parser.parse_args(arguments)


def measure(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Rows of all steps, with what is needed to tell where they come from."""
    steps = [*STEPS, *RAGGED, *CUDA, *([COMPILED] if options.compile else [])]
    if options.final:
        steps = [step for step in steps if step.name in FINAL]
    answers: dict[str, Answer] = {}
    lacking: dict[str, str] = {}
    for step in steps:
        try:
            answers[step.name] = step.start(bench)
        except NotHere as error:
            lacking[step.name] = str(error)
    spent = in_turns(
        {step.name: answers[step.name] for step in steps if step.timed and step.name in answers}, options.rounds
    )
    truth = bench.literal(torch.float64)().numpy()
    rows = [_row(step, answers, lacking, spent, truth) for step in steps]
    title = f"{bench.arch}: {bench.tasks} tasks, {bench.lengths[0]} prompts a layer, a picture each"
    facts = {"torch": torch.__version__, "machine": platform.machine(), "rounds": options.rounds, "threads": 1}
    return {"title": title, **facts, "rows": [asdict(row) for row in rows]}


def _row(
    step: Step, answers: dict[str, Answer], lacking: dict[str, str], spent: dict[str, float], truth: NDArray[np.float64]
) -> Row:
    if step.name in lacking:
        return Row(step.name, step.taken, f"not measured: {lacking[step.name]}")
    timm_ms = spent[STEPS[0].name]
    own = spent.get(step.name)
    found = Row(step.name, step.taken, step.why, own, None if own is None else round(timm_ms / own, 2))
    if step in (*RAGGED, *CUDA) or step.start in (plain_timm, packed_timm, compiled):
        return found  # other prompts or pictures, or none
    logits = answers[step.name]().double().numpy()
    drift = float(np.abs(logits - truth).max() / truth.std())
    agree = float((logits.argmax(1) == truth.argmax(1)).mean())
    return replace(found, drift=drift, agree=agree)


def table(report: dict[str, Any]) -> str:
    """Markdown; in bold what the engine does."""
    lines = ["| step | CPU ms | × timm | drift / σ | same label | |", "|---|---|---|---|---|---|"]
    for row in report["rows"]:
        name = f"**{row['name']}**" if row["taken"] else row["name"]
        figures = [
            "–" if row["cpu_ms"] is None else f"{row['cpu_ms']:,.1f}",
            "–" if row["speed"] is None else f"{row['speed']:.2f}",
            "–" if row["drift"] is None else f"{row['drift']:.0e}",
            "–" if row["agree"] is None else f"{row['agree']:.0%}",
        ]
        lines.append(f"| {name} | {' | '.join(figures)} | {row['why']} |")
    return "\n".join(lines)


def draw(reports: Sequence[dict[str, Any]]) -> str:
    """SVG: a panel for each architecture, a bar for each step, what the engine does filled."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(7.5, 3.6 * len(reports)), layout="constrained")
        for number, report in enumerate(reports, start=1):
            rows = [row for row in report["rows"] if row["speed"] is not None][::-1]
            axes = figure.add_subplot(len(reports), 1, number)
            colours = ["#1f77b4" if row["taken"] else "#d0d7de" for row in rows]
            bars = axes.barh([row["name"] for row in rows], [row["speed"] for row in rows], color=colours)
            axes.bar_label(bars, fmt="%.2f", padding=2)
            axes.axvline(1, color="#57606a", linewidth=0.8)
            axes.set(title=report["title"], xlabel="times the plain timm forward of one task, CPU time")
            axes.spines[["top", "right"]].set_visible(False)
        return as_svg(figure)


if __name__ == "__main__":
    main()
