"""`python -m server bench noisy`: the effect on quiet tasks of one that sends ten times as many requests as they do.

Separate servers with the same synthetic tasks: one with default settings, and with `--target` one that learns to keep a
p99 target by smaller batches (`LENSRACK_TARGET_LATENCY_S`). Requests arrive by a Poisson process, whether or not
earlier ones are answered; latencies count from when a request was due. Rounds take turns: every task at the same rate;
then the first task at `--times` that rate while the others continue as before; then at a rate that the server cannot
sustain. Reported are the latencies of the other tasks, of all rounds and the medians of each round's own, and their
ratio to the calm rounds. Nothing is asserted.
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

from . import http_targets, reporting, synthetic_tasks
from .figures import latencies
from .http_targets import Target
from .load_generator import LoadResult, generate
from .svg import Panel, bars

CALM, NOISY, FLOODED = "calm", "noisy", "flooded"


@dataclass
class QuietTasks:
    """Latencies of the quiet tasks in ms, one list per round; and the outcome of the noisy task's requests."""

    rounds: list[list[float]] = field(default_factory=list)
    failures: int = 0
    noisy: list[float] = field(default_factory=list)
    refused: int = 0

    def add(self, result: LoadResult) -> None:
        others = [answer for answer in result.answers if answer.task]
        self.rounds.append([(answer.done_s - answer.due_s) * 1e3 for answer in others if answer.status == 200])
        self.failures += sum(answer.status != 200 for answer in others)
        noisy = [answer for answer in result.answers if not answer.task]
        self.noisy += [(answer.done_s - answer.due_s) * 1e3 for answer in noisy if answer.status == 200]
        self.refused += sum(answer.status != 200 for answer in noisy)


QuietByServer = dict[str, dict[str, QuietTasks]]  # by server, by kind of round


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    with tempfile.TemporaryDirectory(prefix="lensrack-bench-") as name:
        folder = Path(name)
        store, tasks = _prepared(folder, options)
        with _servers(folder, store, options) as targets:
            quiet = _rounds(targets, tasks, options)
            limits = {target.name: _limit(target) for target in targets}
            dtype = httpx.get(f"http://127.0.0.1:{targets[0].port}/readyz").json()["backbone"]["dtype"]
    report = {
        **reporting.provenance(
            "noisy", options, dtype=dtype, seeds="of each task its number; of arrivals that of the round"
        ),
        "backbone": Settings().backbone,
        "quiet": {server: _figures(kinds) for server, kinds in quiet.items()},
        "batch_limit": limits,
    }
    reporting.emit(report, table(report), options, draw)


def shares(kind: str, tasks: int, times: float, flood: float) -> list[float]:
    """The rate of each task, relative to quiet tasks; the first is the noisy one."""
    return [{CALM: 1.0, NOISY: times, FLOODED: flood}[kind]] + [1.0] * (tasks - 1)


def _prepared(folder: Path, options: argparse.Namespace) -> tuple[str, tuple[str, ...]]:
    url, tasks = f"file://{folder / 'store'}", synthetic_tasks.names(options.tasks)
    store = open_store(url)
    for _ in synthetic_tasks.publish(
        store, synthetic_tasks.spec_of(Settings()), tasks, options.method, options.prompts
    ):
        pass
    store.close()
    http_targets.bodies(folder, tasks, synthetic_tasks.pictures(None, folder, min(16, options.tasks), side=128))
    return url, tasks


@contextmanager
def _servers(folder: Path, store: str, options: argparse.Namespace) -> Iterator[list[Target]]:
    with ExitStack() as stack:
        up = [stack.enter_context(http_targets.ours("as it comes", folder, store, "auto"))]
        if options.target:
            more = {"LENSRACK_TARGET_LATENCY_S": str(options.target)}
            up.append(stack.enter_context(http_targets.ours("with a target", folder, store, "auto", more)))
        yield up


def _rounds(targets: Sequence[Target], tasks: Sequence[str], options: argparse.Namespace) -> QuietByServer:
    """The first round, which pays for set-up and teaches the batch limit, is not counted."""
    quiet: QuietByServer = {target.name: {kind: QuietTasks() for kind in (CALM, NOISY, FLOODED)} for target in targets}
    for turn in range(options.rounds + 1):
        for kind in (CALM, NOISY, FLOODED):
            weights = shares(kind, len(tasks), options.times, options.flood)
            for target in targets:
                plan = target.plan(tasks, weights)
                rate = options.rate * sum(weights)
                result = generate(replace(plan, seconds=options.seconds, rate=rate, seed=turn))
                if turn:
                    quiet[target.name][kind].add(result)
    return quiet


def _limit(target: Target) -> float:
    """Rows that a forward of this server may have at the end of the benchmark."""
    page = httpx.get(f"http://127.0.0.1:{target.port}/metrics", timeout=30).text
    return float(next(line.split()[1] for line in page.splitlines() if line.startswith("lensrack_batch_limit_rows ")))


def _figures(kinds: dict[str, QuietTasks]) -> dict[str, Any]:
    calm = _p99s(kinds[CALM])
    return {kind: _of_kind(quiet, calm) for kind, quiet in kinds.items()}


def _of_kind(quiet: QuietTasks, calm: Sequence[float]) -> dict[str, Any]:
    ratios = [values / other for values, other in zip(_p99s(quiet), calm, strict=True) if other]
    return {
        **latencies([ms for values in quiet.rounds for ms in values]),
        "p99_of_rounds_ms": _p99s(quiet),
        "p99_ratio": round(statistics.median(ratios), 2) if ratios else None,
        "asked": sum(map(len, quiet.rounds)) + quiet.failures,
        "failures": quiet.failures,
        "noisy": {**latencies(quiet.noisy), "answered": len(quiet.noisy), "refused": quiet.refused},
    }


def _p99s(quiet: QuietTasks) -> list[float]:
    return [latencies(values)["p99_ms"] or 0.0 for values in quiet.rounds]


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| quiet tasks | p50 ms | p95 ms | p99 ms | × calm | failures | noisy p50, p99 ms | its refusals |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for server, kinds in report["quiet"].items():
        for kind, row in kinds.items():
            other = row["noisy"]
            lines.append(
                f"| {server}, {kind} | {row['p50_ms']} | {row['p95_ms']} | {row['p99_ms']} | {row['p99_ratio']} | "
                f"{row['failures']} of {row['asked']} | {other['p50_ms']}, {other['p99_ms']} | {other['refused']} |"
            )
    limits = ", ".join(f"{name}: {rows:g}" for name, rows in report["batch_limit"].items())
    return "\n".join([*lines, "", f"rows that a forward may have at the end: {limits}"])


def draw(report: Mapping[str, Any]) -> str:
    """SVG: the quiet tasks' p99, a panel for each server."""
    panels = [
        Panel(
            f"quiet tasks' p99, server {server}",
            "ms",
            {kind: figures["p99_ms"] for kind, figures in kinds.items()},
            [CALM],
        )
        for server, kinds in report["quiet"].items()
    ]
    return bars(panels)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m server bench noisy",
        description=(__doc__ or "").split("\n\n")[1],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--tasks", type=int, default=16, help="tasks, including the noisy one")
    parser.add_argument("--method", default="vpt_deep", help="method of all tasks")
    parser.add_argument("--prompts", type=int, default=10, help="prompts of each layer")
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second of a quiet task")
    parser.add_argument("--times", type=float, default=10.0, help="rate of the noisy task, relative to a quiet one")
    parser.add_argument("--flood", type=float, default=200.0, help="the same in flooded rounds")
    parser.add_argument("--target", type=float, default=0.0, help="seconds: a second server that keeps a p99 target")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each kind")
    parser.add_argument("--seconds", type=float, default=8.0, help="seconds of a turn")
    reporting.add_file_options(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
