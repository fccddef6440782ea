"""`python -m server bench noisy`: what quiet tasks notice of one that asks ten times as much as they do.

Servers of its own with the same made-up tasks: one as it comes, and with `--target` one that learns to keep a p99
target by smaller batches (`LENSRACK_TARGET_LATENCY_S`). Questions come by a Poisson process, whether or not earlier
ones are answered; latencies count from when a question was due. Rounds take turns: every task asks alike; then the
first asks `--times` as much while the others go on as before; then so much that the server cannot keep up. Told are the
latencies of the other tasks, of all rounds and the medians of each round's own, and their ratio to the calm rounds.
Nothing is asserted.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from prompts_store import open_store
from server.settings import Settings

from . import http_targets, made_tasks, telling
from .figures import latencies
from .http_targets import Target
from .load_generator import Seen, generate
from .svg import Panel, bars

CALM, NOISY, FLOODED = "calm", "noisy", "flooded"


@dataclass
class Quiet:
    """What the quiet tasks saw, in ms, a list a round; and what became of the noisy one's questions."""

    rounds: list[list[float]] = field(default_factory=list)
    failures: int = 0
    noisy: list[float] = field(default_factory=list)
    refused: int = 0

    def add(self, seen: Seen) -> None:
        others = [one for one in seen.answers if one.task]
        self.rounds.append([(one.done_s - one.due_s) * 1e3 for one in others if one.status == 200])
        self.failures += sum(one.status != 200 for one in others)
        noisy = [one for one in seen.answers if not one.task]
        self.noisy += [(one.done_s - one.due_s) * 1e3 for one in noisy if one.status == 200]
        self.refused += sum(one.status != 200 for one in noisy)


Found = dict[str, dict[str, Quiet]]  # by server, by kind of round


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    with tempfile.TemporaryDirectory(prefix="lensrack-bench-") as name:
        folder = Path(name)
        store, tasks = _prepared(folder, options)
        with _servers(folder, store, options) as targets:
            found = _rounds(targets, tasks, options)
            limits = {target.name: _limit(target) for target in targets}
            dtype = httpx.get(f"http://127.0.0.1:{targets[0].port}/readyz").json()["backbone"]["dtype"]
    report = {
        **telling.stated("noisy", options, dtype=dtype, seeds="of each task its number; of arrivals that of the round"),
        "backbone": Settings().backbone,
        "quiet": {server: _told(kinds) for server, kinds in found.items()},
        "batch_limit": limits,
    }
    telling.tell(report, table(report), options, draw)


def shares(kind: str, tasks: int, times: float, flood: float) -> list[float]:
    """How often each task asks, in quiet tasks; the first is the noisy one."""
    return [{CALM: 1.0, NOISY: times, FLOODED: flood}[kind]] + [1.0] * (tasks - 1)


def _prepared(folder: Path, options: argparse.Namespace) -> tuple[str, tuple[str, ...]]:
    url, tasks = f"file://{folder / 'store'}", made_tasks.names(options.tasks)
    store = open_store(url)
    for _ in made_tasks.publish(store, made_tasks.spec_of(Settings()), tasks, options.method, options.prompts):
        pass
    store.close()
    http_targets.bodies(folder, tasks, made_tasks.pictures(None, folder, min(16, options.tasks), side=128))
    return url, tasks


@contextmanager
def _servers(folder: Path, store: str, options: argparse.Namespace) -> Iterator[list[Target]]:
    with ExitStack() as stack:
        up = [stack.enter_context(http_targets.ours("as it comes", folder, store, "auto"))]
        if options.target:
            more = {"LENSRACK_TARGET_LATENCY_S": str(options.target)}
            up.append(stack.enter_context(http_targets.ours("with a target", folder, store, "auto", more)))
        yield up


def _rounds(targets: Sequence[Target], tasks: Sequence[str], options: argparse.Namespace) -> Found:
    """A first round that pays for set-up, and teaches the limit, is not counted."""
    found: Found = {target.name: {kind: Quiet() for kind in (CALM, NOISY, FLOODED)} for target in targets}
    for turn in range(options.rounds + 1):
        for kind in (CALM, NOISY, FLOODED):
            weights = shares(kind, len(tasks), options.times, options.flood)
            for target in targets:
                plan = target.plan(tasks, weights)
                rate = options.rate * sum(weights)
                seen = generate(replace(plan, seconds=options.seconds, rate=rate, seed=turn))
                if turn:
                    found[target.name][kind].add(seen)
    return found


def _limit(target: Target) -> float:
    """Rows that a forward of this server may have at the end."""
    page = httpx.get(f"http://127.0.0.1:{target.port}/metrics", timeout=30).text
    return float(next(line.split()[1] for line in page.splitlines() if line.startswith("lensrack_batch_limit_rows ")))


def _told(kinds: dict[str, Quiet]) -> dict[str, Any]:
    calm = _p99s(kinds[CALM])
    return {kind: _of_kind(quiet, calm) for kind, quiet in kinds.items()}


def _of_kind(quiet: Quiet, calm: Sequence[float]) -> dict[str, Any]:
    ratios = [own / other for own, other in zip(_p99s(quiet), calm, strict=True) if other]
    return {
        **latencies([ms for own in quiet.rounds for ms in own]),
        "p99_of_rounds_ms": _p99s(quiet),
        "p99_ratio": round(statistics.median(ratios), 2) if ratios else None,
        "asked": sum(map(len, quiet.rounds)) + quiet.failures,
        "failures": quiet.failures,
        "noisy": {**latencies(quiet.noisy), "answered": len(quiet.noisy), "refused": quiet.refused},
    }


def _p99s(quiet: Quiet) -> list[float]:
    return [latencies(own)["p99_ms"] or 0.0 for own in quiet.rounds]


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| quiet tasks | p50 ms | p95 ms | p99 ms | × calm | failures | noisy p50, p99 ms | its refusals |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for server, kinds in report["quiet"].items():
        for kind, own in kinds.items():
            other = own["noisy"]
            lines.append(
                f"| {server}, {kind} | {own['p50_ms']} | {own['p95_ms']} | {own['p99_ms']} | {own['p99_ratio']} | "
                f"{own['failures']} of {own['asked']} | {other['p50_ms']}, {other['p99_ms']} | {other['refused']} |"
            )
    limits = ", ".join(f"{name}: {rows:g}" for name, rows in report["batch_limit"].items())
    return "\n".join([*lines, "", f"rows that a forward may have at the end: {limits}"])


def draw(report: Mapping[str, Any]) -> str:
    """SVG: the quiet tasks' p99, a panel for each server."""
    panels = [
        Panel(f"quiet tasks' p99, server {server}", "ms", {kind: own["p99_ms"] for kind, own in kinds.items()}, [CALM])
        for server, kinds in report["quiet"].items()
    ]
    return bars(panels)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m server bench noisy",
        description=(__doc__ or "").split("\n\n")[1],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--tasks", type=int, default=16, help="the noisy one among them")
    parser.add_argument("--method", default="vpt_deep", help="of all of them")
    parser.add_argument("--prompts", type=int, default=10, help="of each layer")
    parser.add_argument("--rate", type=float, default=1.0, help="questions a second of a quiet task")
    parser.add_argument("--times", type=float, default=10.0, help="so often asks the noisy one")
    parser.add_argument("--flood", type=float, default=200.0, help="and so often where the server is flooded")
    parser.add_argument("--target", type=float, default=0.0, help="seconds: a second server that keeps a p99 target")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each kind")
    parser.add_argument("--seconds", type=float, default=8.0, help="of a turn")
    telling.add_files(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
