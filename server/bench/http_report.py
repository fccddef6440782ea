"""What `bench http` tells: tables in Markdown, figures as JSON, a picture."""

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
    from .http_figures import Found, Turns

PEER, OWN_MODELS = "LitServe, by task", "LitServe, a copy a task"
ONE_COPY, COPIES = "one copy of the model, no server", "{} copies of the model, no server"


def report(
    closed: Found,
    opened: Found,
    memory: Mapping[str, Memory],
    copies: Copies | None,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Of each server: medians of the rounds; ratios are the medians of each round's own, to the LitServe app that sorts
    by task or else the last."""
    return {
        "closed": {kind: _by_server(found, options) for kind, found in closed.items()},
        "open": {rate: _by_server(found, options) for rate, found in opened.items()},
        "memory_mib": {name: taken._asdict() for name, taken in _with_copies(memory, copies).items()},
        "copies": None if copies is None else copies.tasks,
    }


def _by_server(found: Mapping[str, Turns], options: argparse.Namespace) -> dict[str, Any]:
    base = _base(found).cpu_ms
    return {name: _told(turns, base, options) for name, turns in found.items()}


def _base(found: Mapping[str, Turns]) -> Turns:
    return found.get(PEER, [*found.values()][-1])


def _told(turns: Turns, base: list[float], options: argparse.Namespace) -> dict[str, Any]:
    ratios = [own / other for own, other in zip(turns.cpu_ms, base, strict=False)]
    within = sum(latency <= options.objective for latency in turns.latencies)
    return {
        "cpu_ms": round(statistics.median(turns.cpu_ms), 2) if turns.cpu_ms else None,
        "cpu_ms_of_rounds": [round(ms, 2) for ms in turns.cpu_ms],
        "ratio": round(statistics.median(ratios), 3) if ratios else None,
        **latencies(turns.latencies),
        "within_objective": round(within / turns.asked, 4) if turns.asked else None,
        "asked": turns.asked,
        "answered": turns.answered,
    }


def tables(found: Mapping[str, Any]) -> str:
    """Markdown."""
    options = found["options"]
    return "\n\n".join([_closed(found), *(_open(found, rate, options) for rate in found["open"]), _memory(found)])


def _closed(found: Mapping[str, Any]) -> str:
    kinds = [*found["closed"]]
    lines = [
        f"| CPU ms a request, {found['options']['tasks']} tasks | {' | '.join(f'{kind} | ratio' for kind in kinds)} |",
        "|---" * (1 + 2 * len(kinds)) + "|",
    ]
    for name in found["closed"][kinds[0]]:
        cells = [found["closed"][kind][name] for kind in kinds]
        lines.append(f"| {name} | " + " | ".join(f"{one['cpu_ms']} | {one['ratio']}" for one in cells) + " |")
    return "\n".join(lines)


def _open(found: Mapping[str, Any], rate: str, options: Mapping[str, Any]) -> str:
    lines = [
        f"| {rate} questions/s | p50 ms | p95 ms | p99 ms | within {options['objective']:g} ms | answered |",
        "|---|---|---|---|---|---|",
    ]
    for name, own in found["open"][rate].items():
        within = "–" if own["within_objective"] is None else f"{own['within_objective']:.1%}"
        answered = f"{own['answered']} of {own['asked']}"
        lines.append(f"| {name} | {own['p50_ms']} | {own['p95_ms']} | {own['p99_ms']} | {within} | {answered} |")
    return "\n".join(lines)


def _with_copies(memory: Mapping[str, Memory], copies: Copies | None) -> dict[str, Memory]:
    if copies is None:
        return dict(memory)
    return {**memory, ONE_COPY: copies.first, COPIES.format(copies.tasks): copies.every}


def _memory(found: Mapping[str, Any]) -> str:
    """In all and own, each with a column of shares for those with a copy for every task, a server and a process without
    one, if they are there."""
    rows, tasks = found["memory_mib"], found["options"]["tasks"]
    wholes = {f"of a server with {tasks} copies": OWN_MODELS, f"of {tasks} copies, no server": COPIES.format(tasks)}
    wholes = {head: name for head, name in wholes.items() if name in rows}
    lines = [f"| | {' | '.join(['MiB', *wholes, 'own MiB', *wholes])} |", "|---" * (3 + 2 * len(wholes)) + "|"]
    for name, taken in rows.items():
        cells = [name]
        for kind in ("held", "own"):
            cells += [f"{taken[kind]:,.0f}", *(f"{taken[kind] / rows[whole][kind]:.2f}" for whole in wholes.values())]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: Mapping[str, Any]) -> str:
    """SVG: a group of bars for each popularity, a bar for each server."""
    from matplotlib.figure import Figure

    kinds = [*found["closed"]]
    servers = [*found["closed"][kinds[0]]]
    with style():
        figure = Figure(figsize=(7.5, 3.2), layout="constrained")
        axes, width = figure.add_subplot(), 0.8 / len(servers)
        for number, name in enumerate(servers):
            heights = [found["closed"][kind][name]["cpu_ms"] for kind in kinds]
            at = [place + (number - (len(servers) - 1) / 2) * width for place in range(len(kinds))]
            bars = axes.bar(at, heights, width * 0.95, label=name, color=LINES[number])
            axes.bar_label(bars, fmt="%.1f", padding=2)
        axes.set_xticks(range(len(kinds)), kinds)
        axes.set(ylabel="CPU ms of the server by request", title=f"{found['options']['tasks']} tasks, closed loop")
        axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1))  # no bar behind it
        axes.spines[["top", "right"]].set_visible(False)
        return as_svg(figure)
