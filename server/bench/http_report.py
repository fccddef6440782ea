"""The report of `bench http`: tables in Markdown, figures as JSON, a picture."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .figures import latencies
from .http_targets import Copies
from .process_tree import Memory
from .svg import LINES, as_svg, style

if TYPE_CHECKING:
    from .http_figures import LoadResults, Measurements

PEER, MODEL_PER_TASK = "LitServe, by task", "LitServe, a copy a task"
ONE_COPY, COPIES = "one copy of the model, no server", "{} copies of the model, no server"


def report(
    closed: LoadResults,
    opened: LoadResults,
    memory: Mapping[str, Memory],
    copies: Copies | None,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """For each server: medians of the rounds; ratios are the medians of each round's own, to the LitServe app that
    sorts by task, or else to the last server."""
    return {
        "closed": {kind: _by_server(servers, options) for kind, servers in closed.items()},
        "open": {rate: _by_server(servers, options) for rate, servers in opened.items()},
        "memory_mib": {name: used._asdict() for name, used in _with_copies(memory, copies).items()},
        "copies": None if copies is None else copies.tasks,
    }


def _by_server(servers: Mapping[str, Measurements], options: argparse.Namespace) -> dict[str, Any]:
    base = _base(servers).cpu_ms
    return {name: _figures(measured, base, options) for name, measured in servers.items()}


def _base(servers: Mapping[str, Measurements]) -> Measurements:
    return servers.get(PEER, [*servers.values()][-1])


def _figures(measured: Measurements, base: list[float], options: argparse.Namespace) -> dict[str, Any]:
    ratios = [cpu / other for cpu, other in zip(measured.cpu_ms, base, strict=False)]
    within = sum(latency <= options.objective for latency in measured.latencies)
    return {
        "cpu_ms": round(statistics.median(measured.cpu_ms), 2) if measured.cpu_ms else None,
        "cpu_ms_of_rounds": [round(ms, 2) for ms in measured.cpu_ms],
        "ratio": round(statistics.median(ratios), 3) if ratios else None,
        **latencies(measured.latencies),
        "within_objective": round(within / measured.requests, 4) if measured.requests else None,
        "asked": measured.requests,
        "answered": measured.answered,
    }


def tables(report: Mapping[str, Any]) -> str:
    """Markdown."""
    options = report["options"]
    return "\n\n".join([_closed(report), *(_open(report, rate, options) for rate in report["open"]), _memory(report)])


def _closed(report: Mapping[str, Any]) -> str:
    kinds = [*report["closed"]]
    lines = [
        f"| CPU ms a request, {report['options']['tasks']} tasks | {' | '.join(f'{kind} | ratio' for kind in kinds)} |",
        "|---" * (1 + 2 * len(kinds)) + "|",
    ]
    for name in report["closed"][kinds[0]]:
        cells = [report["closed"][kind][name] for kind in kinds]
        lines.append(f"| {name} | " + " | ".join(f"{cell['cpu_ms']} | {cell['ratio']}" for cell in cells) + " |")
    return "\n".join(lines)


def _open(report: Mapping[str, Any], rate: str, options: Mapping[str, Any]) -> str:
    lines = [
        f"| {rate} questions/s | p50 ms | p95 ms | p99 ms | within {options['objective']:g} ms | answered |",
        "|---|---|---|---|---|---|",
    ]
    for name, figures in report["open"][rate].items():
        within = "–" if figures["within_objective"] is None else f"{figures['within_objective']:.1%}"
        answered = f"{figures['answered']} of {figures['asked']}"
        lines.append(
            f"| {name} | {figures['p50_ms']} | {figures['p95_ms']} | {figures['p99_ms']} | {within} | {answered} |"
        )
    return "\n".join(lines)


def _with_copies(memory: Mapping[str, Memory], copies: Copies | None) -> dict[str, Memory]:
    if copies is None:
        return dict(memory)
    return {**memory, ONE_COPY: copies.first, COPIES.format(copies.tasks): copies.every}


def _memory(report: Mapping[str, Any]) -> str:
    """Total and unreclaimable memory, each with columns of shares: relative to a server with a copy for every task, and
    to a process with copies and no server, if they were measured."""
    rows, tasks = report["memory_mib"], report["options"]["tasks"]
    wholes = {f"of a server with {tasks} copies": MODEL_PER_TASK, f"of {tasks} copies, no server": COPIES.format(tasks)}
    wholes = {head: name for head, name in wholes.items() if name in rows}
    lines = [f"| | {' | '.join(['MiB', *wholes, 'own MiB', *wholes])} |", "|---" * (3 + 2 * len(wholes)) + "|"]
    for name, used in rows.items():
        cells = [name]
        for kind in ("held", "own"):
            cells += [f"{used[kind]:,.0f}", *(f"{used[kind] / rows[whole][kind]:.2f}" for whole in wholes.values())]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(report: Mapping[str, Any]) -> str:
    """SVG: a group of bars for each popularity, a bar for each server."""
    from matplotlib.figure import Figure

    kinds = [*report["closed"]]
    servers = [*report["closed"][kinds[0]]]
    with style():
        figure = Figure(figsize=(7.5, 3.2), layout="constrained")
        axes, width = figure.add_subplot(), 0.8 / len(servers)
        for number, name in enumerate(servers):
            heights = [report["closed"][kind][name]["cpu_ms"] for kind in kinds]
            at = [place + (number - (len(servers) - 1) / 2) * width for place in range(len(kinds))]
            bars = axes.bar(at, heights, width * 0.95, label=name, color=LINES[number])
            axes.bar_label(bars, fmt="%.1f", padding=2)
        axes.set_xticks(range(len(kinds)), kinds)
        axes.set(ylabel="CPU ms of the server by request", title=f"{report['options']['tasks']} tasks, closed loop")
        axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1))  # outside of the bars
        axes.spines[["top", "right"]].set_visible(False)
        return as_svg(figure)
